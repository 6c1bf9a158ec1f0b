"""What a CPU computes in C besides quantized products: attention, RMSNorm, the rotation, and float linear layers.

For inference on Linux on x86-64 (`inference_cpu_source`, compiled at first use). Tensors are float32, float16 or
bfloat16 and computed in float32; the caches are read where they are. The references, in plain torch, are what runs
elsewhere: `eager_attention`, and the functions that `in_c` decorates.
"""

import ctypes
import functools
import math
import sys
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_cpu_source import TILE
from .c_library import ADDRESS, FLOAT, INT, LONG, cpu_flags, load
from .inference_cpu_source import PANEL, source
from .quantization_cpu_source import TYPES
from .torch_compat import autocast_dtype, needs_dispatch
from .torch_compat import rms_norm as torch_rms_norm

FUNCTIONS = {  # of the C library, with their arguments
    "attention": [ADDRESS] * 6 + [FLOAT, ADDRESS],
    "rms_norm": [ADDRESS] * 3 + [LONG] * 2 + [FLOAT] + [INT] * 3,
    "rotate": [ADDRESS] * 4 + [LONG] * 5 + [INT] * 2,
    "linear": [ADDRESS] * 5 + [LONG] * 3 + [INT] * 2,
    "gated": [ADDRESS] * 2 + [LONG] * 2 + [INT] * 2,
    "blocks": [ADDRESS] * 3,  # see blocks_cpu
}
MOST_THREADS, STRETCH = 64, 512  # a long context is divided for so many threads, into so many keys at least
PLAIN = (Tensor, torch.nn.Parameter)
CPU = torch.device("cpu")
MOST_ROWS = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 4}  # that C was measured to multiply faster
MOST_PAIRED_ROWS = 32  # the same of bfloat16 where the code is compiled for AVX512-BF16


@functools.lru_cache(None)
def load_library() -> Tuple[Optional[ctypes.CDLL], str]:
    """Return (the compiled library, "") or (None, the reason and the remedy)."""
    return load("inference_cpu", source, FUNCTIONS)


def serves(x: Tensor) -> bool:
    """Whether the C code may compute on x: it has no gradient, and torch's dispatcher does not see it."""
    return (
        x.device.type == "cpu"
        and not (torch.is_grad_enabled() or needs_dispatch(x))
        and x.dtype in TYPES
        and x.numel() > 0
        and load_library()[0] is not None
    )


def computed_by(serves, kernel, fits):
    """Decorator of a plain function: `kernel` computes it where `serves` takes the first argument, and all fit."""

    def decorate(plain):
        @functools.wraps(plain)
        def either(*args):
            return (kernel if serves(args[0]) and fits(*args) else plain)(*args)

        return either

    return decorate


in_c = functools.partial(computed_by, serves)


def is_plain(weight: Optional[Tensor]) -> bool:
    """Whether a weight is on the CPU, not sparse, and not of a subclass, such as a sharded tensor."""
    return type(weight) in PLAIN and weight.is_cpu and weight.layout is torch.strided


def c_rms_norm(x: Tensor, shape, weight: Tensor, eps: float) -> Tensor:
    """x (..., C) / sqrt(mean(x^2) + eps) * weight (C), over the last dimension."""
    x, weight = x.contiguous(), weight.contiguous()
    y, size, types = torch.empty_like(x), x.shape[-1], (TYPES[x.dtype], TYPES[weight.dtype])
    addresses = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    load_library()[0].rms_norm(*addresses, x.numel() // size, size, eps, *types, torch.get_num_threads())
    return y


@functools.partial(in_c, c_rms_norm)
def rms_norm_in_c(x, shape, weight, eps):
    return is_plain(weight) and weight.dtype in TYPES and weight.shape == x.shape[-1:]


rms_norm = rms_norm_in_c(torch_rms_norm)


def c_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, heads, D), the first half of D rotated in pairs; cos, sin (B or 1, T, 1, D / 4), float32."""
    B, T, heads, D = x.shape
    step = x.stride(1)
    if x.stride()[2:] != (D, 1) or B > 1 and x.stride(0) != T * step:
        x, step = x.contiguous(), heads * D  # stride(1) may be anything if T is 1
    y, cos, sin = x.new_empty(B, T, heads, D), cos.contiguous(), sin.contiguous()
    addresses = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr()
    sizes = B * T, heads, D, cos.shape[0] * T, step * x.element_size()
    load_library()[0].rotate(*addresses, *sizes, TYPES[x.dtype], torch.get_num_threads())
    return y


def are_angles(cos: Tensor, B: int, T: int, D: int, device: torch.device) -> bool:
    """Whether these are cosines, or sines, for heads of size D: float32 (B or 1, T, 1, D / 4) on the device."""
    is_float = cos.dtype == torch.float32 and cos.device == device
    return is_float and cos.shape in ((1, T, 1, D // 4), (B, T, 1, D // 4))


def turns(cos: Tensor, B: int, T: int, D: int) -> bool:
    """Whether the C code takes these cosines, or sines, for heads of size D."""
    return D % 16 == 0 and are_angles(cos, B, T, D, CPU)


@functools.partial(in_c, c_rotate)
def rotate_in_c(x, cos, sin):
    B, T, _, D = x.shape
    return turns(cos, B, T, D)


def c_gated(x: Tensor) -> Tensor:
    """x (..., 2 F) -> silu(gate) * up (..., F), for gate and up side by side; silu is rounded to x's dtype."""
    x, size = x.contiguous(), x.shape[-1] // 2
    y, threads = x.new_empty(*x.shape[:-1], size), torch.get_num_threads()
    load_library()[0].gated(x.data_ptr(), y.data_ptr(), y.numel() // size, size, TYPES[x.dtype], threads)
    return y


@functools.partial(in_c, c_gated)
def gated_in_c(x):
    return x.shape[-1] % 2 == 0


def c_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out), all of one dtype: the weight is read in place.

    A row of x gives the same result alone and among others, with any number of threads.
    """
    x, (out, k) = x.contiguous(), weight.shape
    y, n = x.new_empty(*x.shape[:-1], out), x.numel() // k
    scratch = torch.empty(linear_scratch(n, k), dtype=torch.float32, device="cpu")
    addresses = x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr()
    load_library()[0].linear(*addresses, scratch.data_ptr(), n, k, out, TYPES[x.dtype], torch.get_num_threads())
    return y


def linear_scratch(n: int, k: int) -> int:
    """Floats that `linear` of the C library needs."""
    return -(-min(n, PANEL) // 8) * 8 * (-(-k // 32) * 32)


@functools.lru_cache(None)
def most_rows(dtype: torch.dtype) -> int:
    """Rows of x that the C code multiplies faster than torch: in float16 any number, unless the CPU computes in it."""
    known, options = cpu_flags(), load_library()[0].options
    if dtype == torch.float16 and "avx512_fp16" not in known:
        return sys.maxsize
    if dtype == torch.bfloat16 and "-mavx512bf16" in options and "amx_bf16" not in known:  # torch takes AMX
        return MOST_PAIRED_ROWS
    return MOST_ROWS[dtype]


@functools.partial(in_c, c_linear)
def linear_in_c(x, weight, bias):
    for t in (weight,) if bias is None else (weight, bias):
        if not is_plain(t) or not t.is_contiguous() or t.dtype != x.dtype:
            return False
    fits = x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])
    return fits and x.numel() <= most_rows(x.dtype) * x.shape[-1] and autocast_dtype("cpu") is None


linear = linear_in_c(F.linear)


def computes_attention(head_dim: int, x: Tensor, mask: Optional[Tensor]) -> bool:
    """Whether `attention` computes this forward pass: x (B, T, C) goes into it, and the mask is as `attention`'s."""
    boolean = mask is None or mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1
    boolean = boolean and (mask is None or mask.device == x.device)
    return boolean and head_dim % 8 == 0 and 0 < head_dim <= 256 and serves(x)


def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
    """Exact attention with a softmax in float32; for bfloat16 its probabilities are rounded to that, with AVX512-BF16.

    The result does not depend on the number of threads.

    Args: query (B, H, T, D); key, value (B, G, S, D); attention_mask boolean (B or 1, 1, T, S), True where a query may
        attend; None for causal. D is a multiple of 8, at most 256. Returns: output (B, T, H, D), None.
    """
    (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
    causal = attention_mask is None and T > 1 and is_causal is not False
    if causal:
        S = T  # a static cache has unused slots
    query, key, value = map(with_dense_rows, (query, key, value))
    strides = [size * t.element_size() for t in (query, key, value) for size in t.stride()[:3]]
    if attention_mask is not None:
        attention_mask = with_dense_rows(attention_mask.expand(B, 1, T, S))
        strides += [attention_mask.stride(0), attention_mask.stride(2)]
    else:
        strides += [0, 0]
    threads = torch.get_num_threads()
    stretches, scratch, size = attention_scratch(B, T, S, H, G, D, threads)
    buffer = torch.empty(size, dtype=torch.float32, device="cpu")
    output = query.new_empty(B, T, H, D)
    types = (TYPES[t.dtype] for t in (query, key, value))
    shape = (B, T, S, H, G, D, *strides, *types, causal, stretches, threads, scratch)
    load_library()[0].attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if attention_mask is None else attention_mask.data_ptr(),
        output.data_ptr(),
        buffer.data_ptr(),
        scaling * math.log2(math.e),
        (ctypes.c_long * len(shape))(*shape),
    )
    return output, None


def attention_scratch(B: int, T: int, S: int, H: int, G: int, D: int, threads: int) -> Tuple[int, int, int]:
    """(stretches that the keys are divided into, floats of scratch for each thread, floats in all)."""
    rows, stride = T * (H // G), 128 if D <= 128 else 256
    stretches = min(-(-MOST_THREADS // (B * G * -(-rows // 64))), -(-S // STRETCH))
    rows = -(-rows // 128) * 128 if rows > 64 else -(-rows // 32) * 32  # padded to whole blocks
    each = stride * (2 * min(rows, 128) + 2 * TILE) + 32 * TILE + 256
    states = B * G * stretches * rows * (stride + 2) if stretches > 1 else 0
    return stretches, each, threads * each + states


def with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
