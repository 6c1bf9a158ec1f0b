"""The only file that knows transformers' versions: the newest names with the newest meaning, from 4.30.2 on.

Each fallback says with which release it can be deleted: once that release is the oldest one supported. A feature is
asked for by its name or its signature; version numbers stand in sentences only.
"""

from functools import partial
from inspect import signature, unwrap

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .torch_compat import is_compiling

try:  # quantizing while loading
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError:  # delete with 4.38
    HfQuantizer = QuantizationConfigMixin = object
    AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING = {}, {}

try:
    from transformers.core_model_loading import ConversionOps
except ImportError:  # delete with 5.0
    ConversionOps = object


def register_quantization(method, config_class, quantizer_class):
    """Make `method` known to from_pretrained's quantization_config; of several imports the last one counts."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config_class
    AUTO_QUANTIZER_MAPPING[method] = quantizer_class


try:
    from transformers.cache_utils import DynamicCache
except ImportError:  # delete with 4.36

    class DynamicCache:
        """Keys and values of each layer, (B, G, S, D), that grow with every token."""

        def __init__(self):
            self.key_cache, self.value_cache = [], []

        def __getitem__(self, layer_idx):
            return self.key_cache[layer_idx], self.value_cache[layer_idx]

        def get_seq_length(self, layer_idx=0):
            return self.key_cache[layer_idx].shape[2] if layer_idx < len(self.key_cache) else 0

        def update(self, key, value, layer_idx, cache_kwargs=None):
            for cache, new in ((self.key_cache, key), (self.value_cache, value)):
                if layer_idx < len(cache):
                    cache[layer_idx] = torch.cat((cache[layer_idx], new), dim=2)
                else:
                    cache.append(new)
            return self[layer_idx]

        def reorder_cache(self, beam_idx):
            for cache in (self.key_cache, self.value_cache):
                cache[:] = [rows.index_select(0, beam_idx.to(rows.device)) for rows in cache]


try:
    from transformers.cache_utils import DynamicLayer
except ImportError:  # caches without layers keep torch.cat; delete with 4.56
    DynamicLayer = object

try:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError:  # delete with 4.48

    class AttentionFunctions(dict):
        """No attention but the model's own."""

        def __missing__(self, name):
            raise ValueError(f"attn_implementation={name!r} needs transformers 4.48: upgrade, or take 'sdpa'.")

    ALL_ATTENTION_FUNCTIONS = AttentionFunctions()

try:
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError:  # delete with 4.53

    class GradientCheckpointingLayer(nn.Module):
        """A block whose activations are computed again in the backward pass, once that is switched on."""

        gradient_checkpointing = False

        def __call__(self, *args, **kwargs):
            if not (self.gradient_checkpointing and self.training):
                return super().__call__(*args, **kwargs)
            kwargs["past_key_values"] = None  # the block runs twice, and would write twice
            return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)


try:
    from transformers.masking_utils import create_causal_mask
except ImportError:  # delete with 4.53

    def create_causal_mask(config, input_embeds, attention_mask, cache_position, past_key_values, position_ids=None):
        """Boolean [B, 1, T, S], True where a query may look; additive for eager; None where `is_causal` says it all."""
        name, (B, T, _), device = attention_name(config), input_embeds.shape, input_embeds.device
        if name == "flex_attention":
            raise ValueError(f"attn_implementation={name!r} needs transformers 4.53: upgrade, or take 'sdpa'.")

        if attention_mask is not None:
            if attention_mask.dim() == 4:
                return attention_mask
            attention_mask = attention_mask.to(device, torch.bool)
            if not is_compiling() and attention_mask.all():  # a graph that is compiled cannot ask
                attention_mask = None
        if "flash" in name:
            return attention_mask
        limit, S = None, T
        if past_key_values is not None:  # a static cache has a limit, and hands out its empty places, too
            limit = getattr(past_key_values, "get_max_cache_shape", getattr(past_key_values, "get_max_length", int))()
            S = limit or past_key_values.get_seq_length() + T
        place, query = torch.arange(S, device=device), cache_position.to(device)[:, None]
        mask = (place <= query)[None, None]  # (1, 1, T, S)
        plain = not limit and (S == T or T == 1)
        if attention_mask is not None:
            real = nn.functional.pad(attention_mask, (0, S - attention_mask.shape[1]))[:, None, None]
            mask, plain = mask & real | (place == query), False  # a row that sees nothing would give nan
        elif past_key_values is None and position_ids is not None:  # packed: a sequence ends where positions jump
            sequence = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
            if is_compiling() or sequence.any():
                mask, plain = mask & (sequence[:, None, :, None] == sequence[:, None, None, :]), False
        if name != "eager":
            return None if plain else mask.expand(B, 1, T, S)
        lowest = torch.finfo(input_embeds.dtype).min
        return input_embeds.new_zeros(()).masked_fill(~mask, lowest).expand(B, 1, T, S)


# The library's `generate` before 4.46 wants a model to choose the inputs of each step itself.
PREPARES_INPUTS = "input_ids" in signature(transformers.GenerationMixin.prepare_inputs_for_generation).parameters

if hasattr(transformers.GenerationMixin, "_supports_logits_to_keep"):
    GenerationMixin = transformers.GenerationMixin
else:  # delete with 4.49

    class GenerationMixin(transformers.GenerationMixin):
        """`generate` that scores the prompt's last token alone, begins with embeddings, and reorders a cache."""

        def generate(self, *args, generation_config=None, **kwargs):
            drafted = kwargs.get("assistant_model") or kwargs.get("prompt_lookup_num_tokens")
            if not (drafted or getattr(generation_config, "prompt_lookup_num_tokens", None)):
                kwargs.setdefault("logits_to_keep", 1)
            return super().generate(*args, generation_config=generation_config, **kwargs)

        def _maybe_initialize_input_ids_for_generation(self, inputs=None, bos_token_id=None, model_kwargs=None):
            if inputs is None and "inputs_embeds" in (model_kwargs or {}):
                return torch.ones(len(model_kwargs["inputs_embeds"]), 0, dtype=torch.long, device=self.device)
            return super()._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, model_kwargs)

        @staticmethod
        def _reorder_cache(past_key_values, beam_idx):
            past_key_values.reorder_cache(beam_idx)
            return past_key_values


class ModelFallbacks:
    """What newer releases give to every PreTrainedModel; stands in front of it among the bases."""

    if "safe_serialization: bool = False" in str(signature(PreTrainedModel.save_pretrained)):  # delete with 4.35

        def save_pretrained(self, *args, safe_serialization=True, **kwargs):
            super().save_pretrained(*args, safe_serialization=safe_serialization, **kwargs)

    if "gradient_checkpointing_kwargs" not in signature(PreTrainedModel.gradient_checkpointing_enable).parameters:
        # delete with 4.35
        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, enable=True):
            function = partial(checkpoint, **(gradient_checkpointing_kwargs or {"use_reentrant": False}))
            for layer in self.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.gradient_checkpointing, layer._gradient_checkpointing_func = enable, function

        def gradient_checkpointing_disable(self):
            self.gradient_checkpointing_enable(enable=False)

    elif not hasattr(PreTrainedModel, "activation_checkpointing_enable"):  # not reentrant by default; delete with 5.0

        def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
            super().gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False}, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):  # float32 was the default, `torch_dtype` the name; delete with 5.0
        stored = getattr(kwargs.get("config"), "dtype", None)  # written by a release that names it so
        asked = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or stored or "auto"
        attention = None if NAMES_ATTENTION else kwargs.pop("attn_implementation", None)
        for auto, name in (getattr(kwargs.get("config"), "auto_map", None) or {}).items():
            if cls._auto_class is None and str(name).endswith("." + cls.__name__):  # saves the code; delete with 4.53
                cls.register_for_auto_class(auto)
        model = super().from_pretrained(*args, **{DTYPE: as_dtype(asked)}, **kwargs)
        if attention is not None:
            (model[0] if isinstance(model, tuple) else model).config._attn_implementation = attention
        return model

    @classmethod
    def _from_config(cls, config, **kwargs):
        asked = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if not NAMES_ATTENTION:
            config._attn_implementation = kwargs.pop("attn_implementation", attention_name(config))
        return super()._from_config(config, **({DTYPE: as_dtype(asked)} if asked else {}), **kwargs)


DTYPE = "dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype"  # delete with 4.56
NAMES_ATTENTION = hasattr(transformers.PretrainedConfig(), "_attn_implementation")  # delete with 4.36
_MASK_PARAMETERS = signature(create_causal_mask).parameters
# Its `generate` asks once whether a mask says anything, and drops it if not (5.23); with releases before, the step asks
_ASKS_ONCE = "_mask_length" in unwrap(transformers.GenerationMixin.generate).__code__.co_names


def as_dtype(name):
    """torch.float16 for "float16", as releases before 4.42 do not; "auto" and dtypes stay."""
    return getattr(torch, name.split(".")[-1], name) if isinstance(name, str) else name


def attention_name(config):
    """The `attn_implementation` chosen for the model: "sdpa", "eager", "flash_attention_2", ..."""
    return getattr(config, "_attn_implementation", None) or "sdpa"


def crop_cache(past_key_values, tokens):
    """Forget the last `tokens` tokens of a cache."""
    if hasattr(past_key_values, "crop"):
        return past_key_values.crop(-tokens)
    for cache in (past_key_values.key_cache, past_key_values.value_cache):  # delete with 4.39
        cache[:] = [rows[:, :, :-tokens] for rows in cache]


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
    own = attention_name(config) in ("sdpa", "eager") and not getattr(past_key_values, "is_compileable", False)
    if _ASKS_ONCE and own and attention_mask is not None and attention_mask.dim() == 2 and inputs_embeds.shape[1] == 1:
        real = attention_mask.to(inputs_embeds.device, torch.bool)  # one new token sees them all, and no GPU is asked
        return (real | ~real.any(-1, keepdim=True))[:, None, None]  # (B, 1, 1, S); what sees nothing would give nan
    embeds = "inputs_embeds" if "inputs_embeds" in _MASK_PARAMETERS else "input_embeds"
    kwargs = {"config": config, embeds: inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids,
              "past_key_values": past_key_values, "cache_position": cache_position}  # fmt: skip
    return create_causal_mask(**{name: value for name, value in kwargs.items() if name in _MASK_PARAMETERS})
