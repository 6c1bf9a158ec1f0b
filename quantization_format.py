"""The format of int8 and int4 weights in the released checkpoints, and what every kernel family is built on.

Symmetric rounding with one scale per output row: scale = max|w| / 127 (int8) or / 7 (int4), in the weight's dtype, and
q = round_half_even(w / scale). `weight` is int8 [out, in]. For int4 it is [out, in / 2] with two columns per byte, the
even column in the high nibble: (q[2j] & 15) << 4 | (q[2j + 1] & 15). `weight_scale` is [out], or
[out, in / group_size] where every group of inputs has its own scale (better int4, but not the released format).
"""

import functools
import math
from typing import Callable, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

LIMIT = {8: 127, 4: 7}  # bits -> the largest |q|
RANGE = {8: (-127, 127), 4: (-8, 7)}  # bits -> what q may be; rounding to nearest leaves -8 out
STEPS = 24  # `search_scale` tries scales in steps of max|w| / 7 / STEPS, down to a third of it
CHUNK = 1 << 22  # weights rounded at a time, so that temporaries stay small


def check_bits(bits: int, in_features: int = 2, group_size: Optional[int] = None) -> None:
    """Raise ValueError where rows of `in_features` weights do not fit `bits`, or groups of `group_size`."""
    if type(bits) is not int or bits not in LIMIT:  # 4.0 is in LIMIT, too
        raise ValueError(f"bits={bits!r} is not supported: give 8 or 4 (0 leaves the model unchanged)")
    if bits == 4 and in_features % 2:
        raise ValueError(f"in_features={in_features} is odd, but int4 packs two columns per byte: exclude it by skip=")
    if group_size is not None and (group_size < 2 or group_size % 2 or in_features % group_size):
        raise ValueError(f"group_size={group_size} must be even and divide in_features={in_features}: try 32 or 128")


def check_weight(weight: Tensor, bits: int, group_size: Optional[int] = None) -> None:
    """Raise ValueError where `quantize_weight` cannot round a float weight [out, in]."""
    check_shape(weight, bits, group_size)
    if weight.numel():
        check_finite(torch.stack(torch.aminmax(weight)))


def check_shape(weight: Tensor, bits: int, group_size: Optional[int] = None) -> None:
    """`check_weight` without a look at the values."""
    check_bits(bits, weight.shape[1], group_size)
    if weight.is_meta:
        raise ValueError("the weight is on the meta device and has no values yet: load the checkpoint first")


def check_finite(values: Tensor) -> None:
    """Raise ValueError if one of `values` is nan or inf; a weight's scales are, where the weight is."""
    if not values.isfinite().all():
        raise ValueError("the weight contains nan or inf and cannot be quantized: repair the checkpoint, or use skip=")


def pack(q: Tensor) -> Tensor:
    """int8 [out, in] with values -8..7 -> int8 [out, in / 2], the even column in the high nibble."""
    return (q[:, 0::2] & 15) << 4 | (q[:, 1::2] & 15)


def unpack(packed: Tensor) -> Tensor:
    """int8 [out, in / 2] -> int8 [out, in] with values -8..7, the inverse of `pack`."""
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)


@torch.no_grad()
def quantize_weight(weight: Tensor, bits: int, group_size: Optional[int] = None) -> Tuple[Tensor, Tensor]:
    """Round a float weight [out, in] to (int8 weight in the released packing, scale [out] or [out, in / group_size]).

    Divides and rounds in the weight's dtype, as the released files were made. Values that bfloat16 rounds up to 128
    are clamped to 127; a row of zeros has scale 0. Raises ValueError as `check_weight` does.
    """
    check_shape(weight, bits, group_size)
    out, columns = weight.shape
    group = group_size or columns
    packed = torch.empty(out, columns * bits // 8, dtype=torch.int8, device=weight.device)
    scale = torch.zeros(out, columns // group if group else 1, dtype=weight.dtype, device=weight.device)
    rows = max(CHUNK // max(columns, 1), 1)
    for i in range(0, out if columns else 0, rows):
        w = weight[i : i + rows].reshape(-1, columns // group, group)
        scale[i : i + rows] = w.abs().amax(dim=2) / LIMIT[bits]
        s = scale[i : i + rows, :, None]
        q = (w / torch.where(s == 0, 1, s)).float().round_().clamp_(-LIMIT[bits], LIMIT[bits]).to(torch.int8).flatten(1)
        packed[i : i + rows] = q if bits == 8 else pack(q)
    check_finite(scale)
    return packed, scale if group_size else scale[:, 0].contiguous()


@torch.no_grad()
def search_scale(
    weight: Tensor, bits: int, group_size: Optional[int] = None, importance: Optional[Tensor] = None
) -> Tensor:
    """The scale [out, 1], or [out, in / group_size], with the least squared error, in the weight's dtype.

    It is never worse than max|w| / 7, where the search begins: a smaller scale cuts the largest weights off and holds
    the others more exactly. int4 uses -8, too. `importance` [in] weighs the errors of the columns.
    """
    out, columns = weight.shape
    group = group_size or columns
    scale = torch.zeros(out, columns // group if group else 1, dtype=weight.dtype, device=weight.device)
    importance = 1 if importance is None else importance.float().contiguous().view(-1, group)  # a diagonal is strided
    rows = max(CHUNK // 16 // max(columns, 1), 1)  # which a core's cache holds: each is read some hundred times
    for i in range(0, out if columns else 0, rows):
        w = weight[i : i + rows].float().view(-1, columns // group, group)
        largest = w.abs().amax(dim=2) / LIMIT[bits]
        best, least = largest, torch.full_like(largest, math.inf)
        for step in (*range(STEPS, STEPS // 3, -1), 0, 0):
            candidate = largest * step / STEPS
            if step == 0:  # the best scale for the integers of the best so far
                q = divide_and_round(w, best, bits)
                candidate = (w * q * importance).sum(2) / (q * q * importance).sum(2).clamp_min(1e-30)
            candidate = candidate.to(weight.dtype).float()
            rest = w - divide_and_round(w, candidate, bits) * candidate[..., None]
            error = (rest.square_() * importance).sum(2)
            best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
        scale[i : i + rows] = best
    return scale


def divide_and_round(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The integers, as floats, of w [out, groups, size] in float32 with the scales [out, groups]: all of RANGE."""
    return (w / torch.where(scale == 0, 1, scale)[..., None]).round_().clamp_(*RANGE[bits])


def in_format(q: Tensor, scale: Tensor, bits: int, group_size: Optional[int]) -> Tuple[Tensor, Tensor]:
    """The result of `quantize_weight` from integers int8 [out, in] and scales [out, groups], if these are finite."""
    check_finite(scale)
    return (q if bits == 8 else pack(q)), scale if group_size else scale[:, 0].contiguous()


def quantize_with_search(weight: Tensor, bits: int, group_size: Optional[int] = None) -> Tuple[Tensor, Tensor]:
    """`quantize_weight` with the scales of `search_scale`, in the same format."""
    check_shape(weight, bits, group_size)
    scale = search_scale(weight, bits, group_size)
    groups = weight.detach().float().view(*scale.shape, -1)
    return in_format(divide_and_round(groups, scale.float(), bits).to(torch.int8).flatten(1), scale, bits, group_size)


def dequantize_weight(weight: Tensor, weight_scale: Tensor, bits: int, dtype: Optional[torch.dtype] = None) -> Tensor:
    """The float weight [out, in] = q * scale, each product rounded once to `dtype` (default: the scale's dtype)."""
    dtype = dtype or weight_scale.dtype
    q = (unpack(weight) if bits == 4 else weight).to(dtype)
    if weight_scale.dim() == 1:
        return q * weight_scale.to(dtype)[:, None]
    return (q.unflatten(1, (weight_scale.shape[1], -1)) * weight_scale.to(dtype)[:, :, None]).flatten(1)


def reference_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int) -> Tensor:
    """x [N, in] times the dequantized weight [out, in], transposed, plus bias [out]: the reference for every kernel.

    Computes in float32 on a CPU, where half precision is slower and no more exact, and in x's dtype elsewhere.
    """
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    y = F.linear(x.to(dtype), dequantize_weight(weight, weight_scale, bits, dtype))
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def without_overflow(linear: Callable) -> Callable:
    """For a kernel on a CPU that multiplies x by q first and by the scale at the end: |q| * |x| may exceed float32.

    Rows of finite inputs that give others are multiplied again, as x / 2^40.
    """

    @functools.wraps(linear)
    def product(x, weight, weight_scale, bias, bits):
        y = linear(x, weight, weight_scale, bias, bits)
        if x.dtype != torch.float16 and not math.isfinite(y.sum()):
            rows = x.isfinite().all(dim=1) & ~y.isfinite().all(dim=1)
            if rows.any():
                part = linear(x[rows] * 2.0**-40, weight, weight_scale, None, bits).float() * 2.0**40
                y[rows] = (part if bias is None else part + bias).to(y.dtype)
        return y

    return product


class Layout(NamedTuple):
    """An order of a weight's bytes that a kernel reads faster than the released packing.

    Only `weight` has a layout; scales and biases stay as they are. Its dtype or its shape must differ from the released
    packing's, by which a weight that was put back in that packing (by accelerate, or functional_call) is recognised.
    """

    dtype: torch.dtype  # of the tensor in this layout
    shape: Callable  # out_features, in_features, bits -> its shape
    fits_layout: Callable  # out_features, in_features, bits, group_size -> whether the layout can hold such a weight
    to_layout: Callable  # weight in the released packing, bits -> weight in this layout, on the same device
    from_layout: Callable  # weight in this layout, out_features, in_features, bits -> the released packing
    linear: Callable  # as `Family.linear`, with a weight in this layout


class Family(NamedTuple):
    """What a kernel family offers: the record `FAMILY` at the end of its file, which imports no library when imported.

    linear(x, weight, weight_scale, bias, bits) -> y, as `reference_linear` and within a small multiple of its error:
        x [N, in] is contiguous, N >= 0, float32, float16 or bfloat16; y [N, out] is new, contiguous, of x's dtype.
        weight is in the released packing. weight_scale [out], or [out, in / group_size] for any even group_size, and
        bias [out] or None, may be of another float dtype. It runs on x's device and current stream, and several threads
        may call it at once. Gradients are not its business.
    unavailable(device) -> None, or in one line why the family cannot run there and what would help. It takes any device
        and never raises; its answer is kept.
    quantize(weight, bits, group_size) -> as `quantize_weight`, bit for bit; None if that is what it has.
    """

    linear: Callable
    unavailable: Callable
    layout: Optional[Layout] = None
    quantize: Optional[Callable] = None
