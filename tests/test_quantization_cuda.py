"""The GPU kernels, held to their reference without a GPU.

- Triton: the kernels run in Triton's interpreter (a subprocess: this very file, as a program), and are compiled ahead
  of time down to machine code for several generations of cards.
- CUDA C: the same source that NVRTC gets is compiled by g++ on top of `cuda_on_cpu.h` and run through `linear` itself,
  with stand-ins for cpm_kernels' NVRTC binding and launcher. nvcc, and NVRTC where it is installed, compile it.

Nothing here measures speed.
"""

import contextlib
import ctypes
import importlib.metadata
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))  # as a program it has no conftest.py
from chatglm2 import quantization_cpm, quantization_triton
from chatglm2.quantization_format import dequantize_weight, quantize_weight

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HALF_ULP = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}
FLOAT32_SUM = 2**-20  # what float32 sums may lose, of the sum of the terms' magnitudes

try:
    triton_version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
except importlib.metadata.PackageNotFoundError:
    triton_version = (0, 0)
# the kernels need 3.2; the interpreter of earlier ones than 3.4 has not been tried
needs_triton = pytest.mark.skipif(triton_version < (3, 4), reason="Triton 3.4 is not installed: pip install triton")
cpm_kernels = importlib.util.find_spec("cpm_kernels")  # found, not imported: that needs a driver
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def make(rows, columns, out, bits, dtype, group_size=None, bias=True, seed=0):
    """(x, weight, weight_scale, bias, bits) for `linear`: a row of zeros and a large one among them."""
    torch.manual_seed(seed)
    dense = torch.randn(out, columns)
    dense[0] = 0
    dense[-1] *= 30
    weight, scale = quantize_weight(dense.to(dtype), bits, group_size)
    return torch.randn(rows, columns).to(dtype), weight, scale, torch.randn(out).to(dtype) if bias else None, bits


def error(y, x, weight, weight_scale, bias, bits, ulps=0.5):
    """Of y, against float64 from the same integers and scales, beyond the rounding of y itself to `ulps` of its dtype.

    It is relative to the sum of the magnitudes of the terms, so that one wrong weight of thousands shows.
    """
    w = dequantize_weight(weight, weight_scale.double(), bits, torch.float64)
    b = torch.zeros(w.shape[0]).double() if bias is None else bias.double()
    exact = x.double() @ w.T + b
    rounding = HALF_ULP[y.dtype] * 2 * ulps * exact.abs() + (2**-25 if y.dtype == torch.float16 else 0)  # subnormals
    beyond = (y.double() - exact).abs() - rounding
    return (beyond / (x.double().abs() @ w.abs().T + b.abs()).clamp_min(1e-30)).max().item()


# ---- Triton: values, in the interpreter -----------------------------------------------------------------------------

# name -> (rows, columns, out); a case's shape goes on with bits, dtype, group_size, bias
SHAPES = {
    "one row": (1, 416, 21),
    "one row, columns beyond a block": (1, 1536, 9),
    "three rows": (3, 416, 37),
    "sixteen rows": (16, 224, 33),
    "seventeen rows": (17, 224, 33),
    "odd everything": (70, 90, 71),
}
CASES = {
    f"int{bits} {str(dtype)[6:]} {name}{' groups of ' + str(group) if group else ''}": dict(
        shape=(*shape, bits, str(dtype)[6:], group, bias)
    )
    for bits in (4, 8)
    for dtype in DTYPES
    for name, shape in SHAPES.items()
    for group, bias in ((None, True), (32, False))
    if shape[1] % (group or 1) == 0 and (dtype == torch.bfloat16 or "sixteen" not in name)
}
CASES |= {
    f"int4 groups of {group}, {rows} rows": dict(shape=(rows, 384, 18, 4, "float16", group, True))
    for group in (2, 96, 384)
    for rows in (1, 2, 20)
}
CASES["more rows than are fused"] = dict(shape=(300, 32, 70, 4, "float16", None, True))
CASES["more rows than are fused, groups of 32, int8"] = dict(shape=(300, 64, 70, 8, "bfloat16", 32, True))
TILES = {  # others than the ones in use, which `benchmarks gpu --only tune` may find to be faster
    "skinny": (7, [(8, 16, 128, 4, 4, 3), (16, 64, 32, 2, 2, 2), (8, 64, 64, 8, 8, 3), (8, 16, 256, 1, 1, 2)]),
    "tile": (40, [(32, 64, 64, 1, 4, 3), (64, 32, 128, 1, 4, 3), (128, 128, 32, 1, 8, 3)]),
}
CASES |= {
    f"int{bits}, {kernel} in tiles of {tile}": dict(shape=(rows, 576, 70, bits, "float16", group, True), tile=tile)
    for kernel, (rows, tiles) in TILES.items()
    for tile in tiles
    for bits, group in ((4, 64), (8, None))
}


def tolerance(name):
    """What `error` may be: of float32 sums, and of weights that are rounded to x's dtype before they are multiplied.

    Grouped weights are, in half precision, and those that torch multiplies; the interpreter cuts bfloat16 off.
    """
    rows, _, _, _, dtype, group, _ = CASES[name]["shape"]
    rounded = dtype != "float32" and (group or rows > quantization_triton.FUSED_ROWS) or dtype == "float32" and rows > 1
    return FLOAT32_SUM + (2 * HALF_ULP[getattr(torch, dtype)] if rounded else 0)


def interpret() -> dict:
    """Case -> error, of every case; and what else a result must be. Runs where TRITON_INTERPRET=1."""
    import numpy
    import triton.language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):  # the interpreter holds bfloat16 as its bits, and multiplies those
        def widen(handle):
            if handle.dtype.scalar != triton.language.bfloat16:
                return handle
            return TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), triton.language.float32)

        return original(self, widen(a), widen(b), *rest)

    InterpreterBuilder.create_dot = create_dot
    results = {}
    tile_for = quantization_triton.tile_for
    for name, case in CASES.items():
        tile = case.get("tile")
        chosen = tile_for if tile is None else lambda *_, tile=tile: quantization_triton.Tile(*tile)
        quantization_triton.tile_for = chosen
        quantization_triton.plan.cache_clear()
        rows, columns, out, bits, dtype, group, bias = case["shape"]
        arguments = make(rows, columns, out, bits, getattr(torch, dtype), group, bias)
        y = quantization_triton.linear(*arguments)
        assert y.dtype == arguments[0].dtype and y.shape == (rows, out)
        results[name] = error(y, *arguments, ulps=1 if y.dtype == torch.bfloat16 else 0.5)  # it cuts bfloat16 off
    x, weight, scale, bias, bits = make(3, 64, 5, 4, torch.float16)
    results["no rows"] = list(quantization_triton.linear(x[:0], weight, scale, bias, bits).shape)
    flat = torch.cat([x.flatten()[:1], x.flatten()])
    shifted = flat[1:].view(3, 64)  # contiguous, yet its pairs of columns are not aligned
    y = quantization_triton.linear(shifted, weight, scale, bias, bits)
    results["odd offset"] = error(y, x, weight, scale, bias, bits)
    huge = quantization_triton.linear(x.float() * 1e30, weight, scale.float(), None, bits)
    results["huge"] = error(huge, x.float() * 1e30, weight, scale.float(), None, bits)
    results["other dtypes of scale and bias"] = error(
        quantization_triton.linear(x, weight, scale.float(), bias.float(), bits), x, weight, scale, bias, bits
    )
    return results


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_triton_values(interpreted, name):
    assert interpreted[name] < tolerance(name)


@needs_triton
def test_triton_edges(interpreted):
    assert interpreted["no rows"] == [0, 5]
    for name in ("odd offset", "other dtypes of scale and bias", "huge"):
        assert interpreted[name] < FLOAT32_SUM


# ---- Triton: machine code, ahead of time ----------------------------------------------------------------------------


def compile_triton(capability, rows, bits, dtype, group=0):
    """(kernel's name, its Tile, the build) that `quantization_triton` chooses, for a card that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernels, width, out = quantization_triton.kernels(), 2048, 4096
    name, launch = quantization_triton.plan(rows, out, width, bits, dtype, group, torch.device("cpu"))
    constants = launch.keywords
    if "PTX" in constants:
        constants = {**constants, "PTX": quantization_triton.PTX[bits, dtype]}
    options = {key: constants[key] for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    kernel, pointer = kernels[name], {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types_ = {key: pointer for key in ("x_ptr", "scale_ptr", "bias_ptr", "y_ptr")} | {"weight_ptr": "*i8"}
    types_ |= dict(rows="i32", width="i32", out="i32", has_bias="i32")
    names = kernel.arg_names
    signature = {n: types_.get(n, "constexpr") for n in names}
    aligned = [n for n in names if n.endswith("_ptr") or n in ("width", "out")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    constants = {(names.index(n),): value for n, value in constants.items() if n not in options}
    source = ASTSource(kernel, signature, constants, attributes)
    built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return name, quantization_triton.tile_for(name, rows, out, bits), built


@needs_triton
@pytest.mark.parametrize("capability", (75, 80, 90, 120))
def test_triton_compiles_for_the_card(capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, rows, bits, dtype, group in (
        ("matvec", 1, 4, torch.float32, 0),
        ("skinny", 1, 4, torch.float16, 0),
        ("skinny", 16, 8, torch.bfloat16, 32),
        ("tile", 100, 4, torch.bfloat16, 0),
    ):
        if capability < 80 and name != "matvec":
            continue  # as `has_tensor_cores` says
        named, _, built = compile_triton(capability, rows, bits, dtype, group)
        assert named == name
        assert built.asm["cubin"][:4] == b"\x7fELF"
        assert built.metadata.shared <= 99 << 10  # what a block may have on a card for games
        ptx = built.asm["ptx"]
        assert not re.search(r"cvt\.rn\.f32\.[su]", ptx)  # no integer is converted
        if name == "matvec":  # the weight comes in runs of 16 bytes
            assert re.search(r"ld\.global\.L1::evict_first[\w.:]*v4\.b32", ptx)
        else:
            assert "mma" in ptx
            assert re.search(r"cp\.async\.cg\.shared\.global[^;]*, 0x10,", ptx)  # in runs of 16 bytes


@pytest.mark.parametrize("bits, dtype", quantization_triton.PTX)
def test_instructions_are_exact(bits, dtype):
    """PTX's instructions for 4 bytes of a weight, run in numpy on every byte; nothing may be rounded on the way."""
    import numpy

    words = numpy.concatenate([numpy.roll(numpy.arange(256, dtype=numpy.uint8), i) for i in range(4)])
    signed = words.view(numpy.int8)
    wanted = [signed >> 4, (signed << 4) >> 4] if bits == 4 else [signed]
    words = words.view(numpy.uint32)
    held = {"$4" if bits == 4 else "$2": words}

    def value(key):
        return held[key] if key in held else numpy.full_like(words, int(key, 0))

    def floats(word, kind):
        dtype = {"f16x2": torch.float16, "bf16x2": torch.bfloat16, "f32": torch.float32}[kind]
        return torch.from_numpy(word.view(numpy.int32)).view(dtype).double()

    def exactly(values, kind):
        dtype = {"f16x2": torch.float16, "bf16x2": torch.bfloat16, "f32": torch.float32}[kind]
        assert torch.equal(values.to(dtype).double(), values)
        return values.to(dtype).view(torch.int32).numpy().view(numpy.uint32)

    for line in quantization_triton.PTX[bits, dtype].strip("{} \n").split(";"):
        name, _, operands = line.strip().partition(" ")
        name, kind = name.partition(".")[0], name.rpartition(".")[2]
        target, *sources = (part.strip() for part in operands.split(","))
        if name == "prmt":
            taken = numpy.concatenate([value(source).view(numpy.uint8).reshape(-1, 4) for source in sources[:2]], 1)
            taken = taken[:, [int(sources[2], 0) >> 4 * i & 7 for i in range(4)]]
            held[target] = numpy.ascontiguousarray(taken).view(numpy.uint32)[:, 0]
        elif name in ("lop3", "xor", "shr", "mov"):
            assert name != "lop3" or sources.pop() == "0x6a"
            a, b, c = (*map(value, sources), None, None)[:3]
            held[target] = a & b ^ c if name == "lop3" else a ^ b if name == "xor" else a >> b if name == "shr" else a
        elif name in ("fma", "add"):
            a, *b, c = (floats(value(source), kind) for source in sources)
            held[target] = exactly(a * b[0] + c if b else a + c, kind)
        else:
            assert name in ("", "{") or line.strip().startswith(".reg"), line
    for first, columns in zip((0, 2), wanted):
        pairs = [floats(held[f"${i}"], "f16x2" if dtype == torch.float16 else "bf16x2") for i in (first, first + 1)]
        assert (torch.stack([pair.view(-1, 2) for pair in pairs], 1).flatten().numpy() == columns).all()


# ---- CUDA C: values, through `linear`, with g++ standing in for NVRTC and fibers for the card -----------------------

ENTRIES = """
extern "C" void run_matvec(const unsigned* g, const unsigned* b, void** p) { launch(matvec, g, b, p); }
extern "C" void run_dequantize(const unsigned* g, const unsigned* b, void** p) { launch(dequantize, g, b, p); }
"""


class FakeCpm:
    """cpm_kernels' names as 1.0.11 has them; records what it is asked for, and runs the kernels on the CPU."""

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
            assert quantization_cpm.HALF in program.source  # PTX: the header has the same two functions
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
        """cpm_kernels' real `kernels/base.py`, on top of stand-ins for the CUDA driver and runtime."""
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
    """A FakeCpm in the place of cpm_kernels, and torch made to name a card of capability 9.0 and a stream."""
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
def test_cuda_values(cpm, rows, columns, out, bits, dtype, group, kernel, bias):
    arguments = make(rows, columns, out, bits, dtype, group, bias)
    y = quantization_cpm.linear(*arguments)
    assert y.shape == (rows, out) and y.dtype == dtype
    assert cpm.launches[0][0] == kernel
    # for torch's matmul the restored weight is rounded, and on a CPU its half precision sums may be, too
    assert error(y, *arguments) < (FLOAT32_SUM if kernel == "matvec" else 2 * HALF_ULP[dtype])


@needs_gxx
def test_cuda_dequantize_is_the_reference_bit_for_bit(cpm, monkeypatch):
    x, weight, scale, _, bits = make(96, 96, 11, 4, torch.float16, 32)
    x = torch.eye(96, dtype=torch.float16)
    monkeypatch.setattr(quantization_cpm, "PIECE", 4 * 96 * 2)  # 4 rows of the weight at a time: 4, 4, 3
    y = quantization_cpm.linear(x, weight, scale, None, bits)
    assert torch.equal(y.T, dequantize_weight(weight, scale, bits))
    assert [launch[1] for launch in cpm.launches] == [(1, 4, 1), (1, 4, 1), (1, 3, 1)]


@needs_gxx
def test_cuda_call_sequence(cpm):
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
def test_cuda_through_the_launcher_of_cpm_kernels(cpm, monkeypatch):
    cpm.with_its_own_launcher(monkeypatch)
    for rows in (3, 20):
        arguments = make(rows, 64, 6, 4, torch.bfloat16)
        assert error(quantization_cpm.linear(*arguments), *arguments) < (FLOAT32_SUM if rows == 3 else 2**-7)
    assert not cpm.launches  # the stand-in for it was not used


@needs_gxx
def test_cuda_falls_back_to_ptx_for_a_card_nvrtc_does_not_know(cpm):
    cpm.refuse = ("sm_90",)
    arguments = make(1, 64, 6, 4, torch.bfloat16)
    y = quantization_cpm.linear(*arguments)
    assert error(y, *arguments) < FLOAT32_SUM
    assert cpm.options[1][-1] == "--gpu-architecture=compute_75"
    with pytest.raises(RuntimeError, match="capability 6.1"):
        cpm.refuse = ("sm_61",)
        quantization_cpm.build(61, [])


# ---- CUDA C: machine code -------------------------------------------------------------------------------------------


def macros(bits, x, grouped, rows):
    values = dict(BITS=bits, X=x, SCALE=x, GROUPED=grouped, ROWS=rows)
    values |= dict(OUTS=quantization_cpm.OUTS, THREADS=quantization_cpm.THREADS)
    return [f"-D{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def nvcc():
    """(nvcc, the capabilities it compiles for)."""
    path = shutil.which("nvcc")
    if path is None:
        pytest.skip("nvcc is not installed")
    listed = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return path, sorted(int(number) for number in re.findall(r"compute_(\d+)\b", listed))


@pytest.mark.parametrize("bits, x, grouped, rows", [(4, "half", 0, 1), (4, "bfloat16", 1, 8), (8, "float", 1, 1)])
def test_nvcc_compiles_for_every_card(nvcc, tmp_path, bits, x, grouped, rows):
    path, capabilities = nvcc
    capabilities = [c for c in capabilities if c in (75, 80, 86, 89, 90, 100, 120)]
    assert {75, 80, 90} <= set(capabilities)
    if 120 not in capabilities:
        pytest.skip(f"this nvcc compiles for {capabilities}, not for all of 75 to 120")
    if x != "half":  # every card once, the oldest and the newest for the other types: it takes a while
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
    sys.modules[name] = types.ModuleType(name)  # not their __init__: cpm_kernels' wants a driver
    sys.modules[name].__path__ = [path]
sys.path.insert(0, root + "/lib")
from chatglm2.quantization_cpm import build
for arch, macros in json.loads(sys.argv[4]):
    print(json.dumps([arch, build(arch, macros)[:4].decode("latin1")]))
"""


def test_nvrtc_compiles_through_the_binding_of_cpm_kernels():
    """The real binding and the real NVRTC, which needs no GPU."""
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
        assert magic == ("//\n/" if arch == 999 else "\x7fELF")  # PTX for a card that NVRTC does not know


# ---- where they cannot run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", (quantization_triton, quantization_cpm))
@pytest.mark.parametrize("device", ("cpu", "mps", "meta"))
def test_unavailable_on_other_devices(module, device):
    reason = module.unavailable(torch.device(device))
    assert device in reason and "\n" not in reason


def test_importing_the_files_imports_neither_library():
    code = "import sys; sys.path.insert(0, sys.argv[1] + '/lib')\n"
    code += "from chatglm2 import quantization_cpm, quantization_triton\n"
    code += "assert not {'triton', 'cpm_kernels'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", (quantization_triton, quantization_cpm))
def test_unavailable_without_a_gpu(module):
    reason = module.unavailable(CUDA)
    assert reason and "\n" not in reason


def test_unavailable_triton_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in quantization_triton.unavailable(CUDA)


@pytest.mark.parametrize("arch, reason", [(70, "7.0"), (75, None), (120, None)])
def test_unavailable_triton_by_card(monkeypatch, arch, reason):
    active = types.SimpleNamespace(get_current_target=lambda: types.SimpleNamespace(backend="cuda", arch=arch))
    runtime = types.SimpleNamespace(driver=types.SimpleNamespace(active=active))
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.9.0", runtime=runtime))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    answer = quantization_triton.unavailable(CUDA)
    assert answer is None if reason is None else reason in answer


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
def test_unavailable_names_the_cure(monkeypatch, failure, cure):
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


if __name__ == "__main__":
    print(json.dumps(interpret()))
