"""What a GPU computes in Triton besides quantized products and attention: RMSNorm, the rotation, and silu(gate) * up.

For inference; each is one launch where torch takes up to eleven, and reads its input once. The references, in plain
torch, are the functions that `in_triton` decorates; they are what runs elsewhere, and what torch.compile fuses.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .inference_cpu import PLAIN, are_angles, computed_by
from .inference_cpu import rms_norm as rms_norm_elsewhere
from .quantization_triton import DTYPES, on_its_device, runs_on
from .torch_compat import needs_dispatch

FEW_ROWS = 16  # up to which RMSNorm takes a row so long that torch's kernel, for many rows, has little to do at a time
MOST_CHANNELS = 16384  # of a row of RMSNorm, which one program holds in its registers
PAIRS, CHANNELS = 512, 1024  # of a program of the rotation, and of silu(gate) * up
OPTIONS = dict(num_warps=4, enable_fp_fusion=False)  # products are rounded before they are added, as torch does
tl = None  # triton.language, set by `kernels`: Triton looks up a kernel's names among this module's globals


def serves(x: Tensor) -> bool:
    """Whether the kernels may compute on x: it has no gradient, and torch's dispatcher does not see it."""
    return (
        x.device.type == "cuda"
        and not (torch.is_grad_enabled() or needs_dispatch(x))
        and x.dtype in DTYPES
        and x.numel() > 0
        and runs_on(x.device)
    )


in_triton = functools.partial(computed_by, serves)


@on_its_device
def triton_rms_norm(x: Tensor, shape, weight: Tensor, eps: float) -> Tensor:
    """x (..., C) / sqrt(mean(x^2) + eps) * weight (C), over the last dimension, in float32 until the end."""
    x, weight = x.contiguous(), weight.contiguous()
    y, C = torch.empty_like(x), x.shape[-1]
    block = dict(BLOCK_C=1 << (C - 1).bit_length(), num_warps=4 if C <= 2048 else 16)
    kernels()["rms_norm"][(x.numel() // C,)](x, weight, y, C, eps, **{**OPTIONS, **block})
    return y


@functools.partial(in_triton, triton_rms_norm)
def rms_norm_in_triton(x, shape, weight, eps):
    size = x.shape[-1]
    few = x.numel() <= FEW_ROWS * size and size <= MOST_CHANNELS and type(weight) in PLAIN
    return few and weight.device == x.device and weight.dtype in DTYPES and weight.shape == (size,)


rms_norm = rms_norm_in_triton(rms_norm_elsewhere)


@on_its_device
def triton_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, D), the first half of D rotated in pairs; cos, sin (B or 1, T, 1, D / 4), float32."""
    B, T, heads, D = x.shape
    if x.stride()[2:] != (D, 1):
        x = x.contiguous()
    y, cos, sin = x.new_empty(B, T, heads, D), cos.contiguous(), sin.contiguous()
    pairs = heads * D // 2
    sizes = x.stride(0), x.stride(1), T, cos.shape[0] * T, pairs
    kernels()["rotate"][(B * T, -(-pairs // PAIRS))](x, cos, sin, y, *sizes, HALF=D // 2, PAIRS=PAIRS, **OPTIONS)
    return y


@functools.partial(in_triton, triton_rotate)
def rotate_in_triton(x, cos, sin):
    B, T, _, D = x.shape
    return D % 4 == 0 and all(are_angles(angles, B, T, D, x.device) for angles in (cos, sin))


@on_its_device
def triton_gated(x: Tensor) -> Tensor:
    """x (..., 2 F) -> silu(gate) * up (..., F), for gate and up side by side; silu is rounded to x's dtype."""
    x, size = x.contiguous(), x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], size)
    kernels()["gated"][(y.numel() // size, -(-size // CHANNELS))](x, y, size, CHANNELS=CHANNELS, **OPTIONS)
    return y


@functools.partial(in_triton, triton_gated)
def gated_in_triton(x):
    return x.shape[-1] % 2 == 0


# ---- the kernels: plain functions until `kernels` wraps them, so that importing this file imports no Triton ---------


def _rms_norm(x_ptr, weight_ptr, y_ptr, C, eps, BLOCK_C: tl.constexpr):
    """Program i: row i of x [rows, C]."""
    c = tl.arange(0, BLOCK_C)
    at = tl.program_id(0).to(tl.int64) * C + c
    x = tl.load(x_ptr + at, c < C, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + c, c < C, other=0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / C + eps) * weight
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), c < C)


def _rotate(x_ptr, cos_ptr, sin_ptr, y_ptr, x_b, x_t, T, period, pairs, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Program (n, i): the i-th PAIRS channel pairs of token n = b T + t; a head has HALF, and HALF / 2 are rotated."""
    n = tl.program_id(0)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    place, is_pair = pair % HALF, pair < pairs
    channel = 2 * tl.program_id(1) * PAIRS + tl.arange(0, 2 * PAIRS)
    x_ptr += (n // T).to(tl.int64) * x_b + (n % T).to(tl.int64) * x_t
    even, odd = tl.split(tl.load(x_ptr + channel, channel < 2 * pairs, other=0).reshape(PAIRS, 2))
    rotated = is_pair & (place < HALF // 2)
    angle = (n % period).to(tl.int64) * (HALF // 2) + place
    cos, sin = tl.load(cos_ptr + angle, rotated, other=1), tl.load(sin_ptr + angle, rotated, other=0)
    x, y = even.to(tl.float32), odd.to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    even = tl.where(rotated, (x * cos - y * sin).to(dtype), even)
    odd = tl.where(rotated, (y * cos + x * sin).to(dtype), odd)
    both = tl.join(even, odd).reshape(2 * PAIRS)
    tl.store(y_ptr + n.to(tl.int64) * 2 * pairs + channel, both, channel < 2 * pairs)


def _gated(x_ptr, y_ptr, F, CHANNELS: tl.constexpr):
    """Program (n, i): the i-th CHANNELS of row n of y [rows, F]."""
    n = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    gate = tl.load(x_ptr + n * 2 * F + channel, channel < F, other=0).to(tl.float32)
    up = tl.load(x_ptr + n * 2 * F + F + channel, channel < F, other=0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    silu = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(y_ptr + n * F + channel, (silu * up).to(dtype), channel < F)


@functools.lru_cache(None)
def kernels() -> dict:
    """Return the kernels by name, ready to launch. The first call imports Triton."""
    import triton
    import triton.language

    globals()["tl"] = triton.language
    # one build whatever the lengths
    rotate = triton.jit(do_not_specialize=["T", "period"])(_rotate)
    return {"rms_norm": triton.jit(_rms_norm), "rotate": rotate, "gated": triton.jit(_gated)}
