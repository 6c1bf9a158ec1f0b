"""quantization_cpm without a GPU.

g++ compiles the CUDA source with `cuda_on_cpu.h`; `linear` runs it with stand-ins for cpm_kernels' NVRTC binding and
launcher. nvcc and NVRTC, if installed, compile it as well.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from chatglm2 import quantization_cpm
from chatglm2.quantization_format import dequantize_weight
from conftest import ROOT
from quantization_helpers import CUDA, FLOAT32_SUM, HALF_ULP, error, make

cpm_kernels = importlib.util.find_spec("cpm_kernels")  # not imported, because that needs a driver
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


# ---- values, through `linear`, with g++ in place of NVRTC and fibers in place of GPU threads ------------------------

ENTRIES = """
extern "C" void run_matvec(const unsigned* g, const unsigned* b, void** p) { launch(matvec, g, b, p); }
extern "C" void run_dequantize(const unsigned* g, const unsigned* b, void** p) { launch(dequantize, g, b, p); }
"""


class FakeCpm:
    """The interface of cpm_kernels 1.0.11; records calls and runs the kernels on the CPU."""

    def __init__(self, folder):
        self.folder, self.options, self.launches, self.devices = folder, [], [], []
        self.refuse = ()

    def modules(self):
        nvrtc = types.SimpleNamespace(
            version=(13, 0),
            nvrtcProgram=lambda: types.SimpleNamespace(value=None),
            nvrtcCreateProgram=self.create,
            nvrtcCompileProgram=self.compile,
            nvrtcGetCUBINSize=lambda program: len(program.code),
            nvrtcGetCUBIN=lambda program, buffer: setattr(buffer, "raw", program.code),
            nvrtcGetPTXSize=lambda program: len(program.code),
            nvrtcGetPTX=lambda program, buffer: setattr(buffer, "raw", program.code),
            nvrtcDestroyProgram=lambda program: setattr(program, "code", None),
        )
        cudart = types.SimpleNamespace(version=13000, cudaSetDevice=self.devices.append)
        library = types.SimpleNamespace(
            nvrtc=nvrtc, cudart=cudart, cuda=types.SimpleNamespace(version=13000), cublaslt=types.SimpleNamespace()
        )
        base = types.SimpleNamespace(LazyKernelCModule=lambda code: code, KernelFunction=self.kernel_function)
        kernels = types.SimpleNamespace(base=base, __path__=[])
        return {
            "cpm_kernels": types.SimpleNamespace(library=library, kernels=kernels, __path__=[]),
            "cpm_kernels.library": library,
            "cpm_kernels.kernels": kernels,
            "cpm_kernels.kernels.base": base,
        }

    def create(self, program, source, name, headers, header_sources, header_names):
        assert headers == 0 and header_sources == [] and header_names == []
        program.source = source

    def compile(self, program, count, options):
        assert count == len(options)
        self.options.append(list(options))
        if any(option.endswith(self.refuse) for option in options if self.refuse):
            raise RuntimeError("NVRTC Error: NVRTC_ERROR_INVALID_OPTION")
        macros = sorted(option for option in options if option.startswith("-D"))
        binary = self.folder / ("kernel" + "".join(macros).replace("-D", "_").replace("=", "") + ".so")
        if not binary.exists():
            assert quantization_cpm.HALF in program.source  # PTX; the header has the same two functions
            source = program.source.replace(quantization_cpm.HALF, "")
            command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", *macros, f"-I{Path(__file__).parent}"]
            command += ["-include", "cuda_on_cpu.h", "-x", "c++", "-", "-o", str(binary)]
            subprocess.run(command, input=source + ENTRIES, text=True, check=True)
        program.code = str(binary).encode() + b"\0"

    def kernel_function(self, module, name):
        def call(grid, block, shared_bytes, stream, params):
            assert len(grid) == len(block) == 3 and shared_bytes == 0
            self.launches.append((name, grid, block, stream, [type(p) for p in params]))
            self.launch_kernel((module, name), *grid, *block, 0, stream, [ctypes.addressof(p) for p in params])

        return call

    @staticmethod
    def launch_kernel(function, gx, gy, gz, bx, by, bz, shared_bytes, stream, addresses):
        module, name = function
        entry = getattr(ctypes.CDLL(module.rstrip(b"\0").decode()), f"run_{name}")
        unsigned3, pointers = ctypes.c_uint * 3, ctypes.c_void_p * len(addresses)
        entry(unsigned3(gx, gy, gz), unsigned3(bx, by, bz), pointers(*addresses))

    def with_its_own_launcher(self, monkeypatch):
        """Use the real `kernels/base.py` of cpm_kernels, with stand-ins for the CUDA driver and runtime."""
        library = sys.modules["cpm_kernels.library"]
        library.cudart.cudaStream_t, library.cudart.cudaGetDevice = ctypes.c_void_p, lambda: 3
        library.cuda.cuModuleLoadData = lambda code: code
        library.cuda.cuModuleGetFunction = lambda module, name: (module, name)
        library.cuda.cuLaunchKernel = self.launch_kernel
        device = types.SimpleNamespace(Device=lambda index: types.SimpleNamespace(use=lambda: None))
        monkeypatch.setitem(sys.modules, "cpm_kernels.device", device)
        monkeypatch.setitem(sys.modules, "pkg_resources", types.SimpleNamespace())
        path = Path(cpm_kernels.origin).parent / "kernels" / "base.py"
        spec = importlib.util.spec_from_file_location("cpm_kernels.kernels.base", path)
        base = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(base)
        monkeypatch.setitem(sys.modules, "cpm_kernels.kernels.base", base)


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    return tmp_path_factory.mktemp("builds")


@pytest.fixture
def cpm(builds, monkeypatch):
    """A FakeCpm in place of cpm_kernels; torch reports a card of capability 9.0 and a stream."""
    fake = FakeCpm(builds)
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=1234))
    clear = (quantization_cpm.function, quantization_cpm.capability)
    for cached in clear:
        cached.cache_clear()
    yield fake
    for cached in clear:
        cached.cache_clear()


@needs_gxx
@pytest.mark.parametrize(
    "rows, columns, out, bits, dtype, group, kernel",
    [
        (1, 1056, 10, 4, torch.float16, None, "matvec"),
        (1, 1056, 10, 4, torch.bfloat16, 32, "matvec"),
        (1, 600, 7, 8, torch.bfloat16, None, "matvec"),
        (2, 96, 5, 8, torch.float16, 32, "matvec"),
        (3, 96, 5, 4, torch.float32, None, "matvec"),
        (8, 64, 6, 4, torch.bfloat16, None, "matvec"),
        (13, 64, 6, 4, torch.bfloat16, None, "matvec"),
        (17, 64, 6, 4, torch.float16, None, "dequantize"),
        (17, 96, 5, 8, torch.float16, 32, "dequantize"),
        (1, 90, 7, 4, torch.bfloat16, 6, "dequantize"),
        (1, 31, 7, 8, torch.float32, None, "dequantize"),
    ],
)
@pytest.mark.parametrize("bias", (True, False))
def test_values(cpm, rows, columns, out, bits, dtype, group, kernel, bias):
    arguments = make(rows, columns, out, bits, dtype, group, bias)
    y = quantization_cpm.linear(*arguments)
    assert y.shape == (rows, out) and y.dtype == dtype
    assert cpm.launches[0][0] == kernel
    # for torch's matmul the dequantized weight is rounded, and on a CPU half precision sums may be, too
    assert error(y, *arguments) < (FLOAT32_SUM if kernel == "matvec" else 2 * HALF_ULP[dtype])


@needs_gxx
def test_dequantize_is_bit_equal_to_the_reference(cpm, monkeypatch):
    x, weight, scale, _, bits = make(96, 96, 11, 4, torch.float16, 32)
    x = torch.eye(96, dtype=torch.float16)
    monkeypatch.setattr(quantization_cpm, "PIECE", 4 * 96 * 2)  # 4 rows of the weight at a time: 4, 4, 3
    y = quantization_cpm.linear(x, weight, scale, None, bits)
    assert torch.equal(y.T, dequantize_weight(weight, scale, bits))
    assert [launch[1] for launch in cpm.launches] == [(1, 4, 1), (1, 4, 1), (1, 3, 1)]


@needs_gxx
def test_call_sequence(cpm):
    arguments = make(3, 64, 6, 4, torch.bfloat16)
    quantization_cpm.linear(*arguments)
    quantization_cpm.linear(*arguments)
    assert len(cpm.options) == 1  # compiled once
    assert "--gpu-architecture=sm_90" in cpm.options[0]
    assert {"-DBITS=4", "-DX=bfloat16", "-DSCALE=bfloat16", "-DROWS=4", "-DGROUPED=0"} <= set(cpm.options[0])
    assert cpm.devices == [3, 3]
    name, grid, block, stream, params = cpm.launches[0]
    assert (name, grid, block, stream) == ("matvec", (2, 1, 1), (128, 1, 1), 1234)
    assert params == [ctypes.c_void_p] * 5 + [ctypes.c_int32] * 4
    x, weight, scale, bias, bits = arguments
    assert quantization_cpm.linear(x[:0], weight, scale, bias, bits).shape == (0, 6)
    assert len(cpm.launches) == 2  # nothing to launch for no rows
    with pytest.raises(TypeError, match="float64"):
        quantization_cpm.linear(x.double(), weight, scale, bias, bits)


@needs_gxx
@pytest.mark.skipif(cpm_kernels is None, reason="cpm_kernels==1.0.11 is not installed")
def test_values_with_the_launcher_of_cpm_kernels(cpm, monkeypatch):
    cpm.with_its_own_launcher(monkeypatch)
    for rows in (3, 20):
        arguments = make(rows, 64, 6, 4, torch.bfloat16)
        assert error(quantization_cpm.linear(*arguments), *arguments) < (FLOAT32_SUM if rows == 3 else 2**-7)
    assert not cpm.launches  # the stand-in was not used


@needs_gxx
def test_ptx_fallback_for_unknown_capabilities(cpm):
    cpm.refuse = ("sm_90",)
    arguments = make(1, 64, 6, 4, torch.bfloat16)
    y = quantization_cpm.linear(*arguments)
    assert error(y, *arguments) < FLOAT32_SUM
    assert cpm.options[1][-1] == "--gpu-architecture=compute_75"
    with pytest.raises(RuntimeError, match="capability 6.1"):
        cpm.refuse = ("sm_61",)
        quantization_cpm.build(61, [])


# ---- machine code ---------------------------------------------------------------------------------------------------


def macros(bits, x, grouped, rows):
    values = dict(BITS=bits, X=x, SCALE=x, GROUPED=grouped, ROWS=rows)
    values |= dict(OUTS=quantization_cpm.OUTS, THREADS=quantization_cpm.THREADS)
    return [f"-D{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def nvcc():
    """Return (path of nvcc, the capabilities it supports)."""
    path = shutil.which("nvcc")
    if path is None:
        pytest.skip("nvcc is not installed")
    listed = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return path, sorted(int(number) for number in re.findall(r"compute_(\d+)\b", listed))


@pytest.mark.parametrize("bits, x, grouped, rows", [(4, "half", 0, 1), (4, "bfloat16", 1, 8), (8, "float", 1, 1)])
def test_nvcc_compiles_for_each_capability(nvcc, tmp_path, bits, x, grouped, rows):
    path, capabilities = nvcc
    capabilities = [c for c in capabilities if c in (75, 80, 86, 89, 90, 100, 120)]
    assert {75, 80, 90} <= set(capabilities)
    if 120 not in capabilities:
        pytest.skip(f"this nvcc compiles for {capabilities}, not for all of 75 to 120")
    if x != "half":  # all capabilities for one type, the oldest and the newest for the others: compiling is slow
        capabilities = capabilities[:: len(capabilities) - 1]
    source = tmp_path / "kernels.cu"
    source.write_text(quantization_cpm.HALF + quantization_cpm.SOURCE)
    targets = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in capabilities]
    command = [path, "-fatbin", "-std=c++17", "--threads=2", *targets, *macros(bits, x, grouped, rows), str(source)]
    run = subprocess.run([*command, "-o", str(tmp_path / "kernels.fatbin")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr


NVRTC = """
import ctypes, glob, json, os, sys, tempfile, types
folder, libraries, root = sys.argv[1:4]
home = tempfile.mkdtemp()  # cpm_kernels looks for $CUDA_PATH/lib64/libnvrtc.so
os.makedirs(home + "/lib64")
os.symlink(glob.glob(libraries + "/libnvrtc.so.*")[0], home + "/lib64/libnvrtc.so")
os.environ["CUDA_PATH"] = home
ctypes.CDLL(glob.glob(libraries + "/libnvrtc-builtins.so.*")[0])
for name, path in (("cpm_kernels", folder), ("cpm_kernels.library", folder + "/library")):
    sys.modules[name] = types.ModuleType(name)  # without their __init__, which needs a driver
    sys.modules[name].__path__ = [path]
sys.path.insert(0, root + "/lib")
from chatglm2.quantization_cpm import build
for arch, macros in json.loads(sys.argv[4]):
    print(json.dumps([arch, build(arch, macros)[:4].decode("latin1")]))
"""


def test_nvrtc_compiles_with_the_binding_of_cpm_kernels():
    """The real binding and the real NVRTC; no GPU is needed."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = [p for base in (nvidia.submodule_search_locations if nvidia else ()) for p in Path(base).glob("**/lib")]
    folders = [p for p in folders if list(p.glob("libnvrtc.so.*")) and list(p.glob("libnvrtc-builtins.so.*"))]
    if cpm_kernels is None or not folders:
        pytest.skip("needs cpm_kernels==1.0.11 and the nvidia-cuda-nvrtc wheel")
    cards = [(arch, macros(4, "bfloat16", 0, 1)) for arch in (75, 80, 90, 120, 999)]
    cards += [(80, macros(8, x, 1, rows)) for x, rows in (("half", 8), ("float", 1))]
    command = [sys.executable, "-c", NVRTC, os.path.dirname(cpm_kernels.origin), str(folders[0]), str(ROOT)]
    run = subprocess.run([*command, json.dumps(cards)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for arch, magic in map(json.loads, run.stdout.splitlines()):
        assert magic == ("//\n/" if arch == 999 else "\x7fELF")  # PTX for an unknown capability


# ---- where the kernels cannot run ------------------------------------------------------------------------------------


@needs_gxx
def test_available_with_cpm_kernels(cpm):
    assert quantization_cpm.unavailable(CUDA) is None


@pytest.mark.parametrize(
    "failure, cure",
    [
        (ModuleNotFoundError("No module named 'cpm_kernels'", name="cpm_kernels"), "pip install cpm_kernels==1.0.11"),
        (ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources"), "'setuptools<82'"),
        (RuntimeError("CUDA Runtime Error: CUDA driver version is insufficient"), "NVIDIA driver"),
        (RuntimeError("Unknown platform: darwin"), "Linux or Windows"),
        (OSError("Could not find module 'nvcuda.dll'"), "NVIDIA driver"),
        (AttributeError("libcudart.so: undefined symbol: cudaFree"), "CUDA toolkit"),
    ],
)
def test_unavailable_names_the_remedy(monkeypatch, failure, cure):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "cpm_kernels":
                raise failure

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delitem(sys.modules, "cpm_kernels", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    reason = quantization_cpm.unavailable(CUDA)
    assert cure in reason and "\n" not in reason
    if not isinstance(failure, ModuleNotFoundError):
        assert str(failure) in reason


@needs_gxx
def test_unavailable_without_nvrtc(cpm):
    sys.modules["cpm_kernels.library"].nvrtc.version = (0, 0)
    assert "CUDA_PATH" in quantization_cpm.unavailable(CUDA)
