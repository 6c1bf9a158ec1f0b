"""Weight-only INT8 and INT4 linear kernels in Triton, for every GPU that Triton compiles for (NVIDIA and ROCm).

    y[n, o] = bias[o] + scale[o] * sum_k q[o, k] * x[n, k]        (a scale per group of k: inside the sum)

The weight stays in the released packing and is restored in registers: no float copy of it ever exists. Sums are
float32. Three kernels:

- `_matvec`, one row: bound by reading the weight, so each thread streams 16-byte runs of it and sums its own columns.
- `_matmul`, two rows and more: the restored tile is the left operand of `tl.dot`, x (transposed) the right one.
- `_sum_splits`: where too few output rows are there to fill the card (up to 16 rows of x), the columns are split as
  well; each split writes float32 sums of its own, and this kernel adds them in order. Nothing is added atomically, so
  the same input gives the same bits each time.

A byte of int4 holds an even and an odd column. They are never put side by side: the sum over the even columns and the
sum over the odd ones are two products, and x is split instead (it is the small one).

Every shape is timed over a few configurations when it is first met, which waits for the GPU: run the model once before
capturing a CUDA graph. Afterwards a call only launches.

For capability 7.5 (Turing) Triton 3.9 makes no tensor-core instructions of `_matmul`: it is correct there, and
quantization_cpm.py, whose prompts go through torch's matmul, may be the better choice. No speed has been measured yet.
"""

from __future__ import annotations

import functools
from typing import Optional

import torch
from torch import Tensor

from .quantization_format import Family

SKINNY_ROWS = 16  # up to here x is one tile wide, and the columns may be split
MAX_SPLITS = 8
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
tl = None  # triton.language: Triton looks a kernel's names up among this module's globals, where `kernels` puts it


def unavailable(device: torch.device) -> Optional[str]:
    """None where the kernels run on `device`, else one sentence: why not, and what would make them run."""
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA or ROCm GPU, not {device.type}: move the model with .to('cuda')"
    try:
        import triton

        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 2):
            return f"Triton {triton.__version__} cannot compile the kernels: Triton 3.2, which torch 2.6 brings, can"
        with torch.cuda.device(device):
            target = triton.runtime.driver.active.get_current_target()  # builds Triton's launcher with the C compiler
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton (on Windows triton-windows)"
    except Exception as error:  # whatever keeps the launcher from starting, a model that can go without it goes on
        reason = " ".join(str(error).split())
        return f"Triton cannot start ({reason}): it needs the GPU's driver, and gcc, clang or CC set to a C compiler"
    if target.backend == "cuda" and target.arch < 75:
        capability = f"{target.arch // 10}.{target.arch % 10}"
        return f"Triton needs compute capability 7.5 or later, and this card has {capability}: use backend='cpm'"
    return None


@torch.no_grad()
def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int) -> Tensor:
    """x [N, in] times the restored weight, transposed, plus bias -> [N, out], in x's dtype.

    x: float16, bfloat16 or float32, contiguous, N >= 0. weight: int8 [out, in], or [out, in / 2] packed (bits 4).
    weight_scale: [out] or [out, in / group_size], any float dtype. bias: [out] or None. TypeError for another x.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}: the Triton kernels take {', '.join(map(str, DTYPES))}")
    (rows, columns), (out, width) = x.shape, weight.shape  # width: bytes a row
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    if 0 in (rows, columns, out):
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    launch = kernels()
    group = width // weight_scale.shape[1] if weight_scale.dim() == 2 else 0  # bytes under one scale, 0: the whole row
    bucket = next((limit for limit in (1, SKINNY_ROWS, 64, 256) if rows <= limit), 1024)  # what the tuning goes by
    skinny = rows <= SKINNY_ROWS
    splits, part = 1, y
    if skinny:
        tile = 8 if rows == 1 else 64  # output rows a program, roughly
        splits = max(1, min(MAX_SPLITS, programs_wanted(x.device) * tile // out, width // 512))
    if splits > 1:
        part = torch.empty(splits, rows, out, dtype=torch.float32, device=x.device)
    if bits == 4 and skinny:  # an even and an odd column as one word, which the kernel takes apart
        x = x if x.storage_offset() % 2 == 0 else x.clone()
        x = x.view(torch.int64 if x.dtype == torch.float32 else torch.int32)
    elif bits == 4:  # [N, even columns | odd columns]: tiles that load without a stride
        x = x.view(rows, width, 2).transpose(1, 2).contiguous()
    arguments = (x, weight, weight_scale, bias, part, rows, width, out, bucket)
    constants = dict(
        BITS=bits,
        X=getattr(tl, DTYPES[y.dtype]),
        GROUP=group,
        SEGMENT=min(group & -group, 32) or 16,  # bytes summed before their scale is applied: a power of two
        SPLITS=splits,
        enable_fp_fusion=True,  # multiply-adds, which Triton 3.10 no longer makes unless told to
    )
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if rows == 1:
            launch["matvec"][lambda meta: (-(-out // meta["BLOCK_O"]), splits)](*arguments, **constants)
        else:
            launch["skinny" if skinny else "matmul"][
                lambda meta: (-(-out // meta["BLOCK_O"]) * -(-rows // meta["BLOCK_N"]), splits)
            ](*arguments, PAIRS=skinny, **constants)
        if splits > 1:
            launch["sum_splits"][(-(-out // 256), rows)](part, bias, y, rows, out, SPLITS=splits, BLOCK_O=256)
    return y


@functools.lru_cache(None)
def programs_wanted(device: torch.device) -> int:
    """Programs that keep the card's memory busy: two for each multiprocessor."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


# ---- the kernels: plain functions until `kernels` wraps them, so that importing this file imports no Triton ---------


def _int4(packed):
    """(even, odd) columns, float32, of int8 bytes holding two's complement nibbles, the even column's in the high one.

    A nibble with its sign bit flipped becomes the low mantissa bits of 2^23; subtracting 2^23 and the 8 that the flip
    added leaves the value. It is exact, and needs no integer-to-float instruction, which NVIDIA's cards issue at a
    fraction of the rate. The high nibble is not shifted: it stands 16 times too high, and a multiply-add corrects that.
    """
    packed = packed.to(tl.int32)
    even = ((packed & 0xF0) ^ 0x4B000080).to(tl.float32, bitcast=True) * 0.0625 - 524296.0
    odd = ((packed & 0x0F) ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0
    return even, odd


def _int8(byte):
    """int8 as float32, by the same way."""
    return ((byte.to(tl.int32) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


def _pair(word, X: tl.constexpr):
    """(even, odd) columns of x from words of two."""
    if X == tl.float32:
        even, odd = word.to(tl.int32), (word >> 32).to(tl.int32)
    else:
        even, odd = word.to(tl.int16), (word >> 16).to(tl.int16)
    return even.to(X, bitcast=True), odd.to(X, bitcast=True)


def _segment_scales(
    scale_ptr, outs, start, width, out, GROUP: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_P: tl.constexpr
):
    """float32 [BLOCK_O, BLOCK_P / SEGMENT]: the scale of each segment from byte `start` on."""
    first = start + tl.arange(0, BLOCK_P // SEGMENT) * SEGMENT
    offsets = outs[:, None].to(tl.int64) * (width // GROUP) + first[None, :] // GROUP
    return tl.load(scale_ptr + offsets, (outs[:, None] < out) & (first[None, :] < width), other=0).to(tl.float32)


def _matvec(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, rows, width, out, bucket,
    BITS: tl.constexpr, X: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One row of x: program (i, s) computes BLOCK_O outputs over split s of the bytes, BLOCK_P at a time."""
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    chunk = tl.cdiv(tl.cdiv(width, BLOCK_P), SPLITS) * BLOCK_P
    first = tl.program_id(1) * chunk
    sums = tl.zeros([BLOCK_O, BLOCK_P // SEGMENT], tl.float32)
    for start in range(first, tl.minimum(first + chunk, width), BLOCK_P):
        cols = start + tl.arange(0, BLOCK_P)
        offsets = outs[:, None].to(tl.int64) * width + cols[None, :]
        inside = (outs[:, None] < out) & (cols[None, :] < width)
        w = tl.load(weight_ptr + offsets, inside, other=0, eviction_policy="evict_first")  # read once: keep x cached
        x = tl.load(x_ptr + cols, cols < width, other=0)
        if BITS == 4:
            w_even, w_odd = _int4(w)
            x_even, x_odd = _pair(x, X)
            product = w_even * x_even.to(tl.float32)[None, :] + w_odd * x_odd.to(tl.float32)[None, :]
        else:
            product = _int8(w) * x.to(tl.float32)[None, :]
        partial = tl.sum(tl.reshape(product, [BLOCK_O, BLOCK_P // SEGMENT, SEGMENT]), axis=2)
        if GROUP:
            partial *= _segment_scales(scale_ptr, outs, start, width, out, GROUP, SEGMENT, BLOCK_P)
        sums += partial
    y = tl.sum(sums, axis=1)  # (BLOCK_O,)
    if not GROUP:
        y *= tl.load(scale_ptr + outs, outs < out, other=0).to(tl.float32)
    if SPLITS == 1 and bias_ptr is not None:
        y += tl.load(bias_ptr + outs, outs < out, other=0).to(tl.float32)
    tl.store(y_ptr + tl.program_id(1) * out + outs, y.to(y_ptr.dtype.element_ty), outs < out)


def _matmul(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, rows, width, out, bucket,
    BITS: tl.constexpr, X: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, SPLITS: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A tile of y, transposed: program (i, s) computes [BLOCK_O, BLOCK_N] over split s of the bytes, BLOCK_P at a time.

    Int4's x is words of two columns with PAIRS, else [N, 2, width]. With groups, a restored weight q * scale is rounded
    to x's dtype, as a dequantized one is; a scale per row is applied to the finished float32 sum.
    """
    tiles_o, tiles_n = tl.cdiv(out, BLOCK_O), tl.cdiv(rows, BLOCK_N)
    band = tl.program_id(0) // (16 * tiles_o)  # 16 tiles of x are kept in the cache while the weight passes by
    height = tl.minimum(tiles_n - band * 16, 16)
    inside = tl.program_id(0) % (16 * tiles_o)
    outs = inside // height * BLOCK_O + tl.arange(0, BLOCK_O)
    ns = (band * 16 + inside % height) * BLOCK_N + tl.arange(0, BLOCK_N)
    planes: tl.constexpr = 2 if BITS == 4 and not PAIRS else 1
    chunk = tl.cdiv(tl.cdiv(width, BLOCK_P), SPLITS) * BLOCK_P
    first = tl.program_id(1) * chunk
    sums = tl.zeros([BLOCK_O, BLOCK_N], tl.float32)
    for start in range(first, tl.minimum(first + chunk, width), BLOCK_P):
        cols = start + tl.arange(0, BLOCK_P)
        offsets = outs[:, None].to(tl.int64) * width + cols[None, :]
        w = tl.load(weight_ptr + offsets, (outs[:, None] < out) & (cols[None, :] < width), other=0)
        x_ptrs = x_ptr + ns[None, :].to(tl.int64) * (planes * width) + cols[:, None]
        inside_x = (ns[None, :] < rows) & (cols[:, None] < width)
        x = tl.load(x_ptrs, inside_x, other=0)
        if GROUP:
            scales = _segment_scales(scale_ptr, outs, start, width, out, GROUP, SEGMENT, BLOCK_P)[:, :, None]
            scales = tl.broadcast_to(scales, [BLOCK_O, BLOCK_P // SEGMENT, SEGMENT])
            scales = tl.reshape(scales, [BLOCK_O, BLOCK_P])
        if BITS == 4:
            w_even, w_odd = _int4(w)
            if GROUP:
                w_even, w_odd = w_even * scales, w_odd * scales
            if PAIRS:
                x, x_odd = _pair(x, X)
            else:
                x_odd = tl.load(x_ptrs + width, inside_x, other=0)
            sums = tl.dot(w_even.to(X), x, sums, input_precision="ieee")
            sums = tl.dot(w_odd.to(X), x_odd, sums, input_precision="ieee")
        else:
            w_all = _int8(w)
            if GROUP:
                w_all *= scales
            sums = tl.dot(w_all.to(X), x, sums, input_precision="ieee")
    if not GROUP:
        sums *= tl.load(scale_ptr + outs, outs < out, other=0).to(tl.float32)[:, None]
    if SPLITS == 1 and bias_ptr is not None:
        sums += tl.load(bias_ptr + outs, outs < out, other=0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + (tl.program_id(1) * rows + ns[None, :]).to(tl.int64) * out + outs[:, None]
    tl.store(y_ptrs, sums.to(y_ptr.dtype.element_ty), (outs[:, None] < out) & (ns[None, :] < rows))


def _sum_splits(part_ptr, bias_ptr, y_ptr, rows, out, SPLITS: tl.constexpr, BLOCK_O: tl.constexpr):
    """y [N, out] = the sum, in order, of part [SPLITS, N, out] + bias."""
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.program_id(1).to(tl.int64)
    sums = tl.zeros([BLOCK_O], tl.float32)
    for split in range(SPLITS):
        sums += tl.load(part_ptr + (split * rows + row) * out + outs, outs < out, other=0)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + outs, outs < out, other=0).to(tl.float32)
    tl.store(y_ptr + row * out + outs, sums.to(y_ptr.dtype.element_ty), outs < out)


@functools.lru_cache(None)
def kernels() -> dict:
    """The kernels by name, ready to launch. The first call imports Triton."""
    import triton
    import triton.language

    names = globals()
    names["tl"] = triton.language
    for helper in (_int4, _int8, _pair, _segment_scales):
        names[helper.__name__] = triton.jit(getattr(helper, "fn", helper))  # two threads may come here at once
    jit = triton.jit(do_not_specialize=["rows", "bucket"])  # one build for every N

    def tuned(kernel, blocks, configs):
        """`kernel`, timed where a shape is new over configs: the sizes of `blocks`, then warps and pipeline stages."""

        def prune(configs, named_args, **meta):  # float32 has no tensor cores here, and large tiles would not fit
            small = [c for c in configs if c.kwargs["BLOCK_O"] * c.kwargs.get("BLOCK_N", 1) <= 4096]
            return small if meta["X"] == tl.float32 else configs

        configs = [triton.Config(dict(zip(blocks, c)), num_warps=c[-2], num_stages=c[-1]) for c in configs]
        key = ["width", "out", "bucket", "BITS", "GROUP", "SPLITS"]
        return triton.autotune(configs, key=key, prune_configs_by={"early_config_prune": prune})(kernel)

    vector = [(8, 512, 4, 1), (4, 1024, 4, 1), (8, 1024, 4, 1), (16, 512, 4, 1), (4, 2048, 4, 1)]
    skinny = [(16, 64, 64, 4, 4), (16, 64, 128, 4, 3), (16, 32, 128, 4, 4), (16, 32, 64, 4, 4)]
    tiles = [(64, 64, 32, 4, 2), (32, 64, 64, 4, 3), (64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 3)]
    matmul = jit(_matmul)
    return {
        "matvec": tuned(jit(_matvec), ("BLOCK_O", "BLOCK_P"), vector),
        "skinny": tuned(matmul, ("BLOCK_N", "BLOCK_O", "BLOCK_P"), skinny),
        "matmul": tuned(matmul, ("BLOCK_N", "BLOCK_O", "BLOCK_P"), tiles),
        "sum_splits": jit(_sum_splits),
    }


FAMILY = Family(linear, unavailable)
