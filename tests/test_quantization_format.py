"""The format of quantized weights: packing, rounding, and what is refused."""

from pathlib import Path

import pytest
import torch
from chatglm2.quantization_format import (
    check_weight,
    dequantize_weight,
    pack,
    quantize_weight,
    quantize_with_search,
    search_scale,
    unpack,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_helpers import DTYPES
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden" / "quantization.safetensors"
SHARED_GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "quant_shared.safetensors"


@pytest.mark.parametrize("path", [GOLDEN, SHARED_GOLDEN], ids=["own", "shared"])
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


@given(
    st.integers(1, 12),
    st.integers(1, 70),
    st.sampled_from([4, 8]),
    st.sampled_from(DTYPES),
    st.sampled_from([1e-6, 1.0, 1e4]),
    st.sampled_from([1, 4]),
    st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_searched_scale_is_never_worse(out, k, bits, dtype, size, power, seed):
    """Than max|w| / 7 row by row, on weights with few or many that stand out, up to what the dtype itself rounds."""
    generator = torch.Generator().manual_seed(seed)
    dense = (torch.randn(out, 2 * k, generator=generator) ** power * size).clamp(-6e4, 6e4).to(dtype)
    dense[0] = 0

    def error(packed, scale):
        return (dequantize_weight(packed, scale, bits, torch.float64) - dense.double()).square().sum(1)

    packed, scale = quantize_with_search(dense, bits)
    assert packed.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (out,)
    assert (error(packed, scale) <= error(*quantize_weight(dense, bits)) * 1.001).all()


@pytest.mark.parametrize("group_size, most", [(None, 0.11), (128, 0.103), (32, 0.088)])
def test_searched_scale_cuts_off_what_stands_out(group_size, most):
    """A normal distribution in rows of 4,096: 15.7% becomes 10.9%, -8 is used, and importance shifts the error."""
    torch.manual_seed(0)
    dense = torch.randn(64, 4096)
    packed, scale = quantize_with_search(dense, 4, group_size)
    assert (dequantize_weight(packed, scale, 4) - dense).norm() < most * dense.norm()
    assert unpack(packed).min() == -8
    importance = torch.ones(4096)
    importance[:64] = 1000
    weighted = search_scale(dense, 4, 4096, importance)
    rest = [((dense / s).round().clamp(-8, 7) * s - dense)[:, :64].norm() for s in (weighted, search_scale(dense, 4))]
    assert rest[0] < 0.95 * rest[1]


@pytest.mark.parametrize("function", [quantize_weight, check_weight, quantize_with_search])
@pytest.mark.parametrize(
    "change, arguments, message",
    [
        (lambda w: w, (3,), "bits=3.*8 or 4"),
        (lambda w: w, (4.0,), "bits=4.0.*8 or 4"),
        (lambda w: w[:, :7], (4,), "in_features=7 is odd.*skip="),
        (lambda w: w, (4, 3), "group_size=3.*in_features=8"),
        (lambda w: w, (8, 16), "group_size=16.*in_features=8"),
        (lambda w: w / 0, (8,), "nan or inf"),
        (lambda w: w.index_fill(0, torch.tensor([2]), float("nan")), (4,), "nan or inf"),
        (lambda w: w.index_fill(1, torch.tensor([7]), float("-inf")), (4, 2), "nan or inf"),
        (lambda w: w.to("meta"), (4,), "meta device"),
    ],
)
def test_unsupported_weights_are_rejected(function, change, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(change(torch.ones(4, 8)), *arguments)
