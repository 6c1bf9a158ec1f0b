"""CPU kernels in C (`quantization_cpu_source`) for Linux on x86-64, compiled at first use.

Half-precision inputs are rounded to int8 in groups of 128 (or the weight's group size, if smaller) with one scale each,
as llama.cpp does, and multiplied with the int8 dot products of AVX512-VNNI or AVX2. Float32 inputs stay in float32.
"""

import ctypes
import functools
import mmap
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .c_library import ADDRESS, INT, LONG, load
from .quantization_cpu_avx2 import MOST
from .quantization_cpu_source import PANEL, PANEL_FLOAT32, TYPES, WIDEST, source
from .quantization_format import Family, Layout, check_finite, check_shape, quantize_weight, without_overflow
from .quantization_stock import linear as stock_linear
from .torch_compat import needs_dispatch

ROWS, GROUP = 32, 128  # a block of the layout: output rows, inputs
FUNCTIONS = {  # of the C library, with their arguments
    "linear": [ADDRESS] * 6 + [LONG] * 5 + [INT] * 4,
    "linear_float32": [ADDRESS] * 6 + [LONG] * 4 + [INT] * 3,
    "lay_out": [ADDRESS] * 2 + [LONG] * 2 + [INT] * 3,
    "quantize": [ADDRESS] * 3 + [LONG] * 2 + [INT] * 3,
}


@functools.lru_cache(None)
def load_library() -> Tuple[Optional[ctypes.CDLL], str]:
    """Return (the compiled library, "") or (None, the reason and the remedy)."""
    return load("quantization_cpu", source, FUNCTIONS)


def unavailable(device: torch.device) -> Optional[str]:
    """None if the compiled kernels run on `device`, else the reason and the remedy."""
    if device.type != "cpu":
        return "it runs on CPUs only: move the model with .cpu()"
    return load_library()[1] or None


# ---- layout and kernels ---------------------------------------------------------------------------------------------


def _padded(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


def _on_large_pages(size: int) -> Tensor:
    """`size` bytes as int8, on 2 MiB pages if the system has them: 20% faster to read sequentially."""
    if size < 1 << 20 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.int8, device="cpu")
    page = 1 << 21
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # not supported: use ordinary pages
        pass
    whole = torch.frombuffer(memory, dtype=torch.int8)
    begin = -whole.data_ptr() % page
    return whole[begin : begin + size]


def fits_layout(out_features: int, in_features: int, bits: int, group_size: Optional[int]) -> bool:
    """Whether the C code supports this group size; torch multiplies by other weights, in the released packing."""
    return in_features > 0 and (group_size in (None, 32, 64) or group_size % GROUP == 0)


@functools.lru_cache(None)
def layout_shape(out_features: int, in_features: int, bits: int) -> Tuple[int, int, int]:
    """[out / 32, in / step, 128], padded to whole blocks: a step is 4 inputs (int8) or 8 (int4) of 32 rows."""
    return _padded(out_features, ROWS) // ROWS, _padded(in_features, GROUP) * bits // 32, ROWS * 4


def to_layout(weight: Tensor, bits: int) -> Tensor:
    """The released packing, int8 [out, in] or [out, in / 2] -> the layout, int8 of `layout_shape`."""
    (out, columns), weight = weight.shape, weight.contiguous()
    shape = layout_shape(out, columns * 8 // bits, bits)
    layout = _on_large_pages(shape[0] * shape[1] * shape[2]).view(shape)
    _call("lay_out", weight, layout, out, columns, bits, False, torch.get_num_threads())
    return layout


def from_layout(layout: Tensor, out_features: int, in_features: int, bits: int) -> Tensor:
    """The inverse of `to_layout`."""
    if layout.device.type != "cpu" or needs_dispatch(layout.detach()):  # for example, a compiled backward
        return from_layout_reference(layout, out_features, in_features, bits)
    shape = out_features, in_features * bits // 8
    packed = _on_large_pages(shape[0] * shape[1]).view(shape)
    _call("lay_out", packed, layout.contiguous(), *shape, bits, True, torch.get_num_threads())
    return packed


def to_layout_reference(weight: Tensor, bits: int) -> Tensor:
    """`to_layout` in plain torch."""
    blocks, steps, _ = shape = layout_shape(weight.shape[0], weight.shape[1] * 8 // bits, bits)
    rows = F.pad(weight, (0, steps * 4 - weight.shape[1], 0, blocks * ROWS - weight.shape[0]))
    rows = rows.view(blocks, ROWS, steps, 4)  # 4 bytes per row and step for int8 and int4
    if bits == 8:
        rows = rows ^ -128
    else:  # nibbles (0, 1) (2, 3) (4, 5) (6, 7) -> (4, 0) (5, 1) (6, 2) (7, 3), high first, each with q + 8
        inputs = torch.stack((rows >> 4 & 15, rows & 15), dim=-1).flatten(-2) ^ 8
        rows = inputs[..., 4:] << 4 | inputs[..., :4]
    return rows.transpose(1, 2).reshape(shape)


def from_layout_reference(layout: Tensor, out_features: int, in_features: int, bits: int) -> Tensor:
    """`from_layout` in plain torch, on any device."""
    rows = layout.unflatten(-1, (ROWS, 4)).transpose(1, 2)  # [block, row, step, byte]
    if bits == 8:
        rows = rows ^ -128
    else:
        inputs = torch.cat((rows & 15, rows >> 4 & 15), dim=-1) ^ 8
        rows = inputs[..., 0::2] << 4 | inputs[..., 1::2]
    return rows.flatten(2).flatten(0, 1)[:out_features, : in_features * bits // 8].contiguous()


def quantize(weight: Tensor, bits: int, group_size: Optional[int]) -> Tuple[Tensor, Tensor]:
    """`quantize_weight`, bit for bit, in one pass over the weight."""
    if weight.dtype not in TYPES or not weight.is_contiguous():
        return quantize_weight(weight, bits, group_size)
    out, columns = weight.shape
    check_shape(weight, bits, group_size)
    groups = (out,) if group_size is None else (out, columns // group_size)
    packed = _on_large_pages(out * columns * bits // 8).view(out, columns * bits // 8)
    scale = torch.empty(groups, dtype=weight.dtype, device="cpu")
    options = group_size or columns, bits, TYPES[weight.dtype], torch.get_num_threads()
    _call("quantize", weight, packed, scale, scale.numel(), *options)
    check_finite(scale)
    return packed, scale


def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int) -> Tensor:
    """x [N, in] -> [N, out], with the weight in the layout."""
    product = _without_overflow if x.dtype == torch.float32 else _linear  # half precision is scaled before it is summed
    return product(x, weight, weight_scale, bias, bits)


def _linear(x, weight, weight_scale, bias, bits):
    (n, k), out, threads = x.shape, weight_scale.shape[0], torch.get_num_threads()
    groups, group = groups_of(weight_scale, k)
    weight_scale, y = weight_scale.contiguous(), x.new_empty(n, out)
    bias = None if bias is None else bias.to(weight_scale.dtype).contiguous()
    scratch = torch.empty(scratch_bytes(n, k, groups, group, threads, x.dtype), dtype=torch.int8, device="cpu")
    types = TYPES[x.dtype], TYPES[weight_scale.dtype], threads
    if x.dtype == torch.float32:
        _call("linear_float32", x, y, weight, weight_scale, bias, scratch, n, k, out, groups, bits, *types[1:])
    else:
        _call("linear", x, y, weight, weight_scale, bias, scratch, n, k, out, groups, group, bits, *types)
    return y


def groups_of(weight_scale: Tensor, k: int) -> Tuple[int, int]:
    """(scales of a row, inputs that share an activation scale) of a weight with k inputs."""
    if weight_scale.dim() == 1:
        return 1, GROUP
    groups = weight_scale.shape[1]
    return groups, min(k // groups, GROUP)


@functools.lru_cache
def scratch_bytes(n: int, k: int, groups: int, group: int, threads: int, dtype: torch.dtype) -> int:
    """Bytes that the C functions `linear` and, for float32, `linear_float32` need."""
    width, together, tables = _padded(k, GROUP), min(n + 3, MOST), threads * groups * ROWS * 4  # scales, in float32
    if dtype == torch.float32:
        return tables + 4 * _padded(min(n, PANEL_FLOAT32), 8) * width
    inputs = (min(n, PANEL) + WIDEST) * (width + 8 * (width // group))
    # `prompt` of AVX2 has 16 bits for an input, and for each thread a strip of weights and sums
    prompt = together * (2 * width + 8 * (width // group)) + threads * (64 * group + 128 + 128 * together)
    return tables + max(inputs, prompt)


_without_overflow = without_overflow(_linear)


def _call(name, *arguments):
    """Call a function of the C library with the tensors' addresses."""
    getattr(load_library()[0], name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


# A weight in the released packing uses torch's operators: converting it for a single call would take longer.
FAMILY = Family(
    stock_linear, unavailable, Layout(torch.int8, layout_shape, fits_layout, to_layout, from_layout, linear), quantize
)
