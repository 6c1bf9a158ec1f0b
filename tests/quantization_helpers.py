"""Helpers shared by the tests of quantization: kernels by name, random weights, and error measures."""

import contextlib
import functools

import pytest
import torch
from chatglm2 import c_library, quantization, quantization_cpu
from chatglm2.quantization_format import dequantize_weight, quantize_weight, reference_linear
from conftest import c_kernels
from torch import nn

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_ULP = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}
FLOAT32_SUM = 2**-20  # what float32 sums may lose, relative to the sum of the terms' magnitudes
needs_compiled = pytest.mark.skipif(
    quantization_cpu.unavailable(CPU) is not None, reason=f"no compiled kernel: {quantization_cpu.unavailable(CPU)}"
)
BACKENDS = [pytest.param("cpu", marks=needs_compiled), "stock", "torch"]
KERNELS = [*(pytest.param(name, marks=needs_compiled) for name in ("cpu", "cpu: avx2", "cpu: avxvnni")), *BACKENDS[1:]]


@functools.lru_cache(None)
def library(kind):
    """The C kernels for another kind of CPU. AVX512's 256-bit instruction stands in for AVX-VNNI's."""
    if kind == "avx2":
        return c_kernels("avx2")
    stand_in = "-D__AVXVNNI__", "-D_mm256_dpbusd_avx_epi32=_mm256_dpbusd_epi32"
    return c_kernels("avx2", *c_library.AVX512.values(), *stand_in)


@contextlib.contextmanager
def use(kernel):
    """Compute with the C kernels of "cpu: avx2", another kind of CPU, or with this one's for a plain name."""
    kind = kernel.partition(": ")[2]
    if kind == "avxvnni" and c_library.instructions()[0][0] != "avx512":
        pytest.skip("this CPU has no VNNI instruction of 256 bits")
    with pytest.MonkeyPatch.context() as patch:
        if kind:
            loaded = library(kind)
            patch.setattr(quantization_cpu, "load_library", lambda: loaded)
        yield


def linear_of(kernel):
    """The product of a kernel family, in its layout where the weight fits; for a kernel's name as `use` takes it."""
    family = quantization.family(kernel.partition(": ")[0])

    def linear(x, weight, weight_scale, bias, bits):
        group_size = None if weight_scale.dim() == 1 else x.shape[1] // weight_scale.shape[1]
        layout = family.layout
        with use(kernel):
            if layout and layout.fits_layout(len(weight), x.shape[1], bits, group_size):
                return layout.linear(x, layout.to_layout(weight, bits), weight_scale, bias, bits)
            return family.linear(x, weight, weight_scale, bias, bits)

    return linear


def make(n, k, out, bits, dtype, group_size=None, bias=True, seed=0):
    """(x [n, k], weight, weight_scale, bias, bits), with a row of zeros and a large row among the weights."""
    torch.manual_seed(seed)
    dense = torch.randn(out, k)
    if out > 1:
        dense[0] = 0
        dense[-1] *= 30
    weight, scale = quantize_weight(dense.to(dtype), bits, group_size)
    if bits == 4:
        weight[1::4, ::5] = -0x78  # -8 twice, which rounding to nearest does not use
    return torch.randn(n, k).to(dtype), weight, scale, torch.randn(out).to(dtype) if bias else None, bits


def with_outliers(x, count=8, size=30):
    """x with 8 channels 30 times as large, as these models have."""
    channels = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(1))[:count]
    return x.index_copy(1, channels, x[:, channels] * size)


def relative_error(y, x, weight, weight_scale, bias, bits):
    """The root mean square error of y, relative to the typical size of a sum of such terms."""
    w = dequantize_weight(weight, weight_scale, bits, torch.float64)
    b = torch.zeros(len(w)) if bias is None else bias.double()
    typical = x.double().norm(dim=1)[:, None] * w.norm(dim=1) / w.shape[1] ** 0.5 + b.abs()
    error = (y.double() - x.double() @ w.t() - b).abs()
    assert not error[typical == 0].any()
    return (error / typical.clamp_min(1e-300)).square().mean().sqrt().item()


def to_int8(x, group):
    """x in float64, rounded to int8 with one scale for every `group` inputs of a token."""
    parts = []
    for part in x.double().split(group, dim=1):
        scale = part.abs().amax(dim=1, keepdim=True) / 127
        parts.append((part / torch.where(scale == 0, 1, scale)).round() * scale)
    return torch.cat(parts, dim=1)


def all_but_outliers(x):
    """x in float64, each token rounded to int8, except channels whose peak exceeds 8 times the median peak."""
    peaks = x.double().abs().amax(dim=0)
    outliers = peaks > 8 * peaks.nanmedian()
    return torch.where(outliers, x.double(), to_int8(x.double().masked_fill(outliers, 0), x.shape[1]))


def own_error(inputs, x, weight, weight_scale, bias, bits):
    """The reference's own error with `inputs`, x as a kernel rounds it, in float64; bfloat16 inputs give bfloat16."""
    if inputs is x:
        y = reference_linear(x, weight, weight_scale, bias, bits)
    else:
        y = reference_linear(inputs.double(), weight, weight_scale, bias, bits).to(inputs.dtype).to(x.dtype)
    return relative_error(y, x, weight, weight_scale, bias, bits)


def assert_as_exact_as_the_reference(y, kernel, x, weight, weight_scale, bias, bits):
    """y is no more than half again as wrong as the reference is for inputs rounded as this kernel rounds them.

    The C kernels round half precision to int8 in groups of at most 128; torch's operators take bfloat16 or int8 tokens.
    Sums of float32 in another order differ by a few units in the last place.
    """
    arguments = x, weight, weight_scale, bias, bits
    group = x.shape[1] if weight_scale.dim() == 1 else x.shape[1] // weight_scale.shape[1]
    rounded = [x]
    if x.dtype != torch.float32 and kernel.startswith("cpu"):
        rounded = [to_int8(x, min(group, 128)), x.bfloat16()]
    elif x.dtype != torch.float32 and kernel == "stock":
        rounded = [all_but_outliers(x), x.bfloat16()]
    limit = 1.5 * max(own_error(inputs, *arguments) for inputs in rounded) + 4 * torch.finfo(torch.float32).eps
    assert relative_error(y, *arguments) <= limit


def error(y, x, weight, weight_scale, bias, bits, ulps=0.5):
    """The largest error of y against float64, beyond the rounding of y itself by `ulps` of its dtype.

    It is relative to the sum of the magnitudes of the terms, so that one wrong weight among thousands is detected.
    """
    w = dequantize_weight(weight, weight_scale.double(), bits, torch.float64)
    b = torch.zeros(w.shape[0]).double() if bias is None else bias.double()
    exact = x.double() @ w.T + b
    rounding = HALF_ULP[y.dtype] * 2 * ulps * exact.abs() + (2**-25 if y.dtype == torch.float16 else 0)  # subnormals
    beyond = (y.double() - exact).abs() - rounding
    return (beyond / (x.double().abs() @ w.abs().T + b.abs()).clamp_min(1e-30)).max().item()


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
