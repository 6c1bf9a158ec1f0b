"""The CPU kernel families against the reference, within the reference's own error; and devices without the GPU ones."""

import copy
import subprocess
import sys

import pytest
import torch
from chatglm2 import quantization_cpm, quantization_triton
from chatglm2.quantization import QuantizedLinear
from chatglm2.quantization_format import dequantize_weight
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_helpers import (
    BACKENDS,
    CUDA,
    DTYPES,
    KERNELS,
    assert_as_exact_as_the_reference,
    linear_of,
    make,
    own_error,
    relative_error,
    to_int8,
    with_outliers,
)
from torch import nn


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_kernels_match_the_reference(kernel, dtype, bits):
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
        assert_as_exact_as_the_reference(y, kernel, *arguments)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, group_size", [(8, None), (4, None), (4, 32)])
def test_the_largest_inputs_do_not_overflow(kernel, dtype, bits, group_size):
    """q * x exceeds float32 where the dequantized weight times x does not. Other rows stay the same."""
    linear = linear_of(kernel)
    for n in (1, 3, 14, 800):  # 800 are multiplied in parts
        x, *rest = make(n, 256, 40, bits, torch.float32, group_size)
        x, rest[1] = x.to(dtype), rest[1] / 3000  # the scales: sums stay within the dtype
        rest[2] = rest[2].to(dtype)
        before = linear(x, *rest)
        x[0, ::9] = torch.finfo(dtype).max * torch.tensor([1, -0.5, 0.25]).repeat(10)[:29]
        y = linear(x, *rest)
        assert y.isfinite().all()
        assert_as_exact_as_the_reference(y[:1], kernel, x[:1], *rest)
        assert kernel == "stock" or torch.equal(y[1:], before[1:])  # stock's outlier channels are those of the batch


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, 64), (4, 128), (8, 128), (4, 256), (4, 6)])
def test_kernels_support_groups(kernel, bits, group_size):
    linear = linear_of(kernel)
    for dtype in DTYPES:
        for n in (1, 6, 14):
            arguments = make(n, 3 * group_size, 40, bits, dtype, group_size)
            assert_as_exact_as_the_reference(linear(*arguments), kernel, *arguments)


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
def test_kernels_match_the_reference_on_any_shape(kernel, n, columns, out, bits, dtype, group_size, seed):
    k = columns * 2 if group_size is None else group_size * (columns // 9)
    arguments = make(n, k, out, bits, dtype, group_size, seed=seed)
    y = linear_of(kernel)(*arguments)
    assert y.shape == (n, out) and y.dtype == dtype
    if n:
        assert_as_exact_as_the_reference(y, kernel, *arguments)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outlier_channels(kernel, dtype):
    for n in (1, 20):
        x, *rest = make(n, 2048, 64, 8, dtype)
        x = with_outliers(x)
        y = linear_of(kernel)(x, *rest)
        assert_as_exact_as_the_reference(y, kernel, x, *rest)
        if kernel != "torch" and dtype != torch.float32:  # a token rounded as a whole loses much more
            assert relative_error(y, x, *rest) < own_error(to_int8(x, 2048), x, *rest) / 2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7])
def test_huge_tiny_and_zero_inputs(kernel, dtype, n):
    linear = linear_of(kernel)
    x, weight, scale, bias, bits = make(n, 256, 33, 4, dtype)
    assert torch.equal(linear(torch.zeros_like(x), weight, scale, bias, bits), bias.expand(n, -1))
    for size in (50, 1e-4) if dtype == torch.float16 else (1e30, 1e-6, 1e-30):
        arguments = ((x.double() * size).to(dtype), weight, scale, None, bits)
        assert_as_exact_as_the_reference(linear(*arguments), kernel, *arguments)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_propagate(kernel, dtype):
    for n in (1, 6, 20):
        for bad in (float("nan"), float("inf")):
            x, *rest = make(n, 256, 33, 8, dtype)
            x[0, 200] = bad
            y = linear_of(kernel)(x, *rest)
            assert not y[0, 1:].isfinite().any() and y[1:].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", [8, 4])
def test_largest_products_do_not_overflow(kernel, bits):
    """Weights of -128 or -8 and inputs of one sign: the largest intermediate sums."""
    weight = torch.full(
        (40, 512 * bits // 8), -128 if bits == 8 else -0x78, dtype=torch.int8
    )  # -0x78: two nibbles of -8
    for n in (1, 4, 20):
        arguments = (torch.full((n, 512), 3.0).half(), weight, torch.full((40,), 0.01).half(), None, bits)
        assert_as_exact_as_the_reference(linear_of(kernel)(*arguments), kernel, *arguments)


@pytest.mark.parametrize("kernel", KERNELS[:3])
@pytest.mark.parametrize("bits, group_size", [(8, None), (8, 32), (8, 64), (4, None), (4, 32), (4, 128)])
def test_integer_sums_are_exact(kernel, bits, group_size):
    """Inputs that are integers up to 127 have the scale 1: bit for bit, for every tile, tail and extreme value."""
    linear, generator = linear_of(kernel), torch.Generator().manual_seed(0)
    for n in (*range(1, 71), 128, 133, 260):  # longer prompts are multiplied in parts of 128
        k, out = 3 * group_size if group_size else (130, 256, 30)[n % 3], (33, 64, 7)[n % 3]
        x = torch.randint(-127, 128, (n, k), generator=generator).half()
        weight = torch.randint(-128, 128, (out, k * bits // 8), dtype=torch.int8, generator=generator)
        if n % 4 == 0:  # the largest sums, of both signs: -128, or -8 and 7
            x = 127 * x.sign() if n % 8 else torch.full_like(x, 127)
            weight[: out // 2], weight[out // 2 :] = (-128, 127) if bits == 8 else (-0x78, 0x77)
        x[:, :: group_size or 128] = 127
        scale = torch.full((out,) if group_size is None else (out, 3), 2.0**-9).half()
        want = x.double() @ dequantize_weight(weight, scale, bits, torch.float64).t()
        assert torch.equal(linear(x, weight, scale, None, bits), want.half())


@pytest.mark.parametrize("kernel", BACKENDS)
def test_empty_batches_and_non_contiguous_inputs(kernel):
    layer = QuantizedLinear.from_linear(nn.Linear(64, 24), 4, backend=kernel)
    assert layer(torch.empty(0, 64)).shape == (0, 24)
    assert layer(torch.empty(2, 0, 64)).shape == (2, 0, 24)
    x = torch.randn(64, 5, 3).transpose(0, 2)  # (3, 5, 64), not contiguous
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    torch.testing.assert_close(layer(x)[1, 2], layer(x[1, 2]), rtol=1e-4, atol=1e-5)
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x.bfloat16()).dtype == torch.bfloat16  # the input's dtype, whatever the scales' is


# The GPU families, without a GPU


@pytest.mark.parametrize("module", (quantization_triton, quantization_cpm))
@pytest.mark.parametrize("device", ("cpu", "mps", "meta"))
def test_unavailable_on_other_devices(module, device):
    reason = module.unavailable(torch.device(device))
    assert device in reason and "\n" not in reason


def test_importing_imports_no_gpu_library():
    code = "import sys; sys.path.insert(0, sys.argv[1] + '/lib')\n"
    code += "from chatglm2 import quantization_cpm, quantization_triton\n"
    code += "assert not {'triton', 'cpm_kernels'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code, str(ROOT)], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", (quantization_triton, quantization_cpm))
def test_unavailable_without_a_gpu(module):
    reason = module.unavailable(CUDA)
    assert reason and "\n" not in reason
