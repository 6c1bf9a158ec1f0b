"""The released format, the quantized layers and the CPU kernels, each held to plain torch in float32 or float64."""

import copy
import functools
import io
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from chatglm2 import quantization, quantization_cpu
from chatglm2.quantization import (
    QuantizedLinear,
    choose,
    dequantize_weight,
    pack,
    quantize_weight,
    quantized_linear,
    reference_linear,
    unpack,
)
from conftest import c_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

GOLDEN = Path(__file__).parent / "golden" / "quantization.safetensors"
SHARED_GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "quant_shared.safetensors"
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_compiled = pytest.mark.skipif(
    quantization_cpu.unavailable(CPU) is not None, reason=f"no compiled kernel: {quantization_cpu.unavailable(CPU)}"
)
KERNELS = [
    *(pytest.param(name, marks=needs_compiled) for name in ("cpu", "cpu: avx2", "cpu: avxvnni")),
    "stock",
    "torch",
]
# Inputs rounded to int8, in groups of 128 (a token as a whole in "stock"), and the output's own rounding
ERROR = {torch.float32: 1e-5, torch.float16: 1.2e-2, torch.bfloat16: 1.4e-2}


@functools.lru_cache(None)
def library(kind):
    """The C kernels for CPUs of another kind; AVX-VNNI's instruction is played by AVX512's of 256 bits."""
    if kind == "avx2":
        return c_kernels("avx2")
    played = "-D__AVXVNNI__", "-D_mm256_dpbusd_avx_epi32=_mm256_dpbusd_epi32"
    return c_kernels("avx2", *quantization_cpu.AVX512.values(), *played)


def linear_of(kernel):
    """The function of a kernel family on weights in its layout, the C kernels' for this CPU or for another kind."""
    name, _, kind = kernel.partition(": ")
    family = quantization.family(name)

    def linear(x, weight, weight_scale, bias, bits):
        group_size = None if weight_scale.dim() == 1 else x.shape[1] // weight_scale.shape[1]
        weight = family.laid_out(weight, x.shape[1], bits, group_size)
        return family.linear(x, weight, weight_scale, bias, bits)

    if not kind:
        return linear
    if kind == "avxvnni" and quantization_cpu.instructions()[0][0] != "avx512":
        pytest.skip("this CPU has no VNNI instruction of 256 bits")

    loaded = library(kind)

    def linear_of_that_kind(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantization_cpu, "load_library", lambda: loaded)
            return linear(*arguments)

    return linear_of_that_kind


def make(n, k, out, bits, dtype, group_size=None, bias=True, seed=0):
    """(x [n, k], weight, weight_scale, bias, bits), a row of zeros and a large one among the weights."""
    torch.manual_seed(seed)
    dense = torch.randn(out, k)
    if out > 1:
        dense[0] = 0
        dense[-1] *= 30
    weight, scale = quantize_weight(dense.to(dtype), bits, group_size)
    return torch.randn(n, k).to(dtype), weight, scale, torch.randn(out).to(dtype) if bias else None, bits


def relative_error(y, x, weight, weight_scale, bias, bits):
    """The root mean square of y's error, relative to what a sum of so many terms of such sizes comes to."""
    w = dequantize_weight(weight, weight_scale, bits, torch.float64)
    b = torch.zeros(len(w)) if bias is None else bias.double()
    typical = x.double().norm(dim=1)[:, None] * w.norm(dim=1) / w.shape[1] ** 0.5 + b.abs()
    error = (y.double() - x.double() @ w.t() - b).abs()
    assert not error[typical == 0].any()
    return (error / typical.clamp_min(1e-300)).square().mean().sqrt().item()


# ---- the format ----


@pytest.mark.parametrize("path", [GOLDEN, SHARED_GOLDEN], ids=["carried", "shared"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_golden_matrices(path, bits, dtype):
    if not path.exists():
        pytest.skip(f"{path} is not here: it lies beside the repository where the project is developed")
    golden = load_file(path)
    weight, scale = quantize_weight(golden[f"{dtype}.weight"], bits)
    want, want_scale = golden[f"{dtype}.int{bits}.weight"], golden[f"{dtype}.int{bits}.weight_scale"]
    rows = want_scale != 0
    same = weight == want
    if (bits, dtype) == (8, "bf16"):  # the original let 128 wrap round to -128
        assert (weight[want == -128].abs() == 127).all()
        same |= want == -128
    assert same[rows].all()
    assert torch.equal(scale, want_scale)
    assert weight[~rows].eq(0).all()
    if (bits, dtype) != (8, "bf16"):
        torch.testing.assert_close(
            dequantize_weight(weight, scale, bits)[rows], golden[f"{dtype}.int{bits}.dequant"][rows], rtol=0, atol=0
        )


@given(st.integers(1, 9), st.integers(0, 40), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_pack_and_unpack_are_inverse(out, half, random):
    q = torch.tensor([[random.randint(-8, 7) for _ in range(2 * half)] for _ in range(out)], dtype=torch.int8)
    q = q.view(out, 2 * half)
    packed = pack(q)
    assert packed.dtype == torch.int8 and packed.shape == (out, half)
    assert torch.equal(unpack(packed), q)
    for j in range(half):
        assert packed[0, j].item() & 255 == (q[0, 2 * j].item() & 15) << 4 | (q[0, 2 * j + 1].item() & 15)


@given(
    st.integers(1, 12),
    st.integers(1, 70),
    st.sampled_from([4, 8]),
    st.sampled_from(DTYPES),
    st.sampled_from([1e-30, 1e-6, 1.0, 1e4]),
    st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rounding_is_within_half_a_step(out, k, bits, dtype, size, seed):
    k = 2 * k if bits == 4 else k
    generator = torch.Generator().manual_seed(seed)
    dense = (torch.randn(out, k, generator=generator) * size).to(dtype)
    dense[0] = 0
    weight, scale = quantize_weight(dense.t().contiguous().t(), bits)  # by columns: not contiguous
    assert weight.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (out,)
    restored = dequantize_weight(weight, scale, bits, torch.float64)
    assert restored.isfinite().all() and not restored[0].any()
    # half a step, and what the dtype loses of a quotient of up to 127; where the scale itself has few bits left
    # (subnormal numbers), up to the largest weight
    slack = 0.5 + 127 * torch.finfo(dtype).eps if bits == 8 else 0.5 + 7 * torch.finfo(dtype).eps
    step = scale.double()[:, None] * slack
    tiny = scale.double()[:, None] < torch.finfo(dtype).tiny * 128
    error = (restored - dense.double()).abs()
    assert ((error <= step * 1.01) | (tiny & (error <= dense.double().abs().amax(1, keepdim=True)))).all()


def test_a_quotient_that_bfloat16_rounds_up_to_128_keeps_its_sign():
    torch.manual_seed(0)
    dense = torch.randn(2000, 256).bfloat16()
    assert (dense / (dense.abs().amax(1, keepdim=True) / 127)).round().abs().max() == 128  # it happens
    weight, _ = quantize_weight(dense, 8)
    largest = dense.float().abs().argmax(1, keepdim=True)
    assert (weight.gather(1, largest).sign() == dense.gather(1, largest).sign()).all()


@pytest.mark.parametrize("group_size, least", [(None, 0.13), (128, 0.105), (32, 0.08)])
def test_smaller_groups_round_int4_more_finely(group_size, least):
    torch.manual_seed(0)
    dense = torch.randn(64, 4096)
    weight, scale = quantize_weight(dense, 4, group_size)
    assert scale.shape == ((64,) if group_size is None else (64, 4096 // group_size))
    error = (dequantize_weight(weight, scale, 4) - dense).norm() / dense.norm()
    assert least < error < least + 0.05


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w: quantize_weight(w, 3), "bits=3.*8 or 4"),
        (lambda w: quantize_weight(w[:, :7], 4), "in_features=7 is odd.*skip="),
        (lambda w: quantize_weight(w, 4, 3), "group_size=3.*in_features=8"),
        (lambda w: quantize_weight(w, 8, 16), "group_size=16.*in_features=8"),
        (lambda w: quantize_weight(w / 0, 8), "nan or inf"),
        (lambda w: choose("cuda9", CPU), "backend='cuda9'.*auto, triton, cpm, cpu, stock or torch"),
        (lambda w: choose("triton", CPU), "backend='triton' cannot run on cpu: "),
        (lambda w: choose("cpm", CPU), "backend='cpm' cannot run on cpu: "),
        (lambda w: choose("cpu", torch.device("meta")), "backend='cpu' cannot run on meta: .*\\.cpu\\(\\)"),
    ],
)
def test_what_cannot_be_done_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 8))


# ---- the kernels ----


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_kernels_agree_with_the_reference(kernel, dtype, bits):
    linear = linear_of(kernel)
    shapes = [
        (1, 2, 1),
        (2, 34, 5),
        (5, 130, 33),
        (3, 256, 64),
        (9, 96, 31),
        (13, 1024, 96),
        (26, 418, 70),
        (4, 128, 32),
    ]
    shapes += [] if bits == 4 else [(1, 1, 1), (5, 7, 3), (8, 129, 34)]
    for seed, (n, k, out) in enumerate(shapes):
        arguments = make(n, k, out, bits, dtype, bias=seed % 2 == 0, seed=seed)
        y = linear(*arguments)
        assert y.shape == (n, out) and y.dtype == dtype and y.is_contiguous()
        limit = ERROR[dtype] if k > 16 else 3e-2  # of a few terms each error counts
        assert relative_error(y, *arguments) < limit, (n, k, out)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, 64), (4, 128), (8, 128), (4, 256), (4, 6)])
def test_kernels_take_groups(kernel, bits, group_size):
    linear = linear_of(kernel)
    for dtype in DTYPES:
        for n in (1, 6, 14):
            arguments = make(n, 3 * group_size, 40, bits, dtype, group_size)
            assert relative_error(linear(*arguments), *arguments) < max(
                ERROR[dtype], 2e-2 * (group_size == 6 and dtype != torch.float32)
            )


@pytest.mark.parametrize("kernel", KERNELS)
@given(
    n=st.integers(0, 40),
    columns=st.integers(9, 90),
    out=st.integers(1, 130),
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from(DTYPES),
    group_size=st.sampled_from([None, None, 32, 64]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_kernels_agree_on_any_shape(kernel, n, columns, out, bits, dtype, group_size, seed):
    k = columns * 2 if group_size is None else group_size * (columns // 9)
    arguments = make(n, k, out, bits, dtype, group_size, seed=seed)
    y = linear_of(kernel)(*arguments)
    assert y.shape == (n, out) and y.dtype == dtype
    assert n == 0 or relative_error(y, *arguments) < 1.5 * ERROR[dtype]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_that_stand_out_cost_little(kernel, dtype):
    """8 channels of 30 times the size, as these models have."""
    for n in (1, 20):
        x, *rest = make(n, 2048, 64, 8, dtype)
        x[:, torch.randperm(2048, generator=torch.Generator().manual_seed(1))[:8]] *= 30
        assert relative_error(linear_of(kernel)(x, *rest), x, *rest) < (1e-5 if dtype == torch.float32 else 3.5e-2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7])
def test_huge_tiny_and_zero_inputs(kernel, dtype, n):
    linear = linear_of(kernel)
    x, weight, scale, bias, bits = make(n, 256, 33, 4, dtype)
    assert torch.equal(linear(torch.zeros_like(x), weight, scale, bias, bits), bias.expand(n, -1))
    large = 50 if dtype == torch.float16 else 1e30
    for size in (large, 1e-6, 1e-30):
        scaled = (x.double() * size).to(dtype)
        y = linear(scaled, weight, scale, None, bits)
        assert y.isfinite().all()
        want = reference_linear(scaled.double(), weight, scale.double(), None, bits)
        tiny = torch.finfo(dtype).tiny if dtype == torch.float16 else 0
        assert (y.double() - want).norm() <= 3e-2 * want.norm() + tiny * want.numel() ** 0.5


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_are_not_hidden(kernel, dtype):
    for n in (1, 6, 20):
        for bad in (float("nan"), float("inf")):
            x, *rest = make(n, 256, 33, 8, dtype)
            x[0, 200] = bad
            y = linear_of(kernel)(x, *rest)
            assert not y[0, 1:].isfinite().any() and y[1:].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_products_do_not_overflow(kernel, bits):
    """Weights of -128 or -8 and inputs of one sign, whatever the kernel sums in between."""
    weight = torch.full(
        (40, 512 * bits // 8), -128 if bits == 8 else -0x78, dtype=torch.int8
    )  # -0x78: two nibbles of -8
    for n in (1, 4, 20):
        arguments = (torch.full((n, 512), 3.0).half(), weight, torch.full((40,), 0.01).half(), None, bits)
        assert relative_error(linear_of(kernel)(*arguments), *arguments) < 2e-2


@pytest.mark.parametrize("kernel", [pytest.param("cpu", marks=needs_compiled), "stock", "torch"])
def test_empty_batches_and_odd_shapes_of_the_input(kernel):
    layer = QuantizedLinear.from_linear(nn.Linear(64, 24), 4, backend=kernel)
    assert layer(torch.empty(0, 64)).shape == (0, 24)
    assert layer(torch.empty(2, 0, 64)).shape == (2, 0, 24)
    x = torch.randn(64, 5, 3).transpose(0, 2)  # (3, 5, 64), not contiguous
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]), rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x.bfloat16()).dtype == torch.bfloat16  # the input's dtype, whatever the scales' is


@pytest.mark.parametrize("kernel", [pytest.param("cpu", marks=needs_compiled), "stock", "torch"])
@pytest.mark.parametrize("bits", [8, 4])
def test_an_input_of_another_width_or_dtype_is_refused(kernel, bits):
    """No kernel reads past the input or the weight: the layer and the op refuse, before and after laying out."""
    layer = QuantizedLinear.from_linear(nn.Linear(64, 64), bits, backend=kernel)
    for _ in range(2):
        for width in (1, 32, 96, 130, 1 << 22):
            with pytest.raises(ValueError, match=f"has {width} channels.*in_features=64"):
                layer(torch.ones(2, width))
        for width in (130, 1 << 22):
            with pytest.raises(ValueError, match=f"has {width} channels"):
                quantization.op(torch.ones(2, width), layer.weight, layer.weight_scale, None, bits, kernel)
        for dtype in (torch.int64, torch.bool):
            with pytest.raises(ValueError, match=f"the input is {dtype}.*float32"):
                layer(torch.ones(2, 64, dtype=dtype))
        layer(torch.ones(2, 64))
        assert kernel != "cpu" or layer.weight.dim() == 3


@needs_compiled
@given(st.integers(1, 100), st.integers(1, 300), st.sampled_from([4, 8]), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_the_layout_is_the_released_packing_in_another_order(out, k, bits, seed):
    k = 2 * k if bits == 4 else k
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (out, k * bits // 8), dtype=torch.int8, generator=generator)
    layout = quantization_cpu.to_layout(weight, bits)
    assert layout.dim() == 3
    assert torch.equal(quantization_cpu.from_layout(layout, out, k, bits), weight)


@needs_compiled
def test_a_token_computes_the_same_alone_and_among_others():
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


# ---- compiling the kernel ----

PROGRAM = """
import sys, types, warnings
package = types.ModuleType("chatglm2"); package.__path__ = [sys.argv[1]]; sys.modules["chatglm2"] = package
import torch
from chatglm2 import quantization, quantization_cpu
torch.manual_seed(0)
linear = torch.nn.Linear(64, 40)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layers = [quantization.QuantizedLinear.from_linear(linear, 4) for _ in range(2)]
    y = [layer(torch.ones(2, 64)) for layer in layers][0]
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
runtimes = {line.split()[-1] for line in maps.splitlines() if any(n in line for n in ("libgomp", "libiomp", "libomp"))}
name = quantization.choose("auto", torch.device("cpu"))
print(name, [str(w.message) for w in caught], y.sum().item(), len(runtimes), sep="|")
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
def test_two_processes_may_compile_at_once_and_share_what_they_made(tmp_path):
    results = [finish(process) for process in [start(tmp_path), start(tmp_path)]]
    folder = tmp_path / "chatglm2"
    (library,) = folder.iterdir()  # one file, and no half-written ones
    assert folder.stat().st_mode & 0o077 == 0
    made = library.stat().st_mtime_ns
    results.append(finish(start(tmp_path)))
    assert library.stat().st_mtime_ns == made
    assert all(result == results[0] for result in results)
    name, messages, _, runtimes = results[0]
    assert (name, messages, runtimes) == ("cpu", "[]", "1")  # one OpenMP runtime: torch's


def test_without_a_compiler_one_warning_and_the_same_values(tmp_path):
    name, messages, total, _ = finish(start(tmp_path, CC="/nowhere/gcc"))
    assert name == "stock"
    assert messages.count("run slower") == 1
    if sys.platform == "linux" and quantization_cpu.unavailable(CPU) is None:
        assert "install gcc" in messages
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(nn.Linear(64, 40), 4, backend="torch")
    assert float(total) == pytest.approx(layer(torch.ones(2, 64)).sum().item(), abs=1e-3)


@needs_compiled
def test_the_compiler_may_have_options(tmp_path):
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("gcc") or shutil.which("cc")]
    name, messages, *_ = finish(start(tmp_path, CC=shlex.join([*compiler, "-m64"])))
    assert (name, messages) == ("cpu", "[]")


@needs_compiled
def test_a_cache_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "chatglm2").mkdir()
    (tmp_path / "chatglm2").chmod(0o777)
    folder = quantization_cpu.cache_folder()
    assert not folder.startswith(str(tmp_path / "chatglm2"))
    os.rmdir(folder)


# ---- the op ----


@pytest.mark.skipif(not hasattr(torch.library, "opcheck"), reason="torch.library.opcheck needs torch 2.5")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(backend, gradient):
    x, weight, scale, bias, bits = make(6, 64, 40, 4, torch.float32)
    x.requires_grad_(gradient)
    torch.library.opcheck(quantization.op, (x.view(2, 3, 64), weight, scale, bias, bits, backend))
    torch.library.opcheck(quantization.op, (x, weight, scale, None, bits, backend), test_utils="test_faketensor")


@pytest.mark.parametrize("backend", ["auto", "stock", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, group_size", [(8, None), (4, None), (4, 32)])
def test_the_gradient_is_that_of_the_dequantized_linear(backend, dtype, bits, group_size):
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(nn.Linear(96, 40, dtype=dtype), bits, group_size=group_size, backend=backend)
    x = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    y = layer(x)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    packed = layer.state_dict()["weight"]
    want = grad.double() @ dequantize_weight(packed, layer.weight_scale, bits, torch.float64)
    assert x.grad.dtype == dtype
    assert (x.grad.double() - want).norm() / want.norm() < {torch.float32: 1e-5}.get(dtype, 5e-3)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_the_gradient_survives_a_state_dict_between_forward_and_backward():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 40), 4)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    layer.state_dict()
    y.sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_autocast_casts_the_input_as_it_does_for_a_linear_layer():
    """float32 and float16 inputs become bfloat16, float64 stays; the gradient comes back in the input's dtype."""
    layer = QuantizedLinear.from_linear(nn.Linear(64, 48), 4)
    x = torch.randn(3, 64, requires_grad=True)
    want = layer(x.detach().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(y, want) and layer(x.detach().half()).dtype == torch.bfloat16
        assert layer(x.detach().double()).dtype == torch.float64
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.any()
    assert layer(x).dtype == torch.float32


@pytest.mark.skipif(sys.version_info >= (3, 14) or sys.platform == "win32", reason="torch.compile is not there")
def test_autocast_compiles_without_a_break():
    """Which dtype autocast computes in is known while tracing; a graph made without it is not taken for one with it."""
    layer, x = QuantizedLinear.from_linear(nn.Linear(64, 48), 4), torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert compiled(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y, want = compiled(x), layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)


@pytest.mark.skipif(sys.version_info >= (3, 14) or sys.platform == "win32", reason="torch.compile is not there")
def test_compile_takes_the_op_as_it_is():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 32))
    network = nn.Sequential(*[QuantizedLinear.from_linear(m, 4) if isinstance(m, nn.Linear) else m for m in network])
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64, requires_grad=True)
    torch.testing.assert_close(compiled(x), network(x))
    gradient = torch.autograd.grad(compiled(x).sum(), x)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(network(x).sum(), x)[0])
    network.state_dict()  # puts the released packing back
    torch.testing.assert_close(compiled(x), network(x))


def test_what_watches_a_call_is_told_by_the_op(monkeypatch):
    """Without gradients a layer calls its kernel itself; a gradient, a trace and a mode of torch's get the op."""
    layer, x = QuantizedLinear.from_linear(nn.Linear(64, 32), 8, backend="torch"), torch.randn(2, 64)
    with torch.no_grad():
        assert "quantized_linear" in str(make_fx(lambda x: layer(x))(x).graph)
        assert "chatglm::quantized_linear" in str(torch.jit.trace(layer, x).graph)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(layer(mode.from_tensor(x)), FakeTensor)
    told = []
    monkeypatch.setattr(quantization, "op", lambda *arguments: told.append(arguments) or quantized_linear(*arguments))
    layer(x.requires_grad_())
    assert len(told) == 1
    with torch.no_grad():
        torch.testing.assert_close(layer(x.detach()), layer(x).detach())
    assert len(told) == 2


# ---- the layer ----


@pytest.mark.parametrize("bits, group_size", [(8, None), (4, None), (4, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_is_the_released_format_whatever_was_run_before(bits, group_size, bias):
    linear = nn.Linear(64, 40, bias=bias).half()
    layer = QuantizedLinear.from_linear(linear, bits, group_size=group_size)
    weight, scale = quantize_weight(linear.weight, bits, group_size)
    x = torch.randn(3, 64).half()
    for _ in range(2):
        y = layer(x)
        state = layer.state_dict()
        assert sorted(state) == ["bias"] * bias + ["weight", "weight_scale"]
        assert torch.equal(state["weight"], weight) and torch.equal(state["weight_scale"], scale)
    for assign in (False, True):
        empty = QuantizedLinear(
            64, 40, bits, bias=bias, group_size=group_size, dtype=torch.float16, device="meta" if assign else None
        )
        if not assign:
            empty.state_dict()["weight"].zero_()
            empty(x)  # laid out before it is loaded
        empty.load_state_dict(state, assign=assign)
        assert torch.equal(empty(x), y)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    empty.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(empty(x), y)


def test_there_is_one_copy_of_the_weight():
    layer = QuantizedLinear.from_linear(nn.Linear(256, 256), 4)
    layer(torch.randn(2, 256))
    held = [
        t
        for t in list(layer.parameters())
        + list(layer.buffers())
        + [v for v in vars(layer).values() if torch.is_tensor(v)]
    ]
    assert sum(t.numel() * t.element_size() for t in held) == 256 * 256 // 2 + 2 * 256 * 4


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same(how):
    layer = QuantizedLinear.from_linear(nn.Linear(96, 40), 4, group_size=32)
    x = torch.randn(3, 96)
    y = layer(x)
    other = how(layer)
    assert torch.equal(other(x), y) and torch.equal(layer(x), y)
    assert other.group_size == 32 and other.weight is not layer.weight


@pytest.mark.parametrize("backend", ["auto", "stock"])
@pytest.mark.parametrize("bits", [8, 4])
def test_threads_that_use_a_new_layer_at_once_lay_it_out_once(backend, bits):
    """Whichever comes second finds the layout, and leaves it as it is."""
    layer = QuantizedLinear.from_linear(nn.Linear(256, 192).half(), bits, backend=backend)
    weight, x = layer.weight.clone(), torch.randn(2, 256).half()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: layer(x), range(8)))
    layer.lay_out()
    assert all(torch.equal(y, layer(x)) for y in results)
    assert torch.equal(layer.state_dict()["weight"], weight)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_compiled), "stock"])
def test_what_is_saved_is_released_whatever_another_thread_does(monkeypatch, backend):
    """A forward right after the release, before the state dict is filled or the copy made: both hold the format."""
    layer = QuantizedLinear.from_linear(nn.Linear(64, 64), 4, backend=backend)
    weight, release = layer.weight.clone(), QuantizedLinear._release

    def release_and_lay_out(self):
        released = release(self)
        self.lay_out()
        return released

    layer(torch.randn(2, 64))
    monkeypatch.setattr(QuantizedLinear, "_release", release_and_lay_out)
    saved = layer.state_dict(), layer.state_dict(keep_vars=True), copy.deepcopy(layer)._parameters
    assert all(torch.equal(state["weight"], weight) and state["weight"].shape == weight.shape for state in saved)
    assert list(saved[0]) == ["weight", "weight_scale", "bias"] and isinstance(saved[1]["weight"], nn.Parameter)


def test_casting_moves_the_scale_and_never_the_weight():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 40).half(), 8)
    weight = layer.state_dict()["weight"].clone()
    scale = layer.weight_scale.clone()
    layer(torch.randn(2, 64).half())
    for cast in (lambda m: m.float(), lambda m: m.half(), lambda m: m.cpu()):
        layer = cast(layer)
        assert layer.weight.dtype == torch.int8 and torch.equal(layer.state_dict()["weight"], weight)
    assert torch.equal(layer.weight_scale, scale)  # float16 -> float32 -> float16 loses nothing
    layer.bfloat16()
    assert layer.weight_scale.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight_scale, scale.bfloat16())
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    assert layer.double()(torch.randn(2, 64).double()).dtype == torch.float64


def test_a_float_weight_is_refused_rather_than_truncated():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 40), 8)
    with pytest.raises(RuntimeError, match="weight is torch.float32 in the checkpoint, and int8 is held as torch.int8"):
        layer.load_state_dict(nn.Linear(64, 40).state_dict(), strict=False)


def test_a_float_embedding_is_refused_rather_than_truncated():
    """The int8 embedding is as careful as the linear layers."""
    embedding = quantization.QuantizedEmbedding.from_embedding(nn.Embedding(9, 8))
    with pytest.raises(RuntimeError, match="weight is torch.float32 in the checkpoint"):
        embedding.load_state_dict(nn.Embedding(9, 8).state_dict(), strict=False)


def test_it_says_what_it_is():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 40, bias=False), 4, group_size=32)
    assert repr(layer) == (
        "QuantizedLinear(in_features=64, out_features=40, bias=False, bits=4, group_size=32, backend=auto)"
    )


# ---- the model ----


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_swaps_the_four_layers_of_every_block(make_model, bits, dtype):
    model = make_model().to(dtype)
    weights = {name: layer.weight.detach().clone() for name, layer in linears(model).items()}
    assert model.quantize(bits) is model and model.config.quantization_bit == bits
    assert len(weights) == 12
    for name, layer in linears(model).items():
        assert type(layer) is QuantizedLinear and layer.bits == bits
        packed, scale = quantize_weight(weights[name], bits)
        assert torch.equal(layer.state_dict()["weight"], packed) and torch.equal(layer.weight_scale, scale)
    assert type(model.transformer.output_layer) is nn.Linear
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_every_public_class_quantizes(make_model):
    """The bare network and the classifier, as the one that chats; the classifier's head stays as it is."""
    from chatglm2.modeling_chatglm import ChatGLMForSequenceClassification, ChatGLMModel

    for cls in (ChatGLMModel, ChatGLMForSequenceClassification):
        model = make_model(cls=cls)
        assert model.quantize(4) is model and model.config.quantization_bit == 4
        assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 12
        assert model(torch.tensor([[5, 6, 7]]))[0].isfinite().all()


@pytest.mark.parametrize("option", ["embedding", "output_layer"])
def test_int8_rows_of_the_vocabulary_are_not_resized(make_model, option):
    """An error before anything is changed; without them in int8 both may grow."""
    model = make_model().quantize(4, **{option: True})
    with pytest.raises(ValueError, match=f"new_num_tokens=330: the {option} has 320 rows in int8.*Resize the float"):
        model.resize_token_embeddings(330)
    assert model.get_input_embeddings().num_embeddings == 320 == model.config.padded_vocab_size
    model.resize_token_embeddings(320)
    model = make_model().quantize(4)
    model.resize_token_embeddings(330)
    assert model(torch.tensor([[5, 6, 329]])).logits.shape == (1, 3, 330)


def test_quantize_0_changes_nothing(make_model):
    model = make_model()
    before = {name: id(module) for name, module in model.named_modules()}
    assert model.quantize(0) is model
    assert {name: id(module) for name, module in model.named_modules()} == before and not model.config.quantization_bit


def test_quantize_is_idempotent_and_refuses_other_bits(make_model):
    model = make_model().quantize(4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layers = {name: id(layer) for name, layer in linears(model).items()}
    model.quantize(4)
    assert {name: id(layer) for name, layer in linears(model).items()} == layers
    for bits, options in ((8, {}), (4, {"group_size": 32})):
        with pytest.raises(ValueError, match="already int4 with group_size=None"):
            model.quantize(bits, **options)
    assert model.config.quantization_bit == 4
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("order", ["before", "after"])
def test_quantize_before_and_after_a_cast_are_close(make_model, order):
    ids = torch.randint(3, 320, (2, 7), generator=torch.Generator().manual_seed(0))
    want = make_model()(ids).logits
    model = make_model()
    model = model.quantize(8).bfloat16() if order == "before" else model.bfloat16().quantize(8)
    error = (model(ids).logits.float() - want).norm() / want.norm()
    assert error < 0.06


@pytest.mark.parametrize("spoil", ["nan", "broken"])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(make_model, monkeypatch, spoil):
    model = make_model()
    if spoil == "nan":
        with torch.no_grad():
            model.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight[3, 5] = float("nan")
    else:
        calls = iter(range(100))
        make_one = QuantizedLinear.from_linear.__func__

        def from_linear(cls, *args, **kwargs):
            if next(calls) == 6:
                raise MemoryError("no more")
            return make_one(cls, *args, **kwargs)

        monkeypatch.setattr(QuantizedLinear, "from_linear", classmethod(from_linear))
    before = {name: id(module) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ValueError, MemoryError), match="layers.1.mlp.dense_4h_to_h: the weight holds nan|no more"):
        model.quantize(4, embedding=True)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(v.nan_to_num(), state[n].nan_to_num()) for n, v in model.state_dict().items())
    assert not model.config.quantization_bit and not hasattr(model.config, "quantization_options")


def test_stopped_by_hand_the_config_says_what_is_quantized(make_model, monkeypatch, tmp_path):
    """Ctrl-C between two layers: what there is still saves, and loads into the same layers."""
    calls, make_one = iter(range(100)), QuantizedLinear.from_linear.__func__

    def from_linear(cls, *args, **kwargs):
        if next(calls) == 12 + 6:  # 12 rehearsals, then the seventh layer
            raise KeyboardInterrupt
        return make_one(cls, *args, **kwargs)

    model = make_model()
    monkeypatch.setattr(QuantizedLinear, "from_linear", classmethod(from_linear))
    with pytest.raises(KeyboardInterrupt):
        model.quantize(4)
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 6
    assert model.config.quantization_bit == 4 and len(model.config.quantization_options["skip"]) == 6
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_backend_that_cannot_run_changes_nothing(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu"):
        model.quantize(4, backend="triton")
    assert not any(isinstance(layer, QuantizedLinear) for layer in model.modules())
    with pytest.raises(ValueError, match="meta"), torch.device("meta"):
        make_model().to("meta").quantize(4)


def test_the_peak_is_the_model_and_one_layer(make_model):
    """Each layer's float weight is let go before the next is swapped."""
    import weakref

    model = make_model()
    alive = [weakref.ref(layer.weight) for layer in linears(model).values()]
    left = []
    swap = nn.Module.__setattr__

    def counting(self, name, value):
        if isinstance(value, QuantizedLinear):
            left.append(sum(weight() is not None for weight in alive))
        swap(self, name, value)

    nn.Module.__setattr__ = counting
    try:
        model.quantize(4)
    finally:
        nn.Module.__setattr__ = swap
    assert left == list(range(12, 0, -1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": 32},
        {"skip": ["dense_4h_to_h", "layers.2"]},
        {"embedding": True, "output_layer": True},
        {"group_size": 16, "skip": ["layers.0.self_attention"], "embedding": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [8, 4])
def test_save_and_reload_are_bit_equal(make_model, tmp_path, bits, options):
    model = make_model().half().quantize(bits, **options)
    ids = torch.randint(3, 320, (2, 7), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits
    left = [n for n, m in linears(model).items() if not isinstance(m, QuantizedLinear)]
    assert len(left) == {2: 6, 1: 2, 0: 0}[len(options.get("skip", []))]
    model.save_pretrained(tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_bit"] == bits
    state = load_file(tmp_path / "model.safetensors")
    assert state["transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"].dtype == torch.int8
    other = type(model).from_pretrained(tmp_path).half().eval()
    assert torch.equal(other(ids).logits, logits)
    for (name, value), (other_name, other_value) in zip(model.state_dict().items(), other.state_dict().items()):
        assert name == other_name and torch.equal(value, other_value) and value.dtype == other_value.dtype
    other.quantize(bits, **options)  # what many scripts do with a quantized checkpoint
    assert torch.equal(other(ids).logits, logits)


def test_quantize_gives_quantized_layers_another_backend(make_model):
    """As a loaded int4 checkpoint needs it; whatever layout they were in, and nothing changes where it cannot run."""
    model, ids = make_model().quantize(4, skip="layers.2", output_layer=True), torch.tensor([[5, 6, 7]])
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    state, logits = {name: value.clone() for name, value in model.state_dict().items()}, model(ids).logits
    for backend in ("stock", "torch", "auto"):
        assert model.quantize(4, skip="layers.2", backend=backend) is model
        assert len(layers) == 9 and {layer.backend for layer in layers} == {backend}
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-3, atol=1e-3)
    model.quantize(4, skip="layers.2", backend="stock").quantize(4, skip="layers.2")
    assert {layer.backend for layer in layers} == {"stock"}  # none was asked for
    for backend in ("triton", "tritn"):
        with pytest.raises(ValueError, match=f"backend='{backend}'"):
            model.quantize(4, skip="layers.2", backend=backend)
    assert {layer.backend for layer in layers} == {"stock"} and not any(
        isinstance(layer, QuantizedLinear) for name, layer in linears(model).items() if "layers.2" in name
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_backend_set_by_hand_lays_the_weight_out_once():
    """Not at every forward, and an unknown one is refused at once."""
    layer, x = QuantizedLinear.from_linear(nn.Linear(64, 64), 4), torch.randn(2, 64)
    weight, y = layer.weight.clone(), layer(x)
    for backend in ("torch", "stock"):
        layer.backend = backend
        torch.testing.assert_close(layer(x), y)
        held = layer.weight
        layer(x)
        assert layer.weight is held and quantization.laid_out_by(held) in (None, backend)
    with pytest.raises(ValueError, match="backend='tritn': choose auto, triton"):
        layer.backend = "tritn"
    with pytest.raises(ValueError, match="backend='tritn': choose auto, triton"):
        QuantizedLinear(64, 64, 4, backend="tritn")
    assert layer.backend == "stock" and torch.equal(layer.state_dict()["weight"], weight)


@pytest.mark.parametrize("wrong", ["dense_4h", "layers.7", ["layers.0", "dense4h_to_h"]])
def test_a_name_in_skip_that_no_layer_has_is_an_error(make_model, wrong):
    """It is named; a name alone need not stand in a list."""
    model = make_model()
    with pytest.raises(ValueError, match="skip names '(dense_4h|layers.7|dense4h_to_h)', and no layer is called so"):
        model.quantize(4, skip=wrong)
    assert not any(isinstance(layer, QuantizedLinear) for layer in model.modules())
    model.quantize(4, skip="dense_4h_to_h")
    assert {name[-13:] for name, m in linears(model).items() if not isinstance(m, QuantizedLinear)} == {"dense_4h_to_h"}


def test_skip_is_undone_by_a_second_walk(make_model):
    model = make_model().quantize(4, skip=["layers.0"])
    assert len(model.config.quantization_options["skip"]) == 4
    model.quantize(4)
    assert not hasattr(model.config, "quantization_options")
    assert all(isinstance(layer, QuantizedLinear) for layer in linears(model).values())


def test_a_released_checkpoint_loads(make_model, tmp_path):
    """Released int4: torch .bin, float16 scales, `quantization_bit` in the config, and an inv_freq nobody needs."""
    model = make_model().half().quantize(4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["transformer.rotary_pos_emb.inv_freq"] = torch.zeros(4, dtype=torch.float16)
    model.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(other.half()(ids).logits, model(ids).logits)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    other = type(model).from_pretrained(tmp_path)
    assert torch.equal(other.half()(ids).logits, model(ids).logits)


@pytest.mark.needs_transformers("4.55.0", "quantizers that round while loading, as they are today")
@pytest.mark.parametrize(
    "bits, options", [(8, {}), (4, {}), (4, {"group_size": 32, "skip": ["layers.0"], "embedding": True})]
)
def test_quantizing_while_loading_gives_what_quantize_gives(make_model, tmp_path, bits, options):
    from chatglm2.quantization_loading import ChatGLMQuantizationConfig

    model = make_model().half()
    model.save_pretrained(tmp_path)
    model.quantize(bits, **options)
    config = ChatGLMQuantizationConfig(bits, **options)
    name = "dtype" if hasattr(model.config, "dtype") else "torch_dtype"
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config, **{name: torch.float16})
    state = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.quantization_bit == bits and not hasattr(loaded.config, "quantization_config")
    assert not any(p.requires_grad for m in loaded.modules() if hasattr(m, "weight_scale") for p in m.parameters())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again", quantization_config=config, **{name: torch.float16})
    assert torch.equal(again(ids).logits, model(ids).logits)
    loaded.half().float()  # transformers refuses to cast models that it holds for quantized


@pytest.mark.needs_transformers("4.55.0", "quantizers that round while loading, as they are today")
def test_a_backend_that_cannot_run_where_the_model_loads(make_model, tmp_path):
    """With a device_map the device is known, and refused at once; without one, .cuda() may come."""
    pytest.importorskip("accelerate")
    model = make_model()
    model.save_pretrained(tmp_path)
    config = {"quant_method": "chatglm", "bits": 4, "backend": "triton", "skip": "dense"}
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu"):
        type(model).from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    assert {getattr(layer, "backend", "float") for layer in linears(loaded).values()} == {"triton", "float"}


@pytest.mark.needs_transformers("4.55.0", "quantizers that round while loading, as they are today")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_checkpoint_may_have_more_quantized_while_it_loads(make_model, tmp_path, bits):
    """Its int8 and int4 layers load as they are; the float embedding and output layer are rounded, not truncated."""
    from chatglm2.quantization_loading import ChatGLMQuantizationConfig

    more = {"embedding": True, "output_layer": True}
    model = make_model().quantize(bits)
    model.save_pretrained(tmp_path)
    model.quantize(bits, **more)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=ChatGLMQuantizationConfig(bits, **more))
    assert loaded.config.quantization_options == more
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.needs_transformers("4.55.0", "quantizers that round while loading, as they are today")
def test_quantizing_while_loading_finds_the_layer_that_cannot_be(make_model, tmp_path):
    from chatglm2.quantization_loading import ChatGLMQuantizationConfig

    with pytest.raises(ValueError, match="bits=5"):
        ChatGLMQuantizationConfig(5)
    with pytest.raises(ValueError, match="backend='tritn'"):
        ChatGLMQuantizationConfig(4, backend="tritn")
    with pytest.raises(ValueError, match="knows no groupsize: give bits, group_size"):
        ChatGLMQuantizationConfig(4, groupsize=32)
    model = make_model().quantize(8)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already int8"):
        type(model).from_pretrained(tmp_path, quantization_config=ChatGLMQuantizationConfig(4))


def test_offloaded_layers_compute_the_same(make_model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = make_model().quantize(4)
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = model(ids).logits  # lays the weights out: they must be put back before they are moved
    accelerate.disk_offload(model, tmp_path, execution_device=CPU)
    assert linears(model)["transformer.encoder.layers.0.mlp.dense_h_to_4h"].weight.device.type == "meta"
    for _ in range(2):
        torch.testing.assert_close(model(ids).logits, logits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_on_top(make_model, bits, dtype):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = make_model().to(dtype).quantize(bits)
    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, init_lora_weights="gaussian"))
    ids = torch.randint(3, 320, (2, 12))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 24
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_layers_inside_an_adapter_are_not_quantized_in_part(make_model):
    """The other way round is an error, never a model of both; over int4, adapter and all, a walk changes nothing."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query_key_value"])
    model = peft.get_peft_model(make_model(), config)
    with pytest.raises(ValueError, match="query_key_value: an adapter stands around it: quantize first"):
        model.quantize(4)
    assert not any(isinstance(layer, QuantizedLinear) for layer in model.modules())
    assert not model.config.quantization_bit
    model.quantize(4, skip="query_key_value")
    assert len(model.config.quantization_options["skip"]) == 3
    model = peft.get_peft_model(make_model().quantize(4), config)
    model.quantize(4)
    assert model.config.quantization_bit == 4 and not hasattr(model.config, "quantization_options")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_prefix_trains_on_top(make_model, bits):
    model = make_model(pre_seq_len=4).quantize(bits).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("prefix_encoder" in name for name in trained)
    ids = torch.randint(3, 320, (2, 6), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.any() for parameter in trained.values())


@pytest.mark.skipif(sys.version_info >= (3, 14) or sys.platform == "win32", reason="torch.compile is not there")
def test_one_quantized_block_compiles_without_a_break(make_model):
    model = make_model().quantize(4)
    mlp = model.transformer.encoder.layers[0].mlp
    x = torch.randn(1, 5, 64)
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))


def test_two_imports_of_the_files_share_the_op(make_model):
    """The Hugging Face loader keeps a copy of the files for each checkpoint that it has met."""
    import types

    package = types.ModuleType("chatglm2_twin")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["chatglm2_twin"] = package
    try:
        from chatglm2_twin import quantization as twin
        from chatglm2_twin import quantization_loading  # noqa: F401

        assert twin.QuantizedLinear is not QuantizedLinear
        model = make_model().quantize(4)
        twin.quantize(model, 4)
        assert all(type(layer) is QuantizedLinear for layer in linears(model).values())
        layer = twin.QuantizedLinear.from_linear(nn.Linear(64, 32), 4)
        assert layer(torch.randn(2, 64)).shape == (2, 32)
    finally:
        for name in [name for name in sys.modules if name.startswith("chatglm2_twin")]:
            del sys.modules[name]
