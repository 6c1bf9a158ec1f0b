"""A dynamic cache with room to grow: a new token is written to its place, not into a copy of all the others."""

import torch

from .torch_compat import is_compiling
from .transformers_compat import DynamicCache, DynamicLayer

# Tokens of room at a time: at 6B size 0.3 MB a layer in half precision, and one copy of the cache in 256 steps.
STEP = 256


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, (B, G, S, D): views of the first S places of buffers that hold up to STEP more.

    Everything else that may happen to a layer (crop, reorder, repeat) replaces `keys` and `values`; the next update
    notices that a buffer is not theirs any more, and takes a new one.
    """

    def update(self, key_states, value_states, *args, **kwargs):
        """Append (B, G, T, D); returns all keys and values, (B, G, S, D)."""
        learns = key_states.requires_grad or (self.is_initialized and self.keys.requires_grad)
        if is_compiling() or (torch.is_grad_enabled() and learns):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            super().update(key_states[..., :0, :], value_states[..., :0, :], *args, **kwargs)
        self.keys, self.key_buffer = appended(self.keys, getattr(self, "key_buffer", None), key_states)
        self.values, self.value_buffer = appended(self.values, getattr(self, "value_buffer", None), value_states)
        return self.keys, self.values

    def crop(self, *args, **kwargs):
        """Forget the last tokens. What was read before stays as it is: the next update takes a new buffer."""
        super().crop(*args, **kwargs)
        self.key_buffer = self.value_buffer = None


def appended(held, buffer, new):
    """(held and new as one view, its buffer): `held` (B, G, S, D), `new` (B, G, T, D)."""
    seen, total = held.shape[2], held.shape[2] + new.shape[2]
    mine = buffer is not None and buffer.data_ptr() == held.data_ptr() and buffer.stride() == held.stride()
    mine = mine and buffer.shape[:2] == held.shape[:2]
    writable = mine and buffer.dtype == new.dtype and (torch.is_inference_mode_enabled() or not buffer.is_inference())
    if not writable or total > buffer.shape[2]:
        dtype = torch.promote_types(held.dtype, new.dtype)
        buffer = new.new_empty(*new.shape[:2], (total // STEP + 1) * STEP, new.shape[3], dtype=dtype)
        buffer[:, :, :seen] = held
    buffer[:, :, seen:total] = new
    return buffer[:, :, :total], buffer


def give_room(past_key_values):
    """Let an empty DynamicCache grow in place; caches of other kinds, and offloaded ones, stay as they are."""
    if type(past_key_values) is not DynamicCache or getattr(past_key_values, "offloading", True):
        return
    if any(layer.is_initialized or type(layer) is not DynamicLayer for layer in past_key_values.layers):
        return
    past_key_values.layers = [GrowingLayer() for _ in past_key_values.layers]
    if past_key_values.layer_class_to_replicate is not None:
        past_key_values.layer_class_to_replicate = GrowingLayer
