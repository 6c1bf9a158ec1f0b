"""Base class of the models: loading, initialization, activation checkpointing, quantization."""

import copy
from contextlib import contextmanager, nullcontext
from functools import partial, wraps

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .checkpoint_chatglm import check_names, check_shapes, quantization_changes, read_checkpoint
from .configuration_chatglm import ChatGLMConfig
from .quantization import quantize
from .quantization_loading import lay_out, missing_quantized_weights_error  # this registers quant_method "chatglm"
from .transformers_compat import ModelFallbacks


def checkpointed(forward):
    """Recompute the activations of a block's forward in the backward pass, if gradient checkpointing is enabled."""

    @wraps(forward)
    def run(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self.checkpoint(partial(forward, self, **kwargs), *args)
        return forward(self, *args, **kwargs)

    return run


def offloaded_checkpoint(function, *args, **options):
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *args, **options)


def as_device(device):
    """torch.device(device), or None for None. Raises ValueError if it is not a device."""
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not a device: use 'cpu', 'cuda', 'cuda:1', 'mps' or 'meta'.") from error


class ChatGLMPreTrainedModel(ModelFallbacks, PreTrainedModel):
    """Base class of the public models: initialization, and the features that transformers asks about."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_cache_class = True
    _supports_static_cache = True
    _supports_quantized_cache = True
    _can_compile_fullgraph = True

    def __init__(self, config, *args, **kwargs):
        config.check()  # it may have been changed since it was read
        super().__init__(config, *args, **kwargs)

    @contextmanager
    def building(self, empty_init, device):
        """Create modules on `device` inside this context; at its end they get initial values, unless `empty_init`."""
        device = as_device(device)
        place = torch.device("meta") if empty_init else device
        with nullcontext() if place is None else place:
            yield
            self.post_init()
        if empty_init:
            self.to_empty(device=device or "cpu")

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # every forward looks up the attention function

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info=False, strict=True, config=None, device=None,
        empty_init=None, **kwargs,
    ):  # fmt: skip
        """As in transformers, but the default dtype is that of the checkpoint, and its tensors have to fit.

        Args:
            strict: False initializes missing weights, and ignores those for which the model has no place. A P-Tuning
                prefix and a classifier that are new are no missing weights.
            device: load the model there, like `device_map={"": device}`.
            empty_init: accepted for the original's callers. Either way, weights from the checkpoint are not initialized
                first, and missing ones always are.

        Raises:
            ValueError: a file is damaged; weights are missing, in excess or of a wrong dtype; the config has
                `quantization_bit`, but the checkpoint holds no such weights; an unknown device, or both device and
                device_map; also whatever transformers raises.
        """
        device = as_device(device)
        if device is not None and kwargs.get("device_map") is not None:
            raise ValueError(f"device={str(device)!r} and device_map={kwargs['device_map']!r} were given: pass one.")
        if device is not None and device.type not in ("cpu", "meta"):
            kwargs["device_map"] = {"": str(device)}
        tensors = read_checkpoint(pretrained_model_name_or_path, **kwargs)
        given = config is not None and hasattr(config, "to_dict")
        if tensors:
            source = config or pretrained_model_name_or_path
            known = config if given else cls.config_class.from_pretrained(source, **kwargs)
            changes = quantization_changes(tensors, known)
            if not given:
                kwargs.update(changes)
            elif changes:
                config = copy.deepcopy(config)
                config.update(changes)
        try:
            model, report = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, config=config, **kwargs
            )
        except RuntimeError as error:
            if "mismatch" in str(error) and tensors:
                known.update(changes)
                with torch.device("meta"):
                    check_shapes(cls(known), tensors, error)
            raise
        unscaled = sorted(name for name in report["missing_keys"] if name.endswith(".weight_scale"))
        if unscaled:  # float weights, which most releases of transformers have truncated to int8
            raise missing_quantized_weights_error(model.config.quantization_bit, f"no {unscaled[0]}")
        if strict:
            check_names(pretrained_model_name_or_path, model, tensors, report)
        settings = getattr(model, "generation_config", None)
        for name in ("eos_token_id", "pad_token_id"):  # generation_config.json hides those of config.json
            if settings is not None and getattr(settings, name) is None:
                setattr(settings, name, getattr(model.config, name))
        model.base_model.freeze_all_but_prefix()  # loading may have replaced parameters
        if device is not None:
            model.to(device)
        lay_out(model)
        return (model, report) if output_loading_info else model

    def quantize(self, bits, empty_init=False, device=None, **options):
        """Quantize the linear layers of every block to `bits` (4 or 8) bits, in place; 0 does nothing.

        Args:
            empty_init: create the layers without values, for a checkpoint to fill.
            device: move the model there once it is quantized.
            **options: those of `quantization.quantize`.

        Returns:
            The model.

        Raises:
            ValueError: an unknown device, before anything is changed; and those of `quantization.quantize`.
        """
        return quantize(self, bits, empty_init=empty_init, device=as_device(device), **options)

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """As in transformers; raises ValueError if the embedding or the output layer is quantized."""
        base = self.base_model
        for option, layer in (("embedding", base.embedding.word_embeddings), ("output_layer", base.output_layer)):
            if hasattr(layer, "weight_scale") and new_num_tokens not in (None, len(layer.weight_scale)):
                raise ValueError(
                    f"new_num_tokens={new_num_tokens}: the {option} has {len(layer.weight_scale)} rows in int8, which "
                    f"cannot be resized. Resize the float model, then quantize it, or quantize without {option}=True."
                )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _init_weights(self, module):
        """Initialize missing parameters: normal weights, zero biases, unit norms. Quantized weights are left alone.

        A prefix and a classifier start as torch's own layers do, which published learning rates presuppose.
        """
        if getattr(module, "torch_init", False):
            return module.reset_parameters()
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(module, (nn.Linear, nn.Embedding)) and weight.is_floating_point():
            nn.init.normal_(weight, std=self.config.initializer_range)
        elif weight is not None and weight.dim() == 1:  # a norm
            nn.init.ones_(weight)
        if bias is not None:
            nn.init.zeros_(bias)

    # Activation checkpointing, the same on every release: 5.x began to rename it, and 6 removes the old name

    def activation_checkpointing_enable(self, every_n_layers=1, offload=False, activation_checkpointing_kwargs=None):
        """Recompute the activations of every n-th block in the backward pass instead of storing them.

        offload: keep the inputs that recomputing needs in host memory. activation_checkpointing_kwargs: passed to
        torch.utils.checkpoint.checkpoint; the default is non-reentrant.
        """
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        for i, block in enumerate(self.base_model.encoder.layers):
            block.gradient_checkpointing = i % every_n_layers == 0
            block.checkpoint = partial(offloaded_checkpoint if offload else checkpoint, **options)
        if options.get("use_reentrant"):
            self.enable_input_require_grads()  # frozen embeddings would detach the blocks from the loss

    def activation_checkpointing_disable(self):
        for block in self.base_model.encoder.layers:
            block.gradient_checkpointing = False

    @property
    def is_activation_checkpointing(self):
        return any(block.gradient_checkpointing for block in self.base_model.encoder.layers)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None, **kwargs):
        """The older name of activation_checkpointing_enable."""
        self.activation_checkpointing_enable(activation_checkpointing_kwargs=gradient_checkpointing_kwargs, **kwargs)

    gradient_checkpointing_disable = activation_checkpointing_disable
    is_gradient_checkpointing = is_activation_checkpointing

    def to_requested_type(self, output, return_dict):
        """Return `output`, or a tuple if `return_dict` (by default the config's) is False."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    # What other people's code calls

    @staticmethod
    def get_position_ids(input_ids, device=None):
        """Positions 0, 1, 2, ... for every row of input_ids [B, T], on `device`: int [B, T]."""
        return torch.arange(input_ids.shape[1], device=as_device(device)).expand(len(input_ids), -1)

    @staticmethod
    def get_masks(input_ids, past_key_values=None, padding_mask=None):
        """The causal mask in the form of `full_attention_mask`: bool [B, 1, T, S], True where a query may not attend.

        Args:
            input_ids: int [B, T], new tokens.
            past_key_values: the cache before they are added, or None.
            padding_mask: [B, S], 1 for real tokens; without a cache, a padding token attends to every place.
        """
        B, T = input_ids.shape
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        visible = torch.ones(T, seen + T, dtype=torch.bool, device=input_ids.device).tril(seen).expand(B, -1, -1)
        if padding_mask is not None:
            real = padding_mask.to(input_ids.device, torch.bool)
            visible = visible & real[:, None]
            if not seen:
                visible = visible | ~real[:, :, None]
        return ~visible[:, None]


class OriginalAttributes:
    """Attributes of the original's ChatGLMModel, for a subclass of ChatGLMPreTrainedModel."""

    num_layers = property(lambda model: model.config.num_layers)
    kv_channels = property(lambda model: model.config.kv_channels)
    multi_query_group_num = property(lambda model: model.config.num_key_value_heads)
    seq_length = property(lambda model: model.config.seq_length)
    pre_seq_len = property(lambda model: model.config.pre_seq_len)

    def get_prompt(self, batch_size, device=None, dtype=None):
        """The P-Tuning prefix: (key, value) for each layer, both (B, G, P, D), as the cache holds them."""
        prefix = self.prefix_encoder.keys_and_values(batch_size, dtype or self.dtype)
        return [(key.to(as_device(device)), value.to(as_device(device))) for key, value in prefix]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Ignore `rotary_pos_emb.inv_freq`, which the original's files hold: the angles are computed in `forward`."""
        state_dict.pop(prefix + "rotary_pos_emb.inv_freq", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
