"""The only file that knows transformers' versions: the newest names with the newest meaning, for older releases too."""

import inspect

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    from transformers.generation import GenerationMixin
except ImportError:
    from transformers import GenerationMixin

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "Cache",
    "DynamicCache",
    "GenerationMixin",
    "GradientCheckpointingLayer",
    "NonReentrantCheckpointing",
    "attention_name",
    "cache_update_kwargs",
    "causal_mask",
]

_MASK_PARAMETERS = inspect.signature(create_causal_mask).parameters


def attention_name(config):
    """The `attn_implementation` chosen for the model: "sdpa", "eager", "flash_attention_2", ..."""
    return config._attn_implementation


def cache_update_kwargs(past_key_values, length, device, cache_position=None):
    """What `Cache.update` wants beyond key, value and layer: until 5.0 a cache did not count its own tokens."""
    if "cache_position" not in _MASK_PARAMETERS:
        return {}
    if cache_position is None:
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        cache_position = torch.arange(length, device=device) + seen
    return {"cache_position": cache_position}


def causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids, cache_position=None):
    """The causal mask in the form that the chosen attention takes, from a mask [B, S] of real tokens or None."""
    kwargs = {
        "config": config,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values,
        "position_ids": position_ids,
        "inputs_embeds" if "inputs_embeds" in _MASK_PARAMETERS else "input_embeds": inputs_embeds,
        "cache_position": cache_position,
    }
    return create_causal_mask(**{name: value for name, value in kwargs.items() if name in _MASK_PARAMETERS})


class NonReentrantCheckpointing:
    """Gradient checkpointing without reentrance by default, as transformers 5 does. Delete with 4.57."""

    if not hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None):
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})
