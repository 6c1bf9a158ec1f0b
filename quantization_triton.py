"""Weight-only INT8 and INT4 linear kernels in Triton, for every GPU that Triton supports (NVIDIA and ROCm).

    y[n, o] = bias[o] + scale[o] * sum_k q[o, k] * x[n, k]        (a scale per group of k: inside the sum)

The weight stays in the released packing. Sums are float32 and use no atomics, so results are deterministic. The rows of
x choose the kernel:

- `_skinny`, 1 to 16 rows: bound by reading the weight. A program computes a few outputs; its warps split the columns,
  dequantize the weight in registers and multiply on the tensor cores, even for one row: that takes 4 to 5 machine
  instructions per byte of int4; unpacking it and summing in float32 would take 11.
- `_tile`, up to FUSED_ROWS: the dequantized tile of the weight is the left operand of `tl.dot`, x (transposed) the
  right one.
- `_dequantize`, for more rows: PIECE bytes of the weight at a time are dequantized to x's dtype; torch multiplies.
- `_matvec`, one row in float32, or on a card without tensor cores for x's dtype; there, more rows use `_dequantize`.

A byte of int4 holds an even and an odd column. They are not interleaved: even and odd columns are two products, and x,
the smaller operand, is split instead.

Tile sizes are fixed in `tile_for`; nothing is tuned at run time. `python benchmarks gpu --only tune` times others.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .quantization_format import Family

SKINNY_ROWS, FUSED_ROWS = 16, 256  # most rows for `_skinny`, and for `_tile`
PIECE = 64 << 20  # most bytes of dequantized weight at a time
DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
tl = None  # triton.language, set by `kernels`: Triton looks up a kernel's names among this module's globals


def unavailable(device: torch.device) -> Optional[str]:
    """None if the kernels run on `device`, else one sentence with the reason and the remedy."""
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA or ROCm GPU, not {device.type}: move the model with .to('cuda')"
    try:
        import triton

        if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 2):
            return f"Triton {triton.__version__} cannot compile the kernels: they need 3.2, which comes with torch 2.6"
        with torch.cuda.device(device):
            target = triton.runtime.driver.active.get_current_target()  # builds Triton's launcher with the C compiler
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton (on Windows triton-windows)"
    except Exception as error:  # whatever the launcher raises, another backend may still work
        reason = " ".join(str(error).split())
        return (
            f"Triton cannot start ({reason}): it needs the GPU's driver and a C compiler: gcc, clang, or the one in CC"
        )
    if target.backend == "cuda" and target.arch < 75:
        capability = f"{target.arch // 10}.{target.arch % 10}"
        return f"Triton needs compute capability 7.5 or later, but this card has {capability}: use backend='cpm'"
    try:
        multiply_two_weights(device)
    except Exception as error:  # whatever the compiler says of a card that is newer than it
        reason = " ".join(str(error).split())[:200]
        return f"Triton {triton.__version__} cannot compile for this card ({reason}): upgrade it"
    return None


def multiply_two_weights(device: torch.device) -> None:
    """A trial of the compiler."""
    like = dict(dtype=torch.float32, device=device)
    linear(torch.ones(1, 2, **like), torch.ones(1, 2, **{**like, "dtype": torch.int8}), torch.ones(1, **like), None, 8)


@functools.lru_cache(None)
def runs_on(device: torch.device) -> bool:
    """Whether Triton runs on the device; it is tried once."""
    return unavailable(device) is None


def on_its_device(launch):
    """Decorator of a function that launches kernels, which Triton does on the current device: that becomes x's."""

    @functools.wraps(launch)
    def run(x, *args, **kwargs):
        if not x.is_cuda or x.get_device() == torch.cuda.current_device():
            return launch(x, *args, **kwargs)
        with torch.cuda.device_of(x):
            return launch(x, *args, **kwargs)

    return run


@on_its_device
def linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int) -> Tensor:
    """x [N, in] times the dequantized weight, transposed, plus bias -> [N, out], in x's dtype.

    x: float16, bfloat16 or float32, contiguous, N >= 0. weight: int8 [out, in], or [out, in / 2] packed (bits 4).
    weight_scale: [out] or [out, in / group_size], any float dtype. bias: [out] or None. TypeError for another x.
    """
    rows, (out, width) = x.shape[0], weight.shape  # width: bytes per row
    group = width // weight_scale.shape[1] if weight_scale.dim() == 2 else 0  # bytes per scale; 0: one scale per row
    kernel, launch = plan(rows, out, width, bits, x.dtype, group, x.device)
    if launch is None:
        return dequantized_linear(x, weight, weight_scale, bias, bits, group)
    y = x.new_empty(rows, out)
    if kernel == "tile" and bits == 4:  # [N, even columns | odd columns]: tiles load without a stride
        x = x.view(rows, width, 2).transpose(1, 2).contiguous()
    elif bits == 4 and x.data_ptr() % (2 * x.element_size()):  # x is read in words of an even and an odd column
        x = x.clone()
    # one build with and without a bias: without one, any pointer is passed and not read
    bias_or_any, has_bias = (weight_scale, 0) if bias is None else (bias, 1)
    launch(x, weight, weight_scale, bias_or_any, y, rows, width, out, has_bias)
    return y


@torch.no_grad()
def dequantized_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int, group: int
) -> Tensor:
    """`linear` by dequantizing a few rows of the weight at a time; products are rounded to x's dtype."""
    (rows, columns), (out, width) = x.shape, weight.shape
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    if 0 in (rows, columns, out):
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    bias = None if bias is None else bias.to(x.dtype)
    step = min(out, max(128, PIECE // (columns * x.element_size()) // 128 * 128))  # torch's mm is slow for odd heights
    piece = torch.empty(step, columns, dtype=x.dtype, device=x.device)
    constants = dict(BITS=bits, X=getattr(kernels()["tl"], DTYPES[x.dtype]), GROUP=group, BLOCK_O=4, BLOCK_P=512)
    for i in range(0, out, step):
        end = min(i + step, out)
        grid = (-(-width // 512), -(-(end - i) // 4))
        kernels()["dequantize"][grid](weight[i:end], weight_scale[i:end], piece, width, end - i, **constants)
        if bias is None:
            torch.mm(x, piece[: end - i].t(), out=y[:, i:end])
        else:
            torch.addmm(bias[i:end], x, piece[: end - i].t(), out=y[:, i:end])
    return y


# ---- choice of kernel and tile --------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """What a program computes: `rows` of x times `outs` outputs, `columns` bytes of the weight at a time in each slice.

    `stages` - 1 more tiles are loading while one is multiplied.
    """

    rows: int
    outs: int
    columns: int
    slices: int  # of the columns, `_skinny` only: one warp each
    warps: int
    stages: int


def tile_for(kernel: str, rows: int, out: int, bits: int) -> Tile:
    """The tile of a kernel: the fastest of those that `python benchmarks gpu --only tune` timed on an H200.

    There are few, because each is compiled at first use, in about a second.
    """
    if kernel == "matvec":
        return Tile(1, 8, 512, 1, 4, 1)
    if kernel == "tile":
        return Tile(64, 64, 64, 1, 4, 4) if rows <= 128 else Tile(128, 64, 64, 1, 4, 3)
    if rows <= 8:
        return Tile(8, 32, 64, 4, 4, 4) if bits == 4 else Tile(8, 16, 128, 4, 4, 4)
    return Tile(16, 32, 64, 4, 4, 3 if bits == 4 else 4)


@functools.lru_cache(4096)
def plan(rows: int, out: int, width: int, bits: int, dtype: torch.dtype, group: int, device: torch.device) -> tuple:
    """Return (kernel name, its launch without the tensors); launch is None if the weight must be dequantized."""
    if dtype not in DTYPES:
        raise TypeError(f"x is {dtype}: the Triton kernels support {', '.join(map(str, DTYPES))}")
    tensor_cores = has_tensor_cores(dtype, device)
    kernel = "skinny" if rows <= SKINNY_ROWS else "tile" if rows <= FUSED_ROWS else None
    if not tensor_cores:
        kernel = "matvec" if rows == 1 else None
    if kernel is None or 0 in (rows, out, width):
        return kernel, None
    tile = tile_for(kernel, rows, out, bits)
    language = kernels()["tl"]
    constants = dict(
        BITS=bits,
        X=getattr(language, DTYPES[dtype]),
        GROUP=group,
        SEGMENT=min(group & -group, 32) or 16,  # a power of two of bytes that share a scale
        BLOCK_O=tile.outs,
        BLOCK_P=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages
        if torch.version.hip is None
        else min(tile.stages, 2),  # ROCm has 64 KiB of shared memory
        enable_fp_fusion=True,  # multiply-adds, which Triton 3.10 no longer makes by default
    )
    programs = (-(-out // tile.outs),)
    if kernel != "matvec":
        nvidia = device.type == "cuda" and not torch.version.hip
        constants.update(BLOCK_N=tile.rows, PTX=PTX[bits, dtype] if nvidia else None)
    if kernel == "skinny":
        constants.update(SLICES=tile.slices)
    if kernel == "tile":  # all tiles of x per tile of the weight, which stays in the cache
        programs = (-(-rows // tile.rows), *programs)
    return kernel, functools.partial(kernels()[kernel][programs], **constants)


def has_tensor_cores(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether Triton uses tensor cores for this dtype; on Turing (7.5) it does not."""
    if dtype == torch.float32:  # TF32 would lose accuracy
        return False
    return device.type != "cuda" or bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


# ---- the kernels: plain functions until `kernels` wraps them, so that importing this file imports no Triton ---------

# Converts four bytes of a weight, the last operand, to columns as pairs of x's dtype: int4 to even columns ($0, $1) and
# odd ones ($2, $3), int8 to $0 and $1. The same as `_int4_half` and `_int8_half`, but two weights at a time, which the
# compiler does not do by itself. An integer with its sign bit flipped becomes the low mantissa bits of 1024 (float16),
# 128 (bfloat16) or 2^23 (int8 for bfloat16, whose mantissa is too short); lop3 0x6a is (a & b) ^ c.
PTX = {
    (4, torch.float16): """{
        .reg .b32 a, b, c, d;
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        lop3.b32 $0, a, 0x00f000f0, 0x64806480, 0x6a;
        lop3.b32 $1, b, 0x00f000f0, 0x64806480, 0x6a;
        lop3.b32 $2, a, 0x000f000f, 0x64086408, 0x6a;
        lop3.b32 $3, b, 0x000f000f, 0x64086408, 0x6a;
        mov.b32 c, 0x2c002c00;
        mov.b32 d, 0xd480d480;
        fma.rn.f16x2 $0, $0, c, d;
        fma.rn.f16x2 $1, $1, c, d;
        mov.b32 d, 0xe408e408;
        add.rn.f16x2 $2, $2, d;
        add.rn.f16x2 $3, $3, d;
    }""",
    (4, torch.bfloat16): """{
        .reg .b32 a, b, c, d;
        prmt.b32 a, $4, 0, 0x4140;
        prmt.b32 b, $4, 0, 0x4342;
        shr.u32 c, a, 4;
        shr.u32 d, b, 4;
        lop3.b32 $0, c, 0x000f000f, 0x43084308, 0x6a;
        lop3.b32 $1, d, 0x000f000f, 0x43084308, 0x6a;
        lop3.b32 $2, a, 0x000f000f, 0x43084308, 0x6a;
        lop3.b32 $3, b, 0x000f000f, 0x43084308, 0x6a;
        mov.b32 c, 0x3f803f80;
        mov.b32 d, 0xc308c308;
        fma.rn.bf16x2 $0, $0, c, d;
        fma.rn.bf16x2 $1, $1, c, d;
        fma.rn.bf16x2 $2, $2, c, d;
        fma.rn.bf16x2 $3, $3, c, d;
    }""",
    (8, torch.float16): """{
        .reg .b32 a, b, c;
        xor.b32 a, $2, 0x80808080;
        mov.b32 b, 0x64646464;
        mov.b32 c, 0xe480e480;
        prmt.b32 $0, a, b, 0x4140;
        prmt.b32 $1, a, b, 0x4342;
        add.rn.f16x2 $0, $0, c;
        add.rn.f16x2 $1, $1, c;
    }""",
    (8, torch.bfloat16): """{
        .reg .b32 a, b, c, d, e, f, g;
        xor.b32 a, $2, 0x80808080;
        mov.b32 b, 0x4b000000;
        mov.b32 c, 0xcb000080;
        prmt.b32 d, a, b, 0x7440;
        prmt.b32 e, a, b, 0x7441;
        prmt.b32 f, a, b, 0x7442;
        prmt.b32 g, a, b, 0x7443;
        add.rn.f32 d, d, c;
        add.rn.f32 e, e, c;
        add.rn.f32 f, f, c;
        add.rn.f32 g, g, c;
        prmt.b32 $0, d, e, 0x7632;
        prmt.b32 $1, f, g, 0x7632;
    }""",
}


def _int4(packed):
    """Bytes of two's complement nibbles to (even, odd) columns in float32; the even column is in the high nibble.

    A nibble with its sign bit flipped becomes the low mantissa bits of 2^23; subtracting 2^23 and the 8 that the flip
    added leaves the value. This is exact and needs no integer-to-float instruction, which NVIDIA's cards issue at a
    fraction of the rate. The high nibble is not shifted: it is 16 times too large, and a multiply-add corrects that.
    """
    packed = packed.to(tl.int32)
    even = ((packed & 0xF0) ^ 0x4B000080).to(tl.float32, bitcast=True) * 0.0625 - 524296.0
    odd = ((packed & 0x0F) ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0
    return even, odd


def _int8(byte):
    """int8 to float32 in the same way."""
    return ((byte.to(tl.int32) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


def _int4_half(packed, X: tl.constexpr, PTX: tl.constexpr):
    """`_int4` in X, float16 or bfloat16; every step is exact there, too. PTX: inline instructions, or None."""
    if PTX is not None and X == tl.float16:
        operands: tl.constexpr = "=&r,=&r,=&r,=&r,r"
        return tl.inline_asm_elementwise(PTX, operands, [packed], (tl.float16, tl.float16), is_pure=True, pack=4)
    elif PTX is not None:
        operands: tl.constexpr = "=&r,=&r,=&r,=&r,r"
        return tl.inline_asm_elementwise(PTX, operands, [packed], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4)
    elif X == tl.float16:
        word = packed.to(tl.int16)
        even = ((word & 0xF0) ^ 0x6480).to(tl.int16).to(X, bitcast=True) * 0.0625 - 72.0
        odd = ((word & 0x0F) ^ 0x6408).to(tl.int16).to(X, bitcast=True) - 1032.0
        return even.to(X), odd.to(X)
    else:
        even, odd = _int4(packed)
        return even.to(X), odd.to(X)


def _int8_half(byte, X: tl.constexpr, PTX: tl.constexpr):
    """`_int8` in X, float16 or bfloat16. PTX: as for `_int4_half`."""
    if PTX is not None and X == tl.float16:
        return tl.inline_asm_elementwise(PTX, "=&r,=&r,r", [byte], tl.float16, is_pure=True, pack=4)
    elif PTX is not None:
        return tl.inline_asm_elementwise(PTX, "=&r,=&r,r", [byte], tl.bfloat16, is_pure=True, pack=4)
    elif X == tl.float16:
        return (((byte.to(tl.int16) & 0xFF) ^ 0x6480).to(tl.int16).to(X, bitcast=True) - 1152.0).to(X)
    else:
        return _int8(byte).to(X)


def _pair(word, X: tl.constexpr):
    """Split words of two columns of x into (even, odd)."""
    if X == tl.float32:
        even, odd = word.to(tl.int32), (word >> 32).to(tl.int32)
    else:
        even, odd = word.to(tl.int16), (word >> 16).to(tl.int16)
    return even.to(X, bitcast=True), odd.to(X, bitcast=True)


def _words(x_ptr, X: tl.constexpr):
    """The address of x as a pointer to words of two columns."""
    if X == tl.float32:
        return x_ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    else:
        return x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)


def _add_product(
    sums, w, x, x_odd, scales, BITS: tl.constexpr, X: tl.constexpr, GROUP: tl.constexpr, PTX: tl.constexpr
):
    """sums + W x of one block by tensor cores. x: int4's even columns, or int8's all; x_odd: int4's odd ones."""
    if BITS == 4:
        w_even, w_odd = _int4_half(w, X, PTX)
        if GROUP:
            w_even, w_odd = (w_even.to(tl.float32) * scales).to(X), (w_odd.to(tl.float32) * scales).to(X)
        return tl.dot(w_odd, x_odd, tl.dot(w_even, x, sums))
    else:
        w_all = _int8_half(w, X, PTX)
        if GROUP:
            w_all = (w_all.to(tl.float32) * scales).to(X)
        return tl.dot(w_all, x, sums)


def _finish(sums, outs, out, scale_ptr, bias_ptr, has_bias, GROUP: tl.constexpr):
    """Multiply the float32 sums [BLOCK_O, ...] of `outs` by the scales of their rows and add the bias."""
    if not GROUP:
        sums *= tl.load(scale_ptr + outs, outs < out, other=0).to(tl.float32)
    return sums + tl.load(bias_ptr + outs, outs < out * has_bias, other=0).to(tl.float32)


def _matvec(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, rows, width, out, has_bias,
    BITS: tl.constexpr, X: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One row of x without tensor cores: a program computes BLOCK_O outputs, BLOCK_P bytes at a time.

    A thread reads runs of 16 bytes and sums its own columns.
    """
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    segments = tl.arange(0, BLOCK_P // SEGMENT) * SEGMENT
    sums = tl.zeros([BLOCK_O, BLOCK_P // SEGMENT], tl.float32)
    for start in range(0, width, BLOCK_P):
        cols = start + tl.arange(0, BLOCK_P)
        offsets = outs[:, None].to(tl.int64) * width + cols[None, :]
        inside = (outs[:, None] < out) & (cols[None, :] < width)
        w = tl.load(weight_ptr + offsets, inside, other=0, eviction_policy="evict_first")  # read once: keep x cached
        if BITS == 4:
            w_even, w_odd = _int4(w)
            x_even, x_odd = _pair(tl.load(_words(x_ptr, X) + cols, cols < width, other=0), X)
            product = w_even * x_even.to(tl.float32)[None, :] + w_odd * x_odd.to(tl.float32)[None, :]
        else:
            product = _int8(w) * tl.load(x_ptr + cols, cols < width, other=0).to(tl.float32)[None, :]
        partial = tl.sum(tl.reshape(product, [BLOCK_O, BLOCK_P // SEGMENT, SEGMENT]), axis=2)
        if GROUP:
            first = start + segments
            offsets = outs[:, None].to(tl.int64) * (width // GROUP) + first[None, :] // GROUP
            inside = (outs[:, None] < out) & (first[None, :] < width)
            partial *= tl.load(scale_ptr + offsets, inside, other=0).to(tl.float32)
        sums += partial
    y = _finish(tl.sum(sums, axis=1), outs, out, scale_ptr, bias_ptr, has_bias, GROUP)
    tl.store(y_ptr + outs, y.to(X), outs < out)


def _skinny(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, rows, width, out, has_bias,
    BITS: tl.constexpr, X: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, SLICES: tl.constexpr,
    PTX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """A few rows of x: a program computes [BLOCK_O, BLOCK_N] of y, transposed, SLICES * BLOCK_P bytes at a time.

    The slices are the batch of a batched product, for which Triton uses one warp each; their sums are added at the end.
    With groups, q * scale is rounded to x's dtype, as in a dequantized weight.
    """
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    ns = tl.arange(0, BLOCK_N)
    cols = (tl.arange(0, SLICES) * BLOCK_P)[:, None] + tl.arange(0, BLOCK_P)[None, :]
    held = tl.minimum(outs, out - 1).to(tl.int64)  # rows past the end repeat the last one and are not stored
    w_ptrs = weight_ptr + held[None, :, None] * width + cols[:, None, :]
    x_words = _words(x_ptr, X) if BITS == 4 else x_ptr
    x_ptrs = x_words + (ns.to(tl.int64) * width)[None, None, :] + cols[:, :, None]
    sums = tl.zeros([SLICES, BLOCK_O, BLOCK_N], tl.float32)
    for start in range(0, width, SLICES * BLOCK_P):
        w = tl.load(w_ptrs + start, (cols < width - start)[:, None, :], other=0)
        x = tl.load(x_ptrs + start, (cols < width - start)[:, :, None] & (ns < rows)[None, None, :], other=0)
        if GROUP:
            segments = (tl.arange(0, SLICES) * BLOCK_P)[:, None]
            segments += (tl.arange(0, BLOCK_P // SEGMENT) * SEGMENT)[None, :] + start
            offsets = held[None, :, None] * (width // GROUP) + (segments // GROUP)[:, None, :]
            scales = tl.load(scale_ptr + offsets, (segments < width)[:, None, :], other=0).to(tl.float32)
            scales = tl.broadcast_to(scales[:, :, :, None], [SLICES, BLOCK_O, BLOCK_P // SEGMENT, SEGMENT])
            scales = tl.reshape(scales, [SLICES, BLOCK_O, BLOCK_P])
        else:
            scales = None
        if BITS == 4:
            x, x_odd = _pair(x, X)
        else:
            x_odd = None
        sums = _add_product(sums, w, x, x_odd, scales, BITS, X, GROUP, PTX)
    y = tl.sum(sums, axis=0)
    y = _finish(y, outs[:, None], out, scale_ptr, bias_ptr, has_bias, GROUP)
    y_ptrs = y_ptr + ns[None, :].to(tl.int64) * out + outs[:, None]
    tl.store(y_ptrs, y.to(X), (outs[:, None] < out) & (ns[None, :] < rows))


def _tile(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, rows, width, out, has_bias,
    BITS: tl.constexpr, X: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr, PTX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program (i, j) computes [BLOCK_O, BLOCK_N] of y, transposed, BLOCK_P bytes at a time; int4's x is [N, 2, width].

    Groups as in `_skinny`.
    """
    outs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    ns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    planes: tl.constexpr = 2 if BITS == 4 else 1
    cols = tl.arange(0, BLOCK_P)
    held = tl.minimum(outs, out - 1).to(tl.int64)
    w_ptrs = weight_ptr + held[:, None] * width + cols[None, :]
    x_ptrs = x_ptr + tl.minimum(ns, rows - 1).to(tl.int64)[None, :] * (planes * width) + cols[:, None]
    sums = tl.zeros([BLOCK_O, BLOCK_N], tl.float32)
    for start in range(0, width, BLOCK_P):
        w = tl.load(w_ptrs + start, (cols < width - start)[None, :], other=0)
        x = tl.load(x_ptrs + start, (cols < width - start)[:, None], other=0)
        if GROUP:
            segments = tl.arange(0, BLOCK_P // SEGMENT) * SEGMENT + start
            offsets = held[:, None] * (width // GROUP) + (segments // GROUP)[None, :]
            scales = tl.load(scale_ptr + offsets, (segments < width)[None, :], other=0).to(tl.float32)
            scales = tl.broadcast_to(scales[:, :, None], [BLOCK_O, BLOCK_P // SEGMENT, SEGMENT])
            scales = tl.reshape(scales, [BLOCK_O, BLOCK_P])
        else:
            scales = None
        if BITS == 4:
            x_odd = tl.load(x_ptrs + width + start, (cols < width - start)[:, None], other=0)
        else:
            x_odd = None
        sums = _add_product(sums, w, x, x_odd, scales, BITS, X, GROUP, PTX)
    y = _finish(sums, outs[:, None], out, scale_ptr, bias_ptr, has_bias, GROUP)
    y_ptrs = y_ptr + ns[None, :].to(tl.int64) * out + outs[:, None]
    tl.store(y_ptrs, y.to(X), (outs[:, None] < out) & (ns[None, :] < rows))


def _dequantize(
    weight_ptr, scale_ptr, y_ptr, width, out,
    BITS: tl.constexpr, X: tl.constexpr, GROUP: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """y [out, in] = q * scale, rounded to X. Program (i, j): BLOCK_P bytes of BLOCK_O rows."""
    outs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    cols = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    offsets = outs[:, None].to(tl.int64) * width + cols[None, :]
    inside = (outs[:, None] < out) & (cols[None, :] < width)
    w = tl.load(weight_ptr + offsets, inside, other=0)
    if GROUP:
        scale_ptrs = scale_ptr + outs[:, None].to(tl.int64) * (width // GROUP) + cols[None, :] // GROUP
        scales = tl.load(scale_ptrs, inside, other=0).to(tl.float32)
    else:
        scales = tl.load(scale_ptr + outs, outs < out, other=0).to(tl.float32)[:, None]
    if BITS == 4:
        even, odd = _int4(w)
        y = tl.reshape(tl.join((even * scales).to(X), (odd * scales).to(X)), [BLOCK_O, 2 * BLOCK_P])
        cols = tl.program_id(0) * 2 * BLOCK_P + tl.arange(0, 2 * BLOCK_P)
        inside = (outs[:, None] < out) & (cols[None, :] < 2 * width)
        tl.store(y_ptr + outs[:, None].to(tl.int64) * (2 * width) + cols[None, :], y, inside)
    else:
        tl.store(y_ptr + offsets, (_int8(w) * scales).to(X), inside)


@functools.lru_cache(None)
def kernels() -> dict:
    """Return the kernels by name, ready to launch, and triton.language as "tl". The first call imports Triton."""
    import triton
    import triton.language

    names = globals()
    names["tl"] = triton.language
    for helper in (_int4, _int8, _int4_half, _int8_half, _pair, _words, _add_product, _finish):
        names[helper.__name__] = triton.jit(getattr(helper, "fn", helper))  # another thread may have wrapped it
    jit = triton.jit(do_not_specialize=["rows", "has_bias"])  # one build for every N, with and without a bias
    products = {"matvec": jit(_matvec), "skinny": jit(_skinny), "tile": jit(_tile)}
    return {**products, "dequantize": triton.jit(_dequantize), "tl": triton.language}


FAMILY = Family(linear, unavailable)
