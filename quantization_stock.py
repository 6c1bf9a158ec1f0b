"""The CPU kernels where nothing can be compiled: torch's own operators, on any CPU and system.

Float32 inputs, and weights in groups, are multiplied in float32. Half precision is multiplied by int8 weights: a few
tokens in bfloat16 or as two int8 terms, more of them as one, but for the channels that stand far out. int4 weights are
unpacked some rows at a time; where torch has an int4 product in vector code, they are held in its layout instead, and
a few tokens are multiplied in bfloat16, in groups too, whose scales it then rounds to bfloat16.
"""

import functools
import platform
import time
from typing import Optional, Tuple

import torch
from torch import Tensor

# Up to so many tokens each way was measured to be the faster one, beside fast int8 products and without them
FEW_PACKED = {True: 48, False: 256}  # torch's int4 product; beyond, unpacking
FEW_BFLOAT16 = {True: 12, False: 96}  # bfloat16; beyond, one int8 term, or float32
FEW_INTEGERS = 4  # two int8 terms, where there is no bfloat16 product; beyond, one
BLOCK = 1 << 22  # weights unpacked, or read twice, at a time; a quarter of it where they become float32
X86 = platform.machine() in ("x86_64", "AMD64")


def unavailable(device: torch.device) -> Optional[str]:
    """None on any CPU, else what would make torch's CPU operators run."""
    return None if device.type == "cpu" else "it computes on the CPU; move the model there with .cpu()"


# ---- what this torch can do on this CPU -----------------------------------------------------------------------------


@functools.lru_cache(None)
def multiplies_exactly(bits: int) -> bool:
    """Whether torch multiplies int8 by int8, or by int4, on this CPU (torch 2.4 with oneDNN, x86), and exactly.

    Without VNNI instructions oneDNN adds two products in 16 bits: int4 weights fit, large int8 ones overflow unseen.
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
    """Whether it also pays: without VNNI torch may take plain loops, 20 times slower than float32 (the limit is 4)."""
    if not multiplies_exactly(bits):
        return False
    x, weight = (torch.ones(size, dtype=torch.int8, device="cpu") for size in ((32, 256), (256, 512)))
    return _seconds(lambda: torch._int_mm(x, weight)) < 4 * _seconds(lambda: x.float() @ weight.float())


def _seconds(work) -> float:
    """The shortest of five times that `work` takes."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


@functools.lru_cache(None)
def has_vector_loops() -> bool:
    """Whether torch multiplies bfloat16 by int8 (torch 2.3), and in vector code, which builds for Windows lack."""
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
    """Output rows in a block of torch's int4 layout: 64 with AVX512, 32 with AVX2; 0 where there is no fast product.

    A block is uint8 [in, rows / 2]: byte r holds row r in the low nibble and row r + rows / 2 in the high one, each
    with 8 added. torch does not promise it, so a trial decides.
    """
    if not has_vector_loops() or not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return 0
    q = torch.randint(16, (64, 32), dtype=torch.int32, device="cpu", generator=torch.Generator().manual_seed(0))
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    except (AttributeError, RuntimeError):
        return 0
    return next((rows for rows in (64, 32) if torch.equal(_from_blocks(packed, rows).t().int() + 8, q)), 0)


def readable(out_features: int, in_features: int, bits: int, group_size: Optional[int]) -> bool:
    """Whether torch's int4 product takes these weights; others stay in the released packing."""
    if bits != 4 or group_size not in (None, 32, 64, 128, 256) or in_features % 32 or not rows_of_a_block():
        return False
    return out_features % rows_of_a_block() == 0


def to_layout(weight: Tensor, bits: int) -> Tensor:
    """The released packing, int8 [out, in / 2] -> the layout in as many bytes, uint8 [out, in / 2]."""
    weight = weight.contiguous()
    layout, rows = torch.empty_like(weight, dtype=torch.uint8), _rows(2 * weight.shape[1])
    for begin in range(0, len(weight), rows):
        q = _integers(weight[begin : begin + rows], bits).t()
        q = torch.stack(q.chunk(2, dim=1), dim=-1).flatten(1)  # even inputs, then odd ones -> their own order
        layout[begin : begin + rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int() + 8, 1)
    return layout


def from_layout(layout: Tensor, out_features: int, in_features: int, bits: int) -> Tensor:
    """The reverse of `to_layout`: uint8 [out, in / 2] -> int8 [out, in / 2]."""
    packed, rows = torch.empty_like(layout, dtype=torch.int8), _rows(in_features)
    for begin in range(0, out_features, rows):
        q = _integers(layout[begin : begin + rows], bits).t()
        packed[begin : begin + rows] = (q[:, 0::2] & 15) << 4 | (q[:, 1::2] & 15)
    return packed


def _rows(in_features: int, weights: int = BLOCK) -> int:
    """How many rows are so many weights, in whole blocks of torch's int4 layout."""
    return max(weights // max(in_features, 1) // 64, 1) * 64


@functools.lru_cache(8)
def _unit_scales(in_features: int, out_features: int) -> Tensor:
    """torch's int4 product with scales of 1, bfloat16 [in / group, out, 2]: the row's own scale comes after it."""
    group = next(size for size in (256, 128, 64, 32) if in_features % size == 0)
    return torch.tensor([1, 0], dtype=torch.bfloat16, device="cpu").repeat(in_features // group, out_features, 1)


def _packed_product(x: Tensor, layout: Tensor, weight_scale: Tensor) -> Tensor:
    """x [N, in] times a weight in the layout, float32 [N, out]."""
    k, out = x.shape[1], layout.shape[0]
    if weight_scale.dim() == 1:
        scales, after = _unit_scales(k, out), weight_scale.float()
    else:
        scales, after = weight_scale.t().to(torch.bfloat16), 1
        scales = torch.stack((scales, torch.zeros_like(scales)), dim=-1)
    group = k // scales.shape[0]
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), layout, group, scales).float() * after


# ---- unpacking ------------------------------------------------------------------------------------------------------


def _integers(weight: Tensor, bits: int) -> Tensor:
    """The weight of some rows, transposed: int8 [in, rows]. From the released int4 packing even inputs come first."""
    if bits == 8:
        return weight.t()
    if weight.dtype == torch.uint8:
        return _from_blocks(weight, rows_of_a_block())
    rows, half = weight.shape
    q = weight.new_empty(rows, 2, half)
    _split(weight, q[:, 1], q[:, 0], flip=True)
    return q.view(rows, 2 * half).t()


def _from_blocks(layout: Tensor, rows: int) -> Tensor:
    """`_integers` of whole blocks of torch's int4 layout: inputs in their own order."""
    k = 2 * layout.shape[1]
    q = layout.new_empty(k, len(layout) // rows, 2, rows // 2, dtype=torch.int8)
    _split(layout.view(torch.int8).view(-1, k, rows // 2).transpose(0, 1), q[:, :, 0], q[:, :, 1], flip=False)
    return q.view(k, len(layout))


def _split(packed: Tensor, low: Tensor, high: Tensor, flip: bool) -> None:
    """Write each byte's two values of -8..7 into `low` and `high`, eight bytes at a time where the shape allows.

    A nibble holds the value with 8 added, or (flip) its last four bits, which is the same with the highest bit flipped.
    """
    dtype, mask, highest = torch.uint8, 0x0F, 0x88
    if packed.shape[-1] % 8 == 0 and packed.storage_offset() % 8 == 0:
        dtype, mask, highest = torch.int64, 0x0F0F0F0F0F0F0F0F, 0x8888888888888888 - (1 << 64)
    packed = packed.view(dtype) ^ highest if flip else packed.view(dtype)
    torch.bitwise_and(packed, mask, out=low.view(dtype))
    torch.bitwise_and(packed >> 4, mask, out=high.view(dtype))
    low.sub_(8)
    high.sub_(8)


# ---- multiplying ----------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int) -> Tensor:
    """x [N, in] -> [N, out]. `weight` is in the released packing or in torch's int4 layout."""
    (n, k), out, dtype = x.shape, weight_scale.shape[0], x.dtype
    half, laid_out, weight = dtype in (torch.float16, torch.bfloat16), weight.dtype == torch.uint8, weight.contiguous()
    if laid_out and half and 0 < n <= FEW_PACKED[multiplies_integers(bits)]:
        y = _packed_product(x, weight, weight_scale)
        return (y if bias is None else y + bias.float()).to(dtype)
    even_first = bits == 4 and not laid_out
    x = _even_first(x.float()) if even_first else x.float()
    if half and weight_scale.dim() == 1 and min(n, k) > 0:
        multiply, rows = _by_integers(x, bits)
    else:
        multiply, rows = _by_float32(x)
    y = x.new_empty(n, out, dtype=dtype)
    for begin in range(0, out, rows):
        part = slice(begin, begin + rows)
        q, scale = _integers(weight[part], bits), weight_scale[part].float()
        if scale.dim() == 2:
            scale = scale.repeat_interleave(k // scale.shape[1], dim=1)
            q = q * (_even_first(scale) if even_first else scale).t()
            scale = 1
        product = multiply(q) * scale
        y[:, part] = product if bias is None else product.add_(bias[part])
    return y


def _even_first(x: Tensor) -> Tensor:
    """[N, in] in the order in which `_integers` unpacks the released int4 packing."""
    return torch.cat((x[:, 0::2], x[:, 1::2]), dim=1)


# Each takes x [N, in], and returns what multiplies it by q [in, rows] to [N, rows]; the first three also for how many
# rows at a time.


def _by_float32(x: Tensor):
    return (lambda q: x @ q.float()), _rows(x.shape[1], BLOCK // 4)


def _by_integers(x: Tensor, bits: int):
    """The fastest way for so many tokens; q is int8."""
    n, k = x.shape
    integers = multiplies_integers(bits)
    if n <= FEW_BFLOAT16[integers] and k % 16 == 0 and has_vector_loops():  # other k: torch reads past the rows
        return _by_bfloat16(x, bits)
    if not integers:
        return _by_float32(x)
    return (_by_two_terms(x) if n <= FEW_INTEGERS else _by_one_term(x)), _rows(k)


def _by_bfloat16(x: Tensor, bits: int):
    x = x.to(torch.bfloat16)
    rows = _rows(x.shape[1], BLOCK if bits == 4 else 1 << 62)  # int8 is read where it lies, all rows at once
    return (lambda q: torch._weight_int8pack_mm(x, q.t(), x.new_ones(q.shape[1]))), rows


def _by_two_terms(x: Tensor):
    """x = (first + second / 254) * scale, to a 64,516th of a token's peak; torch is fast with one token at a time."""
    first, scale = _round_tokens(x)
    second = ((x / torch.where(scale == 0, 1, scale) - first) * 254).round_().to(torch.int8)
    pairs = list(zip(first.split(1), second.split(1)))
    return lambda q: torch.cat([torch._int_mm(a, q) + torch._int_mm(b, q) / 254 for a, b in pairs]) * scale


def _by_one_term(x: Tensor):
    """Each token as one int8 term, but for the channels whose peak is above 8 times the middle one: in float32."""
    peaks = x.abs().amax(dim=0)
    outliers = (peaks > 8 * peaks.nanmedian()).nonzero().flatten()
    x8, scale = _round_tokens(x.index_fill(1, outliers, 0))
    x = x[:, outliers]
    return lambda q: (torch._int_mm(x8, q) * scale).addmm_(x, q[outliers].float())


def _round_tokens(x: Tensor) -> Tuple[Tensor, Tensor]:
    """x [N, in] -> (int8 [N, in], scale [N, 1])."""
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    return (x / torch.where(scale == 0, 1, scale)).round_().to(torch.int8), scale
