"""Base class of the models: loading, initialization, activation checkpointing, quantization."""

from functools import partial, wraps

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

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

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # every forward looks up the attention function

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As in transformers, but the default dtype is that of the checkpoint.

        Raises:
            ValueError: the config has `quantization_bit`, but the checkpoint holds no quantized weights; also whatever
                transformers raises.
        """
        try:
            model, report = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except RuntimeError as error:
            config = kwargs.get("config")
            if not hasattr(config, "quantization_bit"):
                config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **kwargs)
            if config.quantization_bit and any(word in str(error) for word in ("mismatch", "held as torch.int8")):
                raise missing_quantized_weights_error(
                    config.quantization_bit, "tensors of other shapes or dtypes"
                ) from error
            raise
        unscaled = sorted(name for name in report["missing_keys"] if name.endswith(".weight_scale"))
        if unscaled:  # float weights, which most releases of transformers have truncated to int8
            raise missing_quantized_weights_error(model.config.quantization_bit, f"no {unscaled[0]}")
        model.base_model.freeze_all_but_prefix()  # loading may have replaced parameters
        lay_out(model)
        return (model, report) if output_loading_info else model

    def quantize(self, bits, **options):
        """Quantize the linear layers of every block to `bits` (4 or 8) bits, in place; 0 does nothing.

        Takes the options of `quantization.quantize`. Returns the model.
        """
        return quantize(self, bits, **options)

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
        """Initialize missing parameters: normal weights, zero biases, unit norms. Quantized weights are left alone."""
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
        options = activation_checkpointing_kwargs or {"use_reentrant": False}
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
