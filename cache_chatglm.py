"""A dynamic cache with room to grow: a new token is written to its place, not into a copy of all the others."""

import torch

from .transformers_compat import DynamicCache, DynamicLayer

STEP = 256  # tokens of room at a time: at 6B size 1.8 MB a layer, and one copy of the cache in 256 steps


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, (B, G, S, D): views of the first S places of buffers that hold up to STEP more.

    Everything else that may happen to a layer (crop, reorder, repeat) replaces `keys` and `values`; the next update
    notices that a buffer is not theirs any more, and takes a new one.
    """

    def update(self, key_states, value_states, *args, **kwargs):
        """Append (B, G, T, D); returns all keys and values, (B, G, S, D)."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and key_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            super().update(key_states[..., :0, :], value_states[..., :0, :], *args, **kwargs)
        self.keys, self.key_buffer = appended(self.keys, getattr(self, "key_buffer", None), key_states)
        self.values, self.value_buffer = appended(self.values, getattr(self, "value_buffer", None), value_states)
        return self.keys, self.values


def appended(held, buffer, new):
    """(held and new as one view, its buffer): `held` (B, G, S, D), `new` (B, G, T, D)."""
    seen, total = held.shape[2], held.shape[2] + new.shape[2]
    mine = buffer is not None and buffer.data_ptr() == held.data_ptr() and buffer.shape[:2] == held.shape[:2]
    if not mine or total > buffer.shape[2]:
        buffer = new.new_empty(*new.shape[:2], (total // STEP + 1) * STEP, new.shape[3])
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
