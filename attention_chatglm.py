"""Attention behind one signature, and the causal mask that goes with it.

Shapes: B batch, T new tokens, S cached and new tokens, H query heads, G key/value groups, D channels of a head.

`eager` and `sdpa` are the package's own, and so is their mask. Any other `attn_implementation` is transformers', with
the mask that transformers makes for it.
"""

from functools import partial

import torch
import torch.nn.functional as F

from .torch_compat import is_compiling
from .transformers_compat import ALL_ATTENTION_FUNCTIONS, attention_name, cache_size, is_paged, their_causal_mask


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
    """The reference in plain torch; the only one that returns the weights.

    Args: query (B, H, T, D); key, value (B, G, S, D); attention_mask (B, 1, T, S), boolean, True where a query may
        look, or additive; None for causal. Returns: output (B, T, H, D), weights (B, H, T, S).
    """
    T = query.shape[2]
    if attention_mask is None and T > 1 and is_causal is not False:
        key, value = key[:, :, :T], value[:, :, :T]  # an empty static cache is longer than the prompt
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
    weights = F.dropout(weights, dropout, module.training)
    output = (weights @ value[:, :, None]).flatten(1, 2)  # (B, H, T, D)
    return output.transpose(1, 2), weights.flatten(1, 2)


def sdpa_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
    """torch's fused attention, without copying G key/value groups out to H heads.

    Args: query (B, H, T, D); key, value (B, G, S, D); attention_mask (B, 1, T, S), boolean, True where a query may
        look, or additive; None for causal. scaling is torch's own, D^-0.5. Returns: output (B, T, H, D), None.
    """
    dtype = query.dtype
    if dtype == torch.float16 and query.device.type == "cpu":  # there torch's attention takes twice as long in float16
        query, key, value = query.float(), key.float(), value.float()
    if attention_mask is not None and attention_mask.is_floating_point():  # a caller's own, of four dimensions
        attention_mask = attention_mask.to(query.dtype)
    T, group_size = query.shape[2], query.shape[1] // key.shape[1]
    causal = attention_mask is None and T > 1 and is_causal is not False
    if causal:
        key, value = key[:, :, :T], value[:, :, :T]  # an empty static cache is longer than the prompt
    attend = partial(F.scaled_dot_product_attention, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal)
    if group_size == 1:
        output = attend(query, key, value).transpose(1, 2)
    elif T == 1:  # one new token: a group's query heads are the rows of one small matrix
        output = attend(query.reshape(*key.shape[:2], group_size, -1), key, value).flatten(1, 2)[:, None]
    else:  # a group at a time; its query heads see the one key and value through a stride of 0
        groups = zip(query.split(group_size, 1), key.split(1, 1), value.split(1, 1))
        output = torch.cat([attend(q, k.expand(-1, group_size, -1, -1), v.expand(-1, group_size, -1, -1))
                            .transpose(1, 2) for q, k, v in groups], dim=2)  # fmt: skip
    return output.to(dtype), None


# what `forward` hands on to the attention function
KEYWORDS = {"is_causal", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
OWN_ATTENTION = {"eager": eager_attention, "sdpa": sdpa_attention}


def check_arguments(cache, kwargs):
    """Refuse what `forward` got beyond its own arguments, and that no attention function knows either.

    Continuous batching, whose cache is a paged one, may have more to say to its own attention functions.

    Raises:
        TypeError: an unknown keyword. ValueError: a cache of tuples.
    """
    if isinstance(cache, (tuple, list)):
        raise ValueError(
            f"The cache is a {type(cache).__name__} of tensors: give a transformers.DynamicCache, or none."
        )
    unknown = [] if is_paged(cache) else [repr(name) for name in kwargs if name not in KEYWORDS]
    if unknown:
        raise TypeError(f"forward() got an unexpected keyword argument {', '.join(unknown)}: is it misspelled?")


def choose_attention(config, paged=False):
    """The attention function that `attn_implementation` names.

    With the paged cache of continuous batching (`paged`) it is always transformers', which reads that cache.
    """
    name = attention_name(config)
    return (None if paged else OWN_ATTENTION.get(name)) or ALL_ATTENTION_FUNCTIONS[name]


def causal_mask(config, x, attention_mask, cache=None, position_ids=None, cache_position=None, prefix=None):
    """What the chosen attention function takes for its mask.

    Args:
        x: (B, T, C) new tokens; only the shape, the dtype and the device are used.
        attention_mask: 1 for real tokens, 0 for padding, [B, S]; None where all are real. A mask of four dimensions
            is returned as it is.
        cache: the cache before the new tokens are in it, or None.
        position_ids: [B, T] where sequences may be packed in one row: one ends where positions do not go up by 1.
        cache_position: [T] places of the new tokens, which releases before 5.4 ask for.
        prefix: the layers' (key, value) of P-Tuning's prefix, (B, G, P, D), where no cache holds it.

    Returns:
        For eager and sdpa boolean [B or 1, 1, T, S], True where a query may look, or None: causal without exceptions.
    """
    if is_paged(cache) or attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2:
        return attention_mask  # made by continuous batching, or by the caller
    if attention_name(config) not in OWN_ATTENTION:
        return their_causal_mask(config, x, attention_mask, cache, position_ids, cache_position, prefix)

    T, device = x.shape[1], x.device
    learned = prefix[0][0].shape[2] if prefix else 0
    seen, size = (learned, learned + T) if cache is None else cache_size(cache, T)  # a static cache's is a tensor
    fixed = cache is not None and size != seen + T if isinstance(seen, int) else True  # with places that are empty yet
    real = None if attention_mask is None else attention_mask.to(device, torch.bool)
    asks = T > 1 and not is_compiling()  # asking a tensor for its value waits for the GPU: once a prompt, not at a step
    if asks and real is not None and real.all():
        real = None
    if T == 1 and not fixed:  # one new token sees all that is real
        return None if real is None else (real | ~real.any(-1, keepdim=True))[:, None, None]  # never a row of nothing
    packed = None
    if position_ids is not None and real is None and cache is None and T > 1 and not learned:
        packed = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)  # (B, T) sequence numbers
        packed = packed if not asks or packed.any() else None
    if real is None and packed is None and asks and seen == 0:
        return None
    place = torch.arange(size, device=device)
    query = torch.arange(T, device=device)[:, None] + seen
    mask = (place <= query)[None, None]  # (1, 1, T, S)
    if real is not None:
        real = F.pad(real, (0, size - real.shape[1]))[:, None, None]
        mask = mask & real | (place == query)  # a query behind padding sees itself: a row of nothing gives nan
    if packed is not None:
        mask = mask & (packed[:, None, :, None] == packed[:, None, None, :])
    return mask
