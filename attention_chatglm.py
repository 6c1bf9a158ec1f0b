"""Attention functions with one signature, and the causal mask for them.

Shapes: B batch size, T new tokens, S cached and new tokens, H query heads, G key/value groups, D head size.

`eager` and `sdpa` are implemented here, with their mask. Where they serve, `sdpa` is the C code of inference_cpu on a
CPU, and the Triton kernels of attention_triton on a GPU. Any other `attn_implementation`, and its mask, comes from
transformers.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_triton import computes_attention as triton_computes_attention
from .attention_triton import masked_attention as attention_in_triton
from .attention_triton import runs as runs_in_triton
from .inference_cpu import attention as attention_in_c
from .inference_cpu import computes_attention
from .torch_compat import is_compiling
from .transformers_compat import (
    ALL_ATTENTION_FUNCTIONS,
    attention_name,
    cache_size,
    is_paged,
    transformers_causal_mask,
)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
    """Reference implementation in plain torch; the only one that returns attention weights.

    Args: query (B, H, T, D); key, value (B, G, S, D); attention_mask (B, 1, T, S), boolean, True where a query may
        attend, or additive; None for causal. Returns: output (B, T, H, D), weights (B, H, T, S).
    """
    T = query.shape[2]
    if attention_mask is None and T > 1 and is_causal is not False:
        key, value = key[:, :, :T], value[:, :, :T]  # drop the unused slots of a static cache
        attention_mask = torch.ones(T, T, dtype=torch.bool, device=query.device).tril()[None, None]
    query = query.unflatten(1, (key.shape[1], -1))  # (B, G, H / G, T, D)
    scores = query @ key[:, :, None].transpose(-1, -2) * scaling  # (B, G, H / G, T, S)
    if attention_mask is not None:
        attention_mask = attention_mask[:, :, None, :, : key.shape[2]]
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training).flatten(1, 2)  # (B, H, T, S)
    output = (weights.unflatten(1, (value.shape[1], -1)) @ value[:, :, None]).flatten(1, 2)  # (B, H, T, D)
    return output.transpose(1, 2), weights


def sdpa_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
    """torch's fused attention, without repeating G key/value groups to H heads.

    Args: query (B, H, T, D); key, value (B, G, S, D); attention_mask (B, 1, T, S), boolean, True where a query may
        attend, or additive; None for causal. scaling is torch's default, D^-0.5. Returns: output (B, T, H, D), None.
    """
    dtype = query.dtype
    if dtype == torch.float16 and query.device.type == "cpu":  # torch takes twice as long in float16
        query, key, value = query.float(), key.float(), value.float()
    if attention_mask is not None and attention_mask.is_floating_point():  # a 4D mask from the caller
        attention_mask = attention_mask.to(query.dtype)
    T, group_size = query.shape[2], query.shape[1] // key.shape[1]
    causal = attention_mask is None and T > 1 and is_causal is not False
    if causal:
        key, value = key[:, :, :T], value[:, :, :T]  # drop the unused slots of a static cache
    attend = partial(F.scaled_dot_product_attention, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal)
    if group_size == 1:
        output = attend(query, key, value).transpose(1, 2)
    elif T == 1:  # one new token: the query heads of a group become the rows of one matrix
        output = attend(query.reshape(*key.shape[:2], group_size, -1), key, value).flatten(1, 2)[:, None]
    else:  # one group at a time; expand() shares its key and value with all query heads, without a copy
        groups = zip(query.split(group_size, 1), key.split(1, 1), value.split(1, 1))
        output = torch.cat([attend(q, k.expand(-1, group_size, -1, -1), v.expand(-1, group_size, -1, -1))
                            .transpose(1, 2) for q, k, v in groups], dim=2)  # fmt: skip
    return output.to(dtype), None


def cpu_attention(module, query, *args, **kwargs):
    """The C code; torch's where accelerate has moved this layer to another device than the embedding's."""
    attend = attention_in_c if query.device.type == "cpu" else sdpa_attention
    return attend(module, query, *args, **kwargs)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """The output of `gpu_attention`: by the Triton kernels where they run, else by torch."""
    if runs_in_triton(query, key, value):
        return attention_in_triton(query, key, value, mask, scaling)
    return sdpa_attention(None, query, key, value, mask, scaling)[0]


if hasattr(torch.library, "custom_op"):  # from torch 2.4 on; before, only without torch.compile
    if not hasattr(torch.ops.chatglm, "masked_attention"):  # the Hugging Face loader may import this file twice
        _op = torch.library.custom_op("chatglm::masked_attention", masked_attention, mutates_args=())
        _op.register_fake(lambda query, *_: query.new_empty(query.transpose(1, 2).shape))
    op = torch.ops.chatglm.masked_attention


def gpu_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
    """`sdpa_attention` for a boolean mask and no gradient; in compiled graphs it is one op."""
    attend = op if is_compiling() else masked_attention
    return attend(query, key, value, attention_mask, scaling), None


# keyword arguments that `forward` passes to the attention function
KEYWORDS = {"is_causal", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
OWN_ATTENTION = {"eager": eager_attention, "sdpa": sdpa_attention}


def check_arguments(cache, kwargs):
    """Reject extra keyword arguments of `forward` that no attention function takes.

    With the paged cache of continuous batching, any are allowed: transformers' attention functions take more.

    Raises:
        TypeError: an unknown keyword. ValueError: what is no cache, as the tuples of older releases.
    """
    if cache is not None and not (is_paged(cache) or hasattr(cache, "get_seq_length")):
        raise ValueError(f"The cache is a {type(cache).__name__}: pass a transformers.DynamicCache, or None.")
    unknown = [] if is_paged(cache) else [repr(name) for name in kwargs if name not in KEYWORDS]
    if unknown:
        raise TypeError(f"forward() got an unexpected keyword argument {', '.join(unknown)}: is it misspelled?")


def choose_attention(config, x, attention_mask, paged=False, training=False, output_attentions=False):
    """Return the attention function for `attn_implementation` and this forward pass.

    With the paged cache of continuous batching (`paged`) it always comes from transformers, which can read that cache.
    With `output_attentions` sdpa is replaced by eager, which takes the same mask; otherwise by the C code or the Triton
    kernels, if those compute what x (B, T, C) and its mask ask for.

    Raises:
        ValueError: `output_attentions` with a function of transformers.
    """
    name, dropout = attention_name(config), training and config.attention_dropout
    if output_attentions and (paged or name not in OWN_ATTENTION):
        raise ValueError(
            f"output_attentions=True: attn_implementation={name!r} does not compute attention weights"
            f"{' in continuous batching' if paged else ''}. Load the model with 'sdpa' or 'eager'."
        )
    if output_attentions:
        return eager_attention
    if name == "sdpa" and not (paged or dropout):
        if computes_attention(config.kv_channels, x, attention_mask):
            return cpu_attention
        if triton_computes_attention(x, attention_mask):
            return gpu_attention
    return (None if paged else OWN_ATTENTION.get(name)) or ALL_ATTENTION_FUNCTIONS[name]


def causal_mask(config, x, attention_mask, cache=None, position_ids=None, cache_position=None, prefix=None):
    """Build the mask for the chosen attention function.

    Args:
        x: (B, T, C) new tokens; only shape, dtype and device are used.
        attention_mask: [B, S], 1 for real tokens, 0 for padding; None if there is no padding. A 4D mask is returned
            unchanged.
        cache: the cache before the new tokens are added, or None.
        position_ids: [B, T] if a row may hold packed sequences: a new one starts where positions do not grow by 1.
        cache_position: [T] slots of the new tokens in the cache, which transformers before 5.4 needs.
        prefix: (key, value) of the P-Tuning prefix in each layer, (B, G, P, D), if no cache holds it.

    Returns:
        For eager and sdpa: boolean [B or 1, 1, T, S], True where a query may attend, or None for a plain causal mask.
    """
    if is_paged(cache) or attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2:
        return attention_mask  # built by continuous batching or by the caller
    if attention_name(config) not in OWN_ATTENTION:
        return transformers_causal_mask(config, x, attention_mask, cache, position_ids, cache_position, prefix)

    T, device = x.shape[1], x.device
    prefix_length = prefix[0][0].shape[2] if prefix else 0
    seen, size = (prefix_length, prefix_length + T) if cache is None else cache_size(cache, T)
    # A static cache has unused slots; its `seen` is a tensor in most releases
    fixed = cache is not None and size != seen + T if isinstance(seen, int) else True
    real = None if attention_mask is None else attention_mask.to(device, torch.bool)
    may_sync = T > 1 and not is_compiling()  # reading a tensor's value waits for the GPU: for a prompt, not for a step
    if may_sync and real is not None and real.all():
        real = None
    if T == 1 and not fixed:  # one new token attends to all real tokens
        return None if real is None else (real | ~real.any(-1, keepdim=True))[:, None, None]  # no all-False row
    packed = None
    if position_ids is not None and real is None and cache is None and T > 1 and not prefix_length:
        packed = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)  # (B, T) sequence numbers
        packed = packed if not may_sync or packed.any() else None
    if real is None and packed is None and may_sync and seen == 0:
        return None
    place = torch.arange(size, device=device)
    query = torch.arange(T, device=device)[:, None] + seen
    mask = (place <= query)[None, None]  # (1, 1, T, S)
    if real is not None:
        real = F.pad(real, (0, size - real.shape[1]))[:, None, None]
        mask = mask & real | (place == query)  # padding attends to itself: an all-False row gives nan
    if packed is not None:
        mask = mask & (packed[:, None, :, None] == packed[:, None, None, :])
    return mask
