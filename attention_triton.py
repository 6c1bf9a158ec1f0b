"""Attention of a few new tokens under a mask, in Triton: steps with a static cache, padded batches, drafts on a GPU.

torch's flash kernel, which divides a long context among many programs, takes no mask; those of its kernels that do let
one program read all keys of a head, also those that nobody may attend to. Here the keys of a group are divided among
programs and read once for all its query heads, from the first to the last that one of the new tokens may attend to: a
step with a static cache reads what the cache holds. There are no atomics, so results are deterministic.

Shapes: B batch size, T new tokens, S cached and new tokens, H query heads, G key/value groups, D head size. The rows of
a group are its query heads times T: row i is head i // T, token i % T.
"""

from __future__ import annotations

import functools
import math
from typing import Optional

import torch
from torch import Tensor

from .quantization_triton import DTYPES, has_tensor_cores, on_its_device, runs_on
from .torch_compat import is_compiling, needs_dispatch

MOST_TOKENS = 16
LEAST_STRETCH = 128  # keys of a program: fewer take longer to combine than to multiply
KEYS = 64  # at a time
OPTIONS = dict(num_warps=4, num_stages=2, enable_fp_fusion=True)  # Triton 3.10 no longer fuses by default
tl = None  # triton.language, set by `kernels`: Triton looks up a kernel's names among this module's globals


def computes_attention(x: Tensor, mask: Optional[Tensor]) -> bool:
    """Whether `masked_attention` may compute this forward pass: x (B, T, C) goes into it, the mask is as there."""
    return (
        x.device.type == "cuda"
        and mask is not None
        and mask.dtype == torch.bool
        and mask.dim() == 4
        and mask.shape[1] == 1
        and mask.device == x.device
        and x.shape[1] <= MOST_TOKENS
        and not torch.is_grad_enabled()
        and (hasattr(torch.library, "custom_op") if is_compiling() else not needs_dispatch(x))
    )


def runs(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels compute in these tensors' dtype on their device."""
    return query.dtype == key.dtype == value.dtype and has_kernels(query.dtype, query.device)


@on_its_device
def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, processors: Optional[int] = None
) -> Tensor:
    """Exact attention with float32 scores and sums; probabilities are rounded to the dtype for their product.

    It takes about two programs for each of the card's multiprocessors, or of so many `processors`.

    Args: query (B, H, T, D); key, value (B, G, S, D); mask boolean (B or 1, 1, T or 1, S), True where a query may
        attend. Returns: output (B, T, H, D), zeros for a token that may attend to nothing.
    """
    (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
    query, key, value, mask = map(with_dense_rows, (query, key, value, mask.expand(B, 1, T, S)))
    rows, shape, block = H // G * T, *constants(H, G, T, D)
    tiles = -(-rows // block["BLOCK_R"])
    programs = 2 * (processors or multiprocessors(query.device))
    stretches = min(-(-programs // (B * G * tiles)), -(-S // LEAST_STRETCH))
    stretch = -(-S // (stretches * KEYS)) * KEYS
    stretches = -(-S // stretch)
    sums = query.new_empty(B * G, stretches, rows, D, dtype=torch.float32)
    states = query.new_empty(B * G, stretches, rows, 2, dtype=torch.float32)
    y = query.new_empty(B, T, H, D)
    strides = *(t.stride(i) for t in (query, key, value) for i in range(3)), mask.stride(0), mask.stride(2)
    sizes = T, S, stretch, scaling * math.log2(math.e)
    kernels()["stretch"][stretches, tiles, B * G](
        query, key, value, mask.view(torch.uint8), sums, states, *strides, *sizes, **shape, **block, **OPTIONS
    )
    kernels()["combine"][rows, B * G](sums, states, y, T, stretches, **shape, **OPTIONS)
    return y


@functools.lru_cache(None)
def constants(H: int, G: int, T: int, D: int) -> tuple:
    """(constants of both kernels, more of `_stretch`): one build for a step, and one for more tokens.

    Products on tensor cores have 16 rows and columns at least.
    """
    shape = dict(G=G, D=D, H=H, BLOCK_D=max(16, 1 << (D - 1).bit_length()))
    one = dict(BLOCK_R=16 if H // G <= 16 else 64, BLOCK_T=1, MASKS=1024, KEYS=KEYS)
    return shape, one if T == 1 else dict(BLOCK_R=64, BLOCK_T=MOST_TOKENS, MASKS=128, KEYS=KEYS)


def with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.lru_cache(None)
def has_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype in DTYPES and runs_on(device) and has_tensor_cores(dtype, device)


@functools.lru_cache(None)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# ---- the kernels: plain functions until `kernels` wraps them, so that importing this file imports no Triton ---------


def _stretch(
    q_ptr, k_ptr, v_ptr, mask_ptr, sums_ptr, states_ptr,
    q_b, q_h, q_t, k_b, k_g, k_s, v_b, v_g, v_s, mask_b, mask_t, T, S, stretch, scaling,
    G: tl.constexpr, D: tl.constexpr, H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, MASKS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program (i, j, b G + g): the j-th BLOCK_R rows of a group over the i-th stretch of its keys.

    Of each row it writes the sum of the values by their weights [D] and, as its state, the highest score and the sum of
    the weights [2], which are 2^(score - highest): `scaling` includes log2(e).
    """
    b, g = tl.program_id(2) // G, tl.program_id(2) % G
    rows = H // G * T
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    t, d, s = row % T, tl.arange(0, BLOCK_D), tl.arange(0, KEYS)
    is_row, is_channel = (row < rows)[:, None], d < D
    mask_ptr += b.to(tl.int64) * mask_b
    begin = tl.program_id(0) * stretch
    end = tl.minimum(begin + stretch, S)

    first, last = end, begin  # of the keys that a token may attend to, and the one after the last
    token = tl.arange(0, BLOCK_T)[:, None]
    for start in range(begin, end, MASKS):
        place = start + tl.arange(0, MASKS)
        seen = tl.load(mask_ptr + token * mask_t + place[None, :], (token < T) & (place < end)[None, :], other=0)
        seen = tl.max(seen, axis=0) > 0
        first = tl.minimum(first, tl.min(tl.where(seen, place, end), axis=0))
        last = tl.maximum(last, tl.max(tl.where(seen, place + 1, begin), axis=0))

    q_ptrs = q_ptr + b.to(tl.int64) * q_b + ((g * (H // G) + row // T) * q_h + t * q_t)[:, None] + d[None, :]
    q = tl.load(q_ptrs, is_row & is_channel[None, :], other=0)  # (BLOCK_R, BLOCK_D)
    k_ptrs = k_ptr + b.to(tl.int64) * k_b + g.to(tl.int64) * k_g + d[:, None]
    v_ptrs = v_ptr + b.to(tl.int64) * v_b + g.to(tl.int64) * v_g + d[None, :]
    mask_ptrs = mask_ptr + (t * mask_t)[:, None]
    highest = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(first, last, KEYS):
        place = (start + s).to(tl.int64)
        k = tl.load(k_ptrs + place[None, :] * k_s, (place < last)[None, :] & is_channel[:, None], other=0)
        v = tl.load(v_ptrs + place[:, None] * v_s, (place < last)[:, None] & is_channel[None, :], other=0)
        attends = tl.load(mask_ptrs + place[None, :], is_row & (place < last)[None, :], other=0) > 0
        scores = tl.where(attends, tl.dot(q, k) * scaling, -float("inf"))  # (BLOCK_R, KEYS)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # of a row that has met no key yet: no inf - inf
        weights, decay = tl.exp2(scores - base[:, None]), tl.exp2(highest - base)
        total = total * decay + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(v.dtype), v, sums * decay[:, None])
        highest = higher

    at = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * rows + row
    tl.store(sums_ptr + at[:, None] * D + d[None, :], sums, is_row & is_channel[None, :])
    tl.store(states_ptr + 2 * at, highest, row < rows)
    tl.store(states_ptr + 2 * at + 1, total, row < rows)


def _combine(
    sums_ptr, states_ptr, y_ptr, T, stretches,
    G: tl.constexpr, D: tl.constexpr, H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, b G + g): row i of a group in y [B, T, H, D] from what `_stretch` wrote."""
    b, g, row = tl.program_id(1) // G, tl.program_id(1) % G, tl.program_id(0)
    d, is_channel = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D) < D
    highest, total, sums = -float("inf"), 0.0, tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, stretches, 32):
        i = start + tl.arange(0, 32)
        at = (tl.program_id(1) * stretches + i).to(tl.int64) * (H // G * T) + row
        scores = tl.load(states_ptr + 2 * at, i < stretches, other=-float("inf"))
        totals = tl.load(states_ptr + 2 * at + 1, i < stretches, other=0)
        holds = (scores > -float("inf"))[:, None] & is_channel[None, :]
        parts = tl.load(sums_ptr + at[:, None] * D + d[None, :], holds, other=0)
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights, decay = tl.exp2(scores - base), tl.exp2(highest - base)
        total = total * decay + tl.sum(weights * totals, axis=0)
        sums = sums * decay + tl.sum(weights[:, None] * parts, axis=0)
        highest = higher
    y = sums / tl.where(total > 0, total, 1.0)
    at = ((b * T + row % T).to(tl.int64) * H + g * (H // G) + row // T) * D
    tl.store(y_ptr + at + d, y.to(y_ptr.dtype.element_ty), is_channel)


@functools.lru_cache(None)
def kernels() -> dict:
    """Return the kernels by name, ready to launch. The first call imports Triton."""
    import triton
    import triton.language

    globals()["tl"] = triton.language
    # one build whatever the lengths
    stretch = triton.jit(do_not_specialize=["T", "S", "stretch", "mask_b", "mask_t"])(_stretch)
    return {"stretch": stretch, "combine": triton.jit(do_not_specialize=["T", "stretches"])(_combine)}
