"""The C kernels: their layout, their determinism, and how they are compiled and cached."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chatglm2 import quantization_cpu
from chatglm2.quantization import QuantizedLinear
from chatglm2.quantization_format import quantize_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_helpers import CPU, DTYPES, linear_of, make, needs_compiled, use
from torch import nn


@needs_compiled
@given(st.integers(1, 100), st.integers(1, 300), st.sampled_from([4, 8]), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_layout_reorders_the_released_packing(out, k, bits, seed):
    """The C code and the plain torch beside it, there and back."""
    k = 2 * k if bits == 4 else k
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (out, k * bits // 8), dtype=torch.int8, generator=generator)
    layout = quantization_cpu.to_layout(weight, bits)
    assert layout.dtype == torch.int8 and layout.shape == quantization_cpu.layout_shape(out, k, bits)
    assert torch.equal(layout, quantization_cpu.to_layout_reference(weight, bits))
    assert torch.equal(quantization_cpu.from_layout(layout, out, k, bits), weight)
    assert torch.equal(quantization_cpu.from_layout_reference(layout, out, k, bits), weight)


@needs_compiled
@pytest.mark.parametrize("kernel", ["cpu", "cpu: avx2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_rounded_as_the_reference_rounds_them(kernel, dtype, bits):
    """Bit for bit: from subnormal numbers to the largest, ties, rows of zeros, groups, and what is left of 16."""
    shapes = [(1, 2, None), (33, 130, None), (9, 300, 10), (64, 256, 32), (5, 48, 2), (3, 0, None)]
    with use(kernel):
        for out, k, group_size in shapes:
            dense = torch.randn(out, k, generator=torch.Generator().manual_seed(k))
            dense *= torch.logspace(-45, 4, out)[:, None]
            dense[out // 2] = 0
            dense[-1] = torch.arange(k).clamp_max(14) / 2  # a scale of 1: ties
            weight = dense.to(dtype).nan_to_num(posinf=0, neginf=0)
            got, want = quantization_cpu.quantize(weight, bits, group_size), quantize_weight(weight, bits, group_size)
            assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(got, want))
        turned = torch.randn(64, 32).to(dtype).t()
        assert torch.equal(quantization_cpu.quantize(turned, bits, None)[0], quantize_weight(turned, bits)[0])
        for wrong in ("nan", "inf", "-inf"):
            weight = torch.ones(4, 32, dtype=dtype).index_fill(1, torch.tensor([31]), float(wrong))
            with pytest.raises(ValueError, match="nan or inf"):
                quantization_cpu.quantize(weight, bits, 16)


@needs_compiled
def test_results_do_not_depend_on_the_batch():
    x, *rest = make(29, 512, 96, 4, torch.bfloat16)
    linear = linear_of("cpu")
    together = linear(x, *rest)
    for i in (0, 11, 12, 24, 28):
        assert torch.equal(linear(x[i : i + 1], *rest)[0], together[i])


@needs_compiled
def test_threads_do_not_change_the_result():
    before = torch.get_num_threads()
    for dtype in DTYPES:
        arguments, results = make(3, 384, 200, 4, dtype), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(linear_of("cpu")(*arguments))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


STACK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from chatglm2 import quantization_cpu
torch.set_num_threads(2)
weight, scale = torch.full((64, 1 << 20), 0x11, dtype=torch.int8), torch.ones(64, 1 << 16)
layout = quantization_cpu.to_layout(weight, 4)
for dtype in (torch.float32, torch.float16):
    x = torch.zeros(1, 1 << 21, dtype=dtype)
    x[:, -3:] = 1
    assert (quantization_cpu.linear(x, layout, scale, None, 4) == 3).all()
"""


@needs_compiled
def test_the_stack_does_not_hold_the_scales_of_a_checkpoint():
    """65,536 groups a row, in threads of 16 KiB."""
    environment = {**os.environ, "OMP_STACKSIZE": "16k"}
    lib = Path(__file__).parents[1] / "lib"
    assert subprocess.run([sys.executable, "-c", STACK, str(lib)], env=environment).returncode == 0


# Compiling

PROGRAM = """
import sys, types, warnings
package = types.ModuleType("chatglm2"); package.__path__ = [sys.argv[1]]; sys.modules["chatglm2"] = package
import torch
from chatglm2 import quantization

def runtimes():  # torch's, and on some releases of transformers sentencepiece's
    maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
    return {line.split()[-1] for line in maps.splitlines() if any(n in line for n in ("libgomp", "libiomp", "libomp"))}

before = runtimes()
torch.manual_seed(0)
linear = torch.nn.Linear(64, 40)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layers = [quantization.QuantizedLinear.from_linear(linear, 4) for _ in range(2)]
    y = [layer(torch.ones(2, 64)) for layer in layers][0]
name = quantization.choose("auto", torch.device("cpu"))
print(name, [str(w.message) for w in caught], y.sum().item(), len(runtimes() - before), sep="|")
"""


def start(folder, **environment):
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), **environment}
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parents[1])]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process):
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    return output.strip().split("|")


@needs_compiled
def test_processes_may_compile_concurrently_and_share_the_library(tmp_path):
    results = [finish(process) for process in [start(tmp_path), start(tmp_path)]]
    folder = tmp_path / "chatglm2"
    (library,) = folder.iterdir()  # one file, and no partial ones
    assert folder.stat().st_mode & 0o077 == 0
    made = library.stat().st_mtime_ns
    results.append(finish(start(tmp_path)))
    assert library.stat().st_mtime_ns == made
    assert all(result == results[0] for result in results)
    name, messages, _, runtimes = results[0]
    assert (name, messages, runtimes) == ("cpu", "[]", "0")  # no OpenMP runtime of its own


def test_without_a_compiler_results_are_right_after_one_warning(tmp_path):
    name, messages, total, _ = finish(start(tmp_path, CC="/nowhere/gcc"))
    assert name == "stock"
    assert messages.count("run slower") == 1
    if sys.platform == "linux" and quantization_cpu.unavailable(CPU) is None:
        assert "install gcc" in messages
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(nn.Linear(64, 40), 4, backend="torch")
    assert float(total) == pytest.approx(layer(torch.ones(2, 64)).sum().item(), abs=1e-3)


@needs_compiled
def test_CC_with_options(tmp_path):
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("gcc") or shutil.which("cc")]
    name, messages, *_ = finish(start(tmp_path, CC=shlex.join([*compiler, "-m64"])))
    assert (name, messages) == ("cpu", "[]")
