"""P-Tuning v2: learned keys and values in front of every layer's cache.

Shapes: B batch, T new tokens, P prefix tokens, G key/value groups, D channels of a head, L layers.
"""

import torch.nn.functional as F
from torch import nn

from .transformers_compat import cache_kwargs, is_static


class PrefixEncoder(nn.Module):
    """P-Tuning v2's learned keys and values (Liu et al., 2021, arXiv:2110.07602).

    Row p of the embedding holds a key and a value of G heads for every layer; with `prefix_projection` an MLP of
    Linear, Tanh, Linear makes them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        size = config.num_layers * 2 * config.num_key_value_heads * config.kv_channels
        self.embedding = nn.Embedding(config.pre_seq_len, size)
        self.trans = nn.Identity()
        if config.prefix_projection:
            self.trans = nn.Sequential(
                nn.Linear(size, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, size)
            )
        self.dropout = nn.Dropout(0.1)

    def forward(self, batch_size, dtype):
        """A (key, value) for each layer, both (B, G, P, D)."""
        config = self.config
        prefix = self.trans(self.embedding.weight).to(dtype)  # (P, 2 L G D)
        prefix = prefix.view(config.pre_seq_len, 2 * config.num_layers, config.num_key_value_heads, config.kv_channels)
        prefix = prefix.permute(1, 2, 0, 3)[:, None].expand(-1, batch_size, -1, -1, -1)  # (2 L, B, G, P, D)
        prefix = self.dropout(prefix)
        return list(zip(prefix[0::2], prefix[1::2]))

    def put_before(self, x, attention_mask, cache):
        """Put the prefix before new tokens x (B, T, C): into an empty cache, which then gives it to every step.

        Returns:
            the layers' (key, value), where there is no cache to hold them, else None; attention_mask with P columns
            more.

        Raises:
            ValueError: a static cache, or one that holds less than the prefix.
        """
        P = self.config.pre_seq_len
        if is_static(cache):
            raise ValueError(
                f"A static cache has no room for the prefix of pre_seq_len={P}, which generate does not count: use the "
                "dynamic cache."
            )
        held = 0 if cache is None else cache.get_seq_length()
        if 0 < held < P:
            raise ValueError(
                f"The cache holds {held} tokens, fewer than the prefix of pre_seq_len={P}: it was cropped (assisted "
                "decoding before transformers 5 does so). Generate without assistance."
            )
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = F.pad(attention_mask, (P, 0), value=1)
        if held:
            return None, attention_mask
        prefix = self(x.shape[0], x.dtype)
        if cache is None:
            return prefix, attention_mask
        step = cache_kwargs(cache, P, x.device)
        for i, (key, value) in enumerate(prefix):
            cache.update(key, value, i, step)
        return None, attention_mask
