"""Attention on a CPU in C (`attention_cpu_source`), compiled at first use: the package's sdpa on Linux on x86-64.

It reads float32, float16 and bfloat16 caches where they are, in any mix with the queries' dtype, and computes in
float32. `attention_chatglm.eager_attention` is its reference.
"""

import ctypes
import functools
import math
from typing import Optional, Tuple

import torch
from torch import Tensor

from .attention_cpu_source import TILE, source
from .c_library import load
from .torch_compat import needs_dispatch

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FUNCTIONS = {"attention": [ctypes.c_void_p] * 6 + [ctypes.c_float, ctypes.c_void_p]}
MOST_THREADS, STRETCH = 64, 512  # a long context is divided for so many threads, into so many keys at least


@functools.lru_cache(None)
def load_library() -> Tuple[Optional[ctypes.CDLL], str]:
    """Return (the compiled library, "") or (None, the reason and the remedy)."""
    return load("attention_cpu", source, FUNCTIONS)


def supports(head_dim: int, x: Tensor, mask: Optional[Tensor]) -> bool:
    """Whether `attention` computes this forward pass: x, (B, T, C), are its inputs, and the mask is as `attention`'s.

    It has no gradient, so only inference; and torch's dispatcher does not see it.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in TYPES
        and x.numel() > 0
        and not (torch.is_grad_enabled() or needs_dispatch(x))
        and head_dim % 8 == 0
        and 0 < head_dim <= 256
        and (mask is None or mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1)
        and load_library()[0] is not None
    )


def attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
    """Exact attention with a softmax in float32.

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
    rows, stride, threads = T * (H // G), 128 if D <= 128 else 256, torch.get_num_threads()
    stretches = min(-(-MOST_THREADS // (B * G * -(-rows // 64))), -(-S // STRETCH))
    rows = -(-rows // 128) * 128 if rows > 64 else -(-rows // 32) * 32  # padded to whole blocks
    scratch = stride * (2 * min(rows, 128) + 2 * TILE) + 32 * TILE + 256  # floats for each thread
    states = B * G * stretches * rows * (stride + 2) if stretches > 1 else 0
    buffer = torch.empty(threads * scratch + states, dtype=torch.float32, device="cpu")
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


def with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
