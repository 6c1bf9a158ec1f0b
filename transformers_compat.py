"""The only file that depends on the version of transformers: one name and one meaning for what changed since 4.30.2.

"delete with X" marks code that can be deleted once X is the oldest supported release. docs/compatibility.md lists the
names that this package uses from transformers without their being documented as public.
"""

import sys
from dataclasses import dataclass, fields
from functools import lru_cache, partial

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, modeling_outputs
from transformers.utils import logging

from .torch_compat import is_compiling, is_shared

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
DTYPE = "dtype" if VERSION >= (4, 56) else "torch_dtype"
CACHE = "cache" if VERSION >= (5, 24) else "past_key_values"  # its name in forward, generate and outputs
CACHE_NAMES = ("cache", "past_key_values")
KEEPS_EMPTY_MASKS = VERSION < (5, 23)  # `generate` passes a mask even without padding


# ---- the cache ------------------------------------------------------------------------------------------------------

try:
    from transformers.cache_utils import Cache, DynamicCache
except ImportError:  # delete with 4.36

    class DynamicCache:
        """Keys and values of each layer, (B, G, S, D), which grow with every token."""

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

    Cache = DynamicCache

if VERSION >= (4, 57):
    from transformers.cache_utils import DynamicLayer
else:  # caches have no layers and use torch.cat; delete with 4.57
    DynamicLayer = object


def take_cache(kwargs, *named):
    """Return the cache found among `named` and in kwargs, under any name, and remove it from kwargs.

    An empty one gives way: PEFT passes its prefix as `past_key_values`, beside the empty `cache` of `generate`.

    Raises:
        ValueError: two different caches.
    """
    found = [value for value in named if value is not None]
    for name in [name for name, value in kwargs.items() if name in CACHE_NAMES or isinstance(value, Cache)]:
        value = kwargs.pop(name)
        found += [] if value is None else [value]
    if any(value is not found[0] for value in found):
        found = [value for value in found if not hasattr(value, "get_seq_length") or value.get_seq_length()]
        if not found or any(value is not found[0] for value in found):
            raise ValueError("Two caches were given: `cache` and `past_key_values` are the same argument, pass one.")
    return found[0] if found else None


def is_paged(cache):
    """Whether this is the paged cache of continuous batching, which only transformers' attention functions read.

    It is told by name: it derives from nothing, like a cache that a caller has written, which is read as any other.
    """
    return type(cache).__name__ == "PagedAttentionCache" and not isinstance(cache, Cache)


def update_paged(cache, key, value, layer_idx, kwargs):
    """Return keys and values for the attention function, and add to kwargs what else it needs."""
    if VERSION >= (5, 24):
        return cache.update(key, value, layer_idx, kwargs=kwargs)
    kwargs["cache"] = cache  # the attention function calls update itself
    return key, value


def is_static(cache):
    """Whether the cache is allocated for a fixed number of tokens and returns all its slots, used or not."""
    if VERSION < (4, 49):  # delete with 4.49
        return hasattr(cache, "max_cache_len")
    return getattr(cache, "is_compileable", False)


def cache_size(cache, new):
    """Return (tokens in the cache, S: the length of its keys after `new` more tokens).

    For a static cache the first is a tensor in most releases: comparing it waits for the GPU.
    """
    seen = cache.get_seq_length()
    if not is_static(cache):
        return seen, seen + new
    names = ["get_max_cache_shape", "get_max_length"]  # the second from 5.9 on, and before 4.46
    if VERSION >= (5, 0):
        names.reverse()
    return seen, getattr(cache, next(name for name in names if hasattr(cache, name)))()


def cache_kwargs(cache, new, device, cache_position=None):
    """Extra arguments of `Cache.update`: before 5.4 a static cache did not count its tokens."""
    if VERSION >= (5, 4):
        return {}
    if cache_position is None:
        seen = 0 if cache is None else cache.get_seq_length()
        cache_position = torch.arange(new, device=device) + seen
    return {"cache_position": cache_position}


def crop_cache(cache, tokens):
    """Remove the last `tokens` tokens from the cache."""
    if hasattr(cache, "crop"):
        return cache.crop(-tokens)
    for held in (cache.key_cache, cache.value_cache):  # delete with 4.39
        held[:] = [rows[:, :, :-tokens] for rows in held]


# Buffers grow by this many tokens: 0.3 MB per layer of 6B in half precision, and one copy of the cache in 256 steps.
STEP = 256


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, (B, G, S, D): views of the first S slots of buffers with room for up to STEP more.

    A new token is written in place, without copying all the others, after a crop as well. Any other operation (reorder,
    repeat) replaces `keys` and `values`; the next update detects that they no longer view the buffer and allocates a
    new one.
    """

    def update(self, key_states, value_states, *args, **kwargs):
        """Append (B, G, T, D) and return all keys and values, (B, G, S, D)."""
        needs_grad = key_states.requires_grad or (self.is_initialized and self.keys.requires_grad)
        if is_compiling() or (torch.is_grad_enabled() and needs_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            super().update(key_states[..., :0, :], value_states[..., :0, :], *args, **kwargs)
        if self.keys.shape[:2] != key_states.shape[:2]:  # writing into the buffer would repeat one row for all
            (B, G), (rows, heads) = self.keys.shape[:2], key_states.shape[:2]
            raise ValueError(
                f"The cache holds {B} rows of {G} heads, the new tokens have {rows} of {heads}. Pass a cache of the "
                "same rows, or None."
            )
        seen, tokens = self.keys.shape[2], key_states.shape[2]
        for buffer, new in zip(self.reserve(tokens, key_states.dtype, value_states.dtype), (key_states, value_states)):
            buffer[:, :, seen : seen + tokens] = new
        return self.extend(tokens)

    def reserve(self, tokens, key_dtype, value_dtype):
        """Return the buffers of keys and values with room for `tokens` more, which the caller writes behind `keys`."""
        self.key_buffer = with_room(self.keys, getattr(self, "key_buffer", None), tokens, key_dtype)
        self.value_buffer = with_room(self.values, getattr(self, "value_buffer", None), tokens, value_dtype)
        return self.key_buffer, self.value_buffer

    def extend(self, tokens):
        """Take the tokens that were written behind `keys` into the cache; return all keys and values."""
        total = self.keys.shape[2] + tokens
        self.keys, self.values = self.key_buffer[:, :, :total], self.value_buffer[:, :, :total]
        return self.keys, self.values

    def crop(self, *args, **kwargs):
        """Remove the last tokens. If others hold tensors of a buffer, they stay: the next update allocates one."""
        before = self.keys.shape[2] if self.is_initialized else 0
        super().crop(*args, **kwargs)
        if getattr(self, "key_buffer", None) is None or self.keys.shape[2] == before:
            return
        if is_shared(self.key_buffer, self.keys) or is_shared(self.value_buffer, self.values):
            self.key_buffer = self.value_buffer = None


def with_room(held, buffer, tokens, dtype):
    """`buffer`, if it is where `held` (B, G, S, D) lies and has room for `tokens` more; else a new one, with a copy."""
    seen, total = held.shape[2], held.shape[2] + tokens
    owned = buffer is not None and buffer.data_ptr() == held.data_ptr() and buffer.stride() == held.stride()
    owned = owned and buffer.shape[:2] == held.shape[:2]
    writable = owned and buffer.dtype == dtype and (torch.is_inference_mode_enabled() or not buffer.is_inference())
    if not writable or total > buffer.shape[2]:
        dtype = torch.promote_types(held.dtype, dtype)
        buffer = held.new_empty(*held.shape[:2], (total // STEP + 1) * STEP, held.shape[3], dtype=dtype)
        buffer[:, :, :seen] = held
        buffer[:, :, seen:] = 0  # a graph of blocks_cuda gives these values a weight of 0, and 0 * nan is nan
    return buffer


def grow_in_place(cache):
    """Make an empty DynamicCache grow in place; other kinds of cache, and offloaded ones, are left unchanged."""
    if DynamicLayer is object or type(cache) is not DynamicCache or getattr(cache, "offloading", True):
        return
    if any(layer.is_initialized or type(layer) is not DynamicLayer for layer in cache.layers):
        return
    cache.layers = [GrowingLayer() for _ in cache.layers]
    if cache.layer_class_to_replicate is not None:
        cache.layer_class_to_replicate = GrowingLayer


def growing_layers(cache):
    """The layers of a cache that `grow_in_place` has changed and that holds tokens; an empty list for another."""
    layers = cache.layers if type(cache) is DynamicCache and DynamicLayer is not object else []
    return layers if all(type(layer) is GrowingLayer and layer.is_initialized for layer in layers) else []


# ---- outputs --------------------------------------------------------------------------------------------------------


class BothCacheNames:
    """An output with both `cache` and `past_key_values`, without a warning, whatever the release calls it."""

    def __getitem__(self, key):
        return super().__getitem__(CACHE if key in CACHE_NAMES else key)

    def __contains__(self, key):
        return super().__contains__(CACHE if key in CACHE_NAMES else key)

    def get(self, key, default=None):
        return super().get(CACHE if key in CACHE_NAMES else key, default)

    def __reduce__(self):
        cls, args, *rest = super().__reduce__()
        return _rebuild_output, (cls.__bases__[1], args), *rest


OTHER_CACHE_NAME = next(name for name in CACHE_NAMES if name != CACHE)
setattr(BothCacheNames, OTHER_CACHE_NAME, property(lambda output: getattr(output, CACHE)))


@lru_cache(None)
def with_both_cache_names(cls):
    """Subclass the output class `cls` to have both names of the cache; its constructor takes `cache=`."""
    both = dataclass(type(cls.__name__, (BothCacheNames, cls), {"__doc__": cls.__doc__, "__module__": __name__}))
    if CACHE != "cache":  # delete with 5.24
        init = both.__init__

        def __init__(self, *args, cache=None, **kwargs):
            init(self, *args, **({} if cache is None else {CACHE: cache}), **kwargs)

        both.__init__ = __init__
    return both


def _rebuild_output(cls, args):
    return with_both_cache_names(cls)(*args)


BaseModelOutputWithPast = with_both_cache_names(modeling_outputs.BaseModelOutputWithPast)
CausalLMOutputWithPast = with_both_cache_names(modeling_outputs.CausalLMOutputWithPast)
SequenceClassifierOutputWithPast = with_both_cache_names(modeling_outputs.SequenceClassifierOutputWithPast)


# ---- attention ------------------------------------------------------------------------------------------------------

try:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError:  # delete with 4.48

    class AttentionFunctions(dict):
        """No attention functions besides the model's own."""

        def __missing__(self, name):
            raise ValueError(f"attn_implementation={name!r} needs transformers 4.48: upgrade, or use 'sdpa'.")

    ALL_ATTENTION_FUNCTIONS = AttentionFunctions()


def attention_name(config):
    """The `attn_implementation` chosen for the model: "sdpa", "eager", "flash_attention_2", ..."""
    return getattr(config, "_attn_implementation", None) or "sdpa"


def transformers_causal_mask(config, x, attention_mask, cache, position_ids, cache_position, prefix):
    """The mask that transformers builds for its own attention functions; arguments as for `causal_mask`."""
    name = attention_name(config)
    if VERSION < (4, 53):  # delete with 4.53
        if "flash" in name:
            return attention_mask
        raise ValueError(f"attn_implementation={name!r} needs transformers 4.53: upgrade, or use 'sdpa'.")
    from transformers.masking_utils import create_causal_mask

    if cache is None and prefix:
        cache = DynamicCache()
        cache.update(*prefix[0], 0)
    known = {"config": config, "attention_mask": attention_mask, CACHE: cache, "position_ids": position_ids}
    if VERSION < (5, 4):
        known.update(cache_kwargs(cache, x.shape[1], x.device, cache_position))
    return create_causal_mask(**known, **{"inputs_embeds" if VERSION >= (5, 2) else "input_embeds": x})


# ---- the configuration ----------------------------------------------------------------------------------------------


class ConfigFallbacks:
    """One dtype under both names: `torch_dtype`, the original's, and `dtype`, without the warning of newer releases.

    Before 4.56 a config kept what a newer release had saved as `dtype`, and saved it beside the `torch_dtype` that a
    later cast had changed; from 4.56 on transformers reads `dtype` where a file has both.
    """

    def __init__(self, **kwargs):
        if kwargs.get("torch_dtype") is not None:
            kwargs.pop("dtype", None)
        super().__init__(**kwargs)

    if VERSION >= (4, 56):

        @property
        def torch_dtype(self):
            return self.dtype

        @torch_dtype.setter
        def torch_dtype(self, dtype):
            self.dtype = dtype

        @classmethod
        def from_dict(cls, config_dict, **kwargs):
            if "torch_dtype" in kwargs:
                kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
            return super().from_dict(config_dict, **kwargs)

    else:

        @property
        def dtype(self):
            return self.torch_dtype

        @dtype.setter
        def dtype(self, dtype):
            self.torch_dtype = as_dtype(dtype)


# ---- the model ------------------------------------------------------------------------------------------------------


class ModelFallbacks:
    """Features of PreTrainedModel in newer releases; must precede it in the bases."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):  # the default was float32, the name `torch_dtype`; delete with 5.0
        stored = getattr(kwargs.get("config"), "dtype", None)
        asked = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or stored or "auto"
        attention = kwargs.pop("attn_implementation", None) if VERSION < (4, 36) else None
        for auto, name in (getattr(kwargs.get("config"), "auto_map", None) or {}).items():
            if cls._auto_class is None and str(name).endswith("." + cls.__name__):  # to save the code; delete with 4.53
                cls.register_for_auto_class(auto)
        model = super().from_pretrained(*args, **{DTYPE: as_dtype(asked)}, **kwargs)
        if attention is not None:
            (model[0] if isinstance(model, tuple) else model).config._attn_implementation = attention
        return model

    @classmethod
    def _from_config(cls, config, **kwargs):
        asked = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        if VERSION < (4, 36):
            config._attn_implementation = kwargs.pop("attn_implementation", attention_name(config))
        return super()._from_config(config, **({DTYPE: as_dtype(asked)} if asked else {}), **kwargs)


def as_dtype(name):
    """Convert "float16" to torch.float16, which releases before 4.42 do not; "auto" and dtypes are unchanged."""
    return getattr(torch, name.split(".")[-1], name) if isinstance(name, str) else name


# ---- generate -------------------------------------------------------------------------------------------------------


def drafts(kwargs, generation_config):
    """Whether these arguments of `generate` ask for assisted decoding."""
    lookup = getattr(generation_config, "prompt_lookup_num_tokens", None)
    return bool(kwargs.get("assistant_model") or kwargs.get("prompt_lookup_num_tokens") or lookup)


class LineStreamer:
    """Lets a TextStreamer keep the first space of a line, also of the first line behind a prompt that it skips.

    Before 5.24 it forgets the tokens of a line at its end and decodes the next line by itself, where SentencePiece
    drops the first space as in front of every text: code lost one column of its indentation. With the line feed left in
    its cache, as printed already, the next line is decoded behind it.
    """

    def __init__(self, streamer):
        self.streamer, self.line_feed = streamer, None

    def put(self, value):
        streamer = self.streamer
        streamer.put(value)
        if streamer.token_cache:
            return
        last = value.flatten()[-1:].tolist()
        text = streamer.tokenizer.decode(last, **streamer.decode_kwargs)
        if text.endswith("\n"):
            self.line_feed = last, len(text)
        if self.line_feed:
            streamer.token_cache, streamer.print_len = list(self.line_feed[0]), self.line_feed[1]

    def end(self):
        self.streamer.end()


# arguments of `generate` -> the release from which on it takes a cache that is no tuple for them
NEEDED = {"assistant_model": (4, 40), "penalty_alpha": (4, 40), "prompt_lookup_num_tokens": (4, 42)}


class GenerationMixin(transformers.GenerationMixin):
    """transformers' `generate`, which takes the cache under both names on every release."""

    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """As in transformers; outputs of `return_dict_in_generate` have both names of the cache."""
        cache = take_cache(kwargs)
        if cache is not None:
            kwargs[CACHE] = cache
        if isinstance(kwargs.get("streamer"), transformers.TextStreamer):
            kwargs["streamer"] = LineStreamer(kwargs["streamer"])
        settings = generation_config or self.generation_config
        for name, since in NEEDED.items():  # delete with 4.42
            if VERSION < since and (kwargs.get(name) or getattr(settings, name, None)):
                raise ValueError(f"{name} needs transformers {since[0]}.{since[1]}: upgrade, or leave it out.")
        if VERSION < (4, 49) and not drafts(kwargs, settings):
            kwargs.setdefault("logits_to_keep", 1)  # only for the prompt's last token; delete with 4.49
        output = super().generate(inputs, generation_config, *args, **kwargs)
        if isinstance(output, torch.Tensor) or not hasattr(output, CACHE):
            return output
        return with_both_cache_names(type(output))(
            **{field.name: getattr(output, field.name) for field in fields(output)}
        )

    if VERSION < (4, 49):  # start from embeddings, and reorder a cache; delete with 4.49

        def _maybe_initialize_input_ids_for_generation(self, inputs=None, bos_token_id=None, model_kwargs=None):
            if inputs is None and "inputs_embeds" in (model_kwargs or {}):
                return torch.ones(len(model_kwargs["inputs_embeds"]), 0, dtype=torch.long, device=self.device)
            return super()._maybe_initialize_input_ids_for_generation(inputs, bos_token_id, model_kwargs)

        @staticmethod
        def _reorder_cache(past_key_values, beam_idx):
            past_key_values.reorder_cache(beam_idx)
            return past_key_values


# ---- quantizing while loading ---------------------------------------------------------------------------------------

try:
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


class RoundingQuantizer(HfQuantizer):
    """Quantizes float weights while loading, through the interfaces of transformers 4 and 5.

    A subclass implements `create_layers(model, device_map)`, which inserts empty quantized layers and returns
    {name: layer} of those whose float weights are in the checkpoint, and `rounded(layer, name, weight)`, which returns
    (weight, weight_scale) for such a layer.
    """

    requires_calibration = False
    is_trainable = True  # with P-Tuning v2 or LoRA on top
    is_compileable = True

    def is_serializable(self, safe_serialization=None):
        return True

    def _process_model_before_weight_loading(self, model, device_map=None, **kwargs):
        self.layers = self.create_layers(model, device_map)
        if VERSION >= (5, 0):  # up to 5.10 loaded weights are cast to the parameter's dtype
            for layer in self.layers.values():
                float_weight = layer.weight.to(layer.weight_scale.dtype)
                layer.weight = nn.Parameter(float_weight, requires_grad=False)
        return model

    def param_needs_quantization(self, model, param_name, **kwargs):
        layer, _, kind = param_name.rpartition(".")
        return kind == "weight" and layer in self.layers

    def parameters_of(self, name, weight):
        """Return {name: quantized weight, name of its scale: scale} as parameters."""
        layer = name.rpartition(".")[0]
        tensors = self.rounded(self.layers[layer], name, weight)
        names = f"{layer}.weight", f"{layer}.weight_scale"
        return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in zip(names, tensors)}

    def get_quantize_ops(self):  # transformers 5
        return RoundWhileLoading(self)

    def create_quantized_param(self, model, param_value, param_name, target_device, *args, **kwargs):  # transformers 4
        for name, value in self.parameters_of(param_name, param_value.to(target_device)).items():
            layer, _, kind = name.rpartition(".")
            setattr(model.get_submodule(layer), kind, value)

    requires_parameters_quantization = True  # before 4.56, as is check_quantized_param

    def check_quantized_param(self, model, param_value, param_name, *args, **kwargs):
        return self.param_needs_quantization(model, param_name)

    def update_missing_keys(self, model, missing_keys, prefix):  # transformers 4
        scales = {f"{name}.weight_scale" for name in self.layers}
        return [key for key in missing_keys if key not in scales]

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.layers and "disk" in getattr(model, "hf_device_map", {}).values():
            raise ValueError(
                "device_map offloads layers to disk, where transformers keeps float weights: quantize and "
                "save_pretrained without it, then load the saved model with this device_map"
            )
        self.remove_quantization_config(model)  # `quantization_bit` suffices, as after quantize()
        return model

    def remove_quantization_config(self, model):
        for name in ("hf_quantizer", "quantization_method"):
            vars(model).pop(name, None)
        for name in ("quantization_config", "_pre_quantization_dtype", "_is_quantized"):
            vars(model.config).pop(name, None)
        model.is_quantized = False


class RoundWhileLoading(ConversionOps):
    """For transformers 5: convert {name: [float weight]} to {name: int8 weight, name of its scale: scale}."""

    def __init__(self, quantizer):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict, *args, model=None, full_layer_name=None, **kwargs):
        (value,) = input_dict.values()
        return self.quantizer.parameters_of(full_layer_name, value[0] if isinstance(value, list) else value)


def register_quantization(method, config_class, quantizer_class):
    """Register `method` for from_pretrained's quantization_config; a later import replaces an earlier one."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config_class
    AUTO_QUANTIZER_MAPPING[method] = quantizer_class


def progress_bar(items, title):
    """`items`, with a bar in a terminal if they take over a second; transformers' disable_progress_bar hides it."""
    return logging.tqdm(items, desc=title, disable=None, delay=1)


# ---- serving --------------------------------------------------------------------------------------------------------


def register_for_serve(architectures):
    """Let `transformers serve` find the model: it looks up `architectures` only among its own classes.

    Each name becomes AutoModelForCausalLM, which follows the checkpoint's `auto_map` and still requires
    `--trust-remote-code`. In any other process this does nothing.
    """
    server = sys.modules.get("transformers.cli.serving.model_manager")
    if server is None:
        return
    for name in architectures:
        if not hasattr(server.transformers, name):
            setattr(server.transformers, name, transformers.AutoModelForCausalLM)
