"""Int8 and int4 products with torch's operators, for any CPU and system where no C kernel can be compiled.

Float32 inputs, and weights with groups, are multiplied in float32. Half-precision inputs are multiplied by int8
weights: few tokens in bfloat16 or as two int8 terms, more tokens as one int8 term, with outlier channels in float32.
Int4 weights are unpacked some rows at a time. If torch has a vectorized int4 product, they are kept in its layout, and
few tokens are multiplied in bfloat16, with group scales rounded to bfloat16.
"""

import functools
import platform
import time
from typing import Optional, Tuple

import torch
from torch import Tensor

from .quantization_format import Family, Layout, pack, without_overflow

# Each method was measured to be fastest up to this many tokens. Keys: whether torch has fast int8 products
FEW_PACKED = {True: 48, False: 256}  # torch's int4 product; unpacking beyond
FEW_BFLOAT16 = {True: 12, False: 96}  # bfloat16; one int8 term or float32 beyond
FEW_INTEGERS = 4  # two int8 terms, without a bfloat16 product; one beyond
BLOCK = 1 << 22  # weights unpacked at a time; a quarter of it for float32
X86 = platform.machine() in ("x86_64", "AMD64")
HALF = (torch.float16, torch.bfloat16)


def unavailable(device: torch.device) -> Optional[str]:
    """None on any CPU, else the reason and the remedy."""
    return None if device.type == "cpu" else "it runs on CPUs only: move the model with .cpu()"


# ---- what this torch supports on this CPU ---------------------------------------------------------------------------


@functools.lru_cache(None)
def multiplies_exactly(bits: int) -> bool:
    """Whether torch multiplies int8 by int8, or by int4, exactly on this CPU (needs torch 2.4 with oneDNN, x86).

    Without VNNI, oneDNN adds two products in 16 bits: int4 weights fit, large int8 weights overflow silently.
    """
    if not (X86 and torch.backends.mkldnn.is_available()):
        return False
    x = torch.full((32, 64), 127, dtype=torch.int8, device="cpu")
    weight = torch.full((16, 64), -(1 << bits - 1), dtype=torch.int8, device="cpu").t()
    try:
        products = torch._int_mm(x[:1], weight), torch._int_mm(x, weight)
    except (AttributeError, RuntimeError):
        return False
    return all((y == 64 * 127 * weight[0, 0].int()).all() for y in products)


@functools.lru_cache(None)
def multiplies_integers(bits: int) -> bool:
    """Whether it is also fast: without VNNI, torch may use scalar loops, 20 times slower than float32 (limit: 4)."""
    if not multiplies_exactly(bits):
        return False
    x, weight = (torch.ones(size, dtype=torch.int8, device="cpu") for size in ((32, 256), (256, 512)))
    return _seconds(lambda: torch._int_mm(x, weight)) < 4 * _seconds(lambda: x.float() @ weight.float())


def _seconds(work) -> float:
    """The shortest of five runs of `work`."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


@functools.lru_cache(None)
def has_vector_loops() -> bool:
    """Whether torch multiplies bfloat16 by int8 (torch 2.3) with vectorized code, which its Windows builds lack."""
    try:
        q = torch.ones(16, 16, dtype=torch.int8, device="cpu")
        torch._weight_int8pack_mm(q.bfloat16(), q, q[0].bfloat16())
    except (AttributeError, RuntimeError):
        return False
    if platform.system() == "Windows":
        return False
    return not X86 or torch.backends.cpu.get_cpu_capability() != "DEFAULT"


# ---- torch's int4 layout --------------------------------------------------------------------------------------------


@functools.lru_cache(None)
def rows_of_a_block() -> int:
    """Output rows per block of torch's int4 layout: 64 with AVX512, 32 with AVX2; 0 without a fast int4 product.

    A block is uint8 [in, rows / 2]: byte r holds row r in the low nibble and row r + rows / 2 in the high nibble, each
    plus 8. torch does not document this order, so it is checked on an example.
    """
    if not has_vector_loops() or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return 0
    q = torch.randint(16, (64, 32), dtype=torch.int32, device="cpu", generator=torch.Generator().manual_seed(0))
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    except (AttributeError, RuntimeError):
        return 0
    return next((rows for rows in (64, 32) if torch.equal(_from_blocks(packed, rows).t().int() + 8, q)), 0)


def fits_layout(out_features: int, in_features: int, bits: int, group_size: Optional[int]) -> bool:
    """Whether torch's int4 product supports these weights; others stay in the released packing."""
    if bits != 4 or group_size not in (None, 32, 64, 128, 256) or in_features % 32 or not rows_of_a_block():
        return False
    return out_features % rows_of_a_block() == 0


def layout_shape(out_features: int, in_features: int, bits: int) -> Tuple[int, int]:
    """As in the released packing: only the order of the values differs."""
    return out_features, in_features // 2


def to_layout(weight: Tensor, bits: int) -> Tensor:
    """The released int4 packing, int8 [out, in / 2] -> the layout, uint8 [out, in / 2]."""
    weight = weight.contiguous()
    layout, rows = torch.empty_like(weight, dtype=torch.uint8), _rows(2 * weight.shape[1])
    for begin in range(0, len(weight), rows):
        q = _from_pairs(weight[begin : begin + rows]).t()
        q = torch.stack(q.chunk(2, dim=1), dim=-1).flatten(1)  # even inputs, then odd ones -> their own order
        layout[begin : begin + rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int() + 8, 1)
    return layout


def from_layout(layout: Tensor, out_features: int, in_features: int, bits: int) -> Tensor:
    """Inverse of `to_layout`: uint8 [out, in / 2] -> int8 [out, in / 2]."""
    packed, rows = torch.empty_like(layout, dtype=torch.int8), _rows(in_features)
    for begin in range(0, out_features, rows):
        packed[begin : begin + rows] = pack(_from_blocks(layout[begin : begin + rows], rows_of_a_block()).t())
    return packed


def _rows(in_features: int, weights: int = BLOCK) -> int:
    """Number of rows with this many weights, in whole blocks of torch's int4 layout."""
    return max(weights // max(in_features, 1) // 64, 1) * 64


@functools.lru_cache(8)
def _unit_scales(in_features: int, out_features: int) -> Tensor:
    """Scales of 1 for torch's int4 product, bfloat16 [in / group, out, 2]: the row's scale is applied afterwards."""
    group = next(size for size in (256, 128, 64, 32) if in_features % size == 0)
    return torch.tensor([1, 0], dtype=torch.bfloat16, device="cpu").repeat(in_features // group, out_features, 1)


def _packed_product(x: Tensor, layout: Tensor, weight_scale: Tensor) -> Tensor:
    """x [N, in] times a weight in the layout -> float32 [N, out]."""
    k, out = x.shape[1], layout.shape[0]
    if weight_scale.dim() == 1:
        scales, after = _unit_scales(k, out), weight_scale.float()
    else:
        scales, after = weight_scale.t().to(torch.bfloat16), 1
        scales = torch.stack((scales, torch.zeros_like(scales)), dim=-1)
    group = k // scales.shape[0]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), layout, group, scales).float() * after


# ---- unpacking ------------------------------------------------------------------------------------------------------


# Each returns some rows of the weight, transposed: int8 [in, rows].


def _from_pairs(packed: Tensor) -> Tensor:
    """The released int4 packing, int8 [rows, in / 2]: all even inputs first, as `_even_first` orders x."""
    rows, half = packed.shape
    q = packed.new_empty(rows, 2, half)
    _split(packed, q[:, 1], q[:, 0], flip=True)
    return q.view(rows, 2 * half).t()


def _from_blocks(layout: Tensor, rows: int) -> Tensor:
    """Whole blocks of torch's int4 layout, uint8 [rows, in / 2]: inputs in their own order."""
    k = 2 * layout.shape[1]
    q = layout.new_empty(k, len(layout) // rows, 2, rows // 2, dtype=torch.int8)
    _split(layout.view(torch.int8).view(-1, k, rows // 2).transpose(0, 1), q[:, :, 0], q[:, :, 1], flip=False)
    return q.view(k, len(layout))


def _split(packed: Tensor, low: Tensor, high: Tensor, flip: bool) -> None:
    """Write the two values -8..7 of each byte to `low` and `high`, eight bytes at a time where the shape allows.

    A nibble holds the value plus 8, or (flip) its last four bits, which is the same with the highest bit flipped.
    """
    dtype, mask, highest = torch.uint8, 0x0F, 0x88
    if packed.shape[-1] % 8 == 0 and packed.storage_offset() % 8 == 0:
        dtype, mask, highest = torch.int64, 0x0F0F0F0F0F0F0F0F, 0x8888888888888888 - (1 << 64)
    packed = packed.view(dtype) ^ highest if flip else packed.view(dtype)
    torch.bitwise_and(packed, mask, out=low.view(dtype))
    torch.bitwise_and(packed >> 4, mask, out=high.view(dtype))
    low.sub_(8)
    high.sub_(8)


# ---- products -------------------------------------------------------------------------------------------------------


@without_overflow
def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int) -> Tensor:
    """x [N, in] -> [N, out], with the weight in the released packing."""
    if bits == 8:
        return _by_rows(x, weight.contiguous(), weight_scale, bias, bits, Tensor.t)
    return _by_rows(x, weight.contiguous(), weight_scale, bias, bits, _from_pairs, _even_first)


@without_overflow
def linear_in_layout(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int) -> Tensor:
    """x [N, in] -> [N, out], with the weight in torch's int4 layout."""
    if x.dtype in HALF and 0 < len(x) <= FEW_PACKED[multiplies_integers(bits)]:
        y = _packed_product(x, weight, weight_scale)
        return (y if bias is None else y + bias.float()).to(x.dtype)
    return _by_rows(x, weight, weight_scale, bias, bits, functools.partial(_from_blocks, rows=rows_of_a_block()))


def _by_rows(x, weight, weight_scale, bias, bits, transposed, ordered=lambda inputs: inputs) -> Tensor:
    """x [N, in] -> [N, out], some rows of the weight at a time.

    `transposed` returns these rows as int8 [in, rows]; `ordered` brings [N, in] into the same order of inputs.
    """
    (n, k), out, dtype = x.shape, weight_scale.shape[0], x.dtype
    x = ordered(x.float())
    if dtype in HALF and weight_scale.dim() == 1 and min(n, k) > 0:
        multiply, rows = _by_integers(x, bits)
    else:
        multiply, rows = _by_float32(x)
    y = x.new_empty(n, out, dtype=dtype)
    for begin in range(0, out, rows):
        part = slice(begin, begin + rows)
        q, scale = transposed(weight[part]), weight_scale[part].float()
        if scale.dim() == 2:
            q = q * ordered(scale.repeat_interleave(k // scale.shape[1], dim=1)).t()
            scale = 1
        product = multiply(q) * scale
        y[:, part] = product if bias is None else product.add_(bias[part])
    return y


def _even_first(x: Tensor) -> Tensor:
    """[N, in] in the order of `_from_pairs`."""
    return torch.cat((x[:, 0::2], x[:, 1::2]), dim=1)


# Each takes x [N, in] and returns a function that multiplies it by q [in, rows]; the first three also return how many
# rows to pass at a time.


def _by_float32(x: Tensor):
    return (lambda q: x @ q.float()), _rows(x.shape[1], BLOCK // 4)


def _by_integers(x: Tensor, bits: int):
    """Choose the fastest method for this number of tokens; q is int8."""
    n, k = x.shape
    integers = multiplies_integers(bits)
    if n <= FEW_BFLOAT16[integers] and k % 16 == 0 and has_vector_loops():  # otherwise torch reads past the rows
        return _by_bfloat16(x, bits)
    if not integers:
        return _by_float32(x)
    return (_by_two_terms(x) if n <= FEW_INTEGERS else _by_one_term(x)), _rows(k)


def _by_bfloat16(x: Tensor, bits: int):
    x = x.to(torch.bfloat16)
    rows = _rows(x.shape[1], BLOCK if bits == 4 else 1 << 62)  # int8 is read in place: all rows at once
    return (lambda q: torch._weight_int8pack_mm(x, q.t(), x.new_ones(q.shape[1]))), rows


def _by_two_terms(x: Tensor):
    """x = (first + second / 254) * scale, within 1/64,516 of a token's peak. One token per call is fast in torch."""
    first, scale = _round_tokens(x)
    second = ((x / torch.where(scale == 0, 1, scale) - first) * 254).round_().to(torch.int8)
    pairs = list(zip(first.split(1), second.split(1)))
    return lambda q: torch.cat([torch._int_mm(a, q) + torch._int_mm(b, q) / 254 for a, b in pairs]) * scale


def _by_one_term(x: Tensor):
    """Each token as one int8 term. Channels whose peak exceeds 8 times the median peak are multiplied in float32."""
    peaks = x.abs().amax(dim=0)
    outliers = (peaks > 8 * peaks.nanmedian()).nonzero().flatten()
    x8, scale = _round_tokens(x.index_fill(1, outliers, 0))
    x = x[:, outliers]
    return lambda q: (torch._int_mm(x8, q) * scale).addmm_(x, q[outliers].float())


def _round_tokens(x: Tensor) -> Tuple[Tensor, Tensor]:
    """x [N, in] -> (int8 [N, in], scale [N, 1])."""
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    return (x / torch.where(scale == 0, 1, scale)).round_().to(torch.int8), scale


FAMILY = Family(
    linear, unavailable, Layout(torch.uint8, layout_shape, fits_layout, to_layout, from_layout, linear_in_layout)
)
