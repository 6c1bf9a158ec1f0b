"""P-Tuning v2: learned keys and values in front of the cache of every layer.

Shapes: B batch size, T new tokens, P prefix tokens, G key/value groups, D head size, L layers.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .transformers_compat import cache_kwargs, is_static


class PrefixEncoder(nn.Module):
    """Learned keys and values of P-Tuning v2 (Liu et al., 2021, arXiv:2110.07602).

    Row p of the embedding holds a key and a value of G heads for every layer. With `prefix_projection` it passes
    through an MLP: Linear, Tanh, Linear.
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
        for module in self.modules():  # initial values as in torch, see ChatGLMPreTrainedModel._init_weights
            module.torch_init = isinstance(module, (nn.Embedding, nn.Linear))
        self.dropout = nn.Dropout(0.1)

    def forward(self, prefix_ids):
        """The rows of `prefix_ids` [B, P], numbers from 0 to pre_seq_len - 1: (B, P, 2 L G D)."""
        return self.trans(self.embedding(prefix_ids))

    def keys_and_values(self, batch_size, dtype):
        """Return (key, value) for each layer, both (B, G, P, D)."""
        config = self.config
        prefix = self(torch.arange(config.pre_seq_len, device=self.embedding.weight.device)).to(dtype)  # (P, 2 L G D)
        prefix = prefix.view(config.pre_seq_len, 2 * config.num_layers, config.num_key_value_heads, config.kv_channels)
        prefix = prefix.permute(1, 2, 0, 3)[:, None].expand(-1, batch_size, -1, -1, -1)  # (2 L, B, G, P, D)
        prefix = self.dropout(prefix)
        return list(zip(prefix[0::2], prefix[1::2]))

    def prepend(self, x, attention_mask, cache):
        """Prepend the prefix to new tokens x (B, T, C). An empty cache is filled with it, for this and later steps.

        Returns:
            (key, value) for each layer if there is no cache to hold them, else None; attention_mask with P more
            columns.

        Raises:
            ValueError: a static cache, or a cache with fewer tokens than the prefix.
        """
        P = self.config.pre_seq_len
        if is_static(cache):
            raise ValueError(
                f"A static cache has no room for the prefix of pre_seq_len={P}, because generate does not count it: "
                "use the dynamic cache."
            )
        held = 0 if cache is None else cache.get_seq_length()
        if 0 < held < P:
            raise ValueError(
                f"The cache holds {held} tokens, fewer than the prefix of pre_seq_len={P}: it was cropped (assisted "
                "decoding before transformers 5 does this). Disable assisted decoding."
            )
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = F.pad(attention_mask, (P, 0), value=1)
        if held:
            return None, attention_mask
        prefix = self.keys_and_values(x.shape[0], x.dtype)
        if cache is None:
            return prefix, attention_mask
        step = cache_kwargs(cache, P, x.device)
        for i, (key, value) in enumerate(prefix):
            cache.update(key, value, i, step)
        return None, attention_mask
