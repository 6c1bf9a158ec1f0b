"""Quantize while loading: from_pretrained(folder, quantization_config=ChatGLMQuantizationConfig(4)).

Each weight is rounded as it is read, so peak memory is the quantized model and one float weight. The result is that of
`quantize()` after loading, and is saved and reloaded by `quantization_bit` alone. Importing this file registers
quant_method "chatglm" with transformers 4.39 and later; with older releases, load first, then quantize.
"""

import ctypes
import mmap
import sys

import torch
from torch import nn

from .quantization import check_backend, choose, quantize
from .quantization_format import check_bits, quantize_weight
from .transformers_compat import ConversionOps, HfQuantizer, QuantizationConfigMixin, register_quantization


class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """bits 8 or 4, and the options of `quantization.quantize`."""

    def __init__(self, bits=4, group_size=None, skip=(), embedding=False, output_layer=False, backend="auto",
                 quant_method="chatglm", **unknown):  # fmt: skip
        check_bits(bits)
        check_backend(backend)
        if unknown:
            raise ValueError(f"quantization_config does not support {', '.join(unknown)}: give bits, group_size, skip, "
                             "embedding, output_layer, backend")  # fmt: skip
        self.quant_method = quant_method
        self.bits, self.group_size, self.skip = bits, group_size, (skip,) if isinstance(skip, str) else tuple(skip)
        self.embedding, self.output_layer, self.backend = embedding, output_layer, backend


class ChatGLMQuantizer(HfQuantizer):
    """Creates empty quantized layers, rounds each float weight as it loads, then removes itself from the model."""

    requires_calibration = False
    is_trainable = True  # with P-Tuning v2 or LoRA on top
    is_compileable = True

    def is_serializable(self, safe_serialization=None):
        return True

    def _process_model_before_weight_loading(self, model, device_map=None, **kwargs):
        backend, devices = self.quantization_config.backend, set()
        if backend != "auto" and isinstance(device_map, dict):  # without one, the model may be moved later
            devices = set(device_map.values()) - {"disk"}
        if len(devices) == 1:
            choose(backend, torch.device(*devices))
        stored = {name for name, layer in model.named_modules() if hasattr(layer, "weight_scale")}
        options = {key: value for key, value in vars(self.quantization_config).items() if key != "quant_method"}
        quantize(model, empty=True, **options)
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight_scale")}
        self.rounds = layers.keys() - stored  # the others are int8 or int4 in the checkpoint already
        if ConversionOps is not object:  # 5.0 to 5.10 cast what they load to the parameter's dtype
            for name in self.rounds:
                float_weight = layers[name].weight.to(layers[name].weight_scale.dtype)
                layers[name].weight = nn.Parameter(float_weight, requires_grad=False)
        return model

    def param_needs_quantization(self, model, param_name, **kwargs):
        module, _, kind = param_name.rpartition(".")
        return kind == "weight" and module in self.rounds

    def rounded(self, model, name, weight):
        """{name: rounded weight, name of its scale: scale} as parameters, for the layer that `name` belongs to."""
        module = name.rpartition(".")[0]
        layer = model.get_submodule(module)
        try:
            tensors = quantize_weight(weight, layer.bits, layer.group_size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        release_pages(weight)
        return {
            key: nn.Parameter(value, requires_grad=False)
            for key, value in zip((name, f"{module}.weight_scale"), tensors)
        }

    def get_quantize_ops(self):  # transformers 5
        return RoundWhileLoading(self)

    def create_quantized_param(self, model, param_value, param_name, target_device, *args, **kwargs):  # transformers 4
        for name, value in self.rounded(model, param_name, param_value.to(target_device)).items():
            module, _, kind = name.rpartition(".")
            setattr(model.get_submodule(module), kind, value)

    requires_parameters_quantization = True  # 4.55 and 4.56 ask for this, and for the next by position

    def check_quantized_param(self, model, param_value, param_name, *args, **kwargs):
        return self.param_needs_quantization(model, param_name)

    def update_missing_keys(self, model, missing_keys, prefix):  # transformers 4
        scales = {f"{name}.weight_scale" for name in self.rounds}
        return [key for key in missing_keys if key not in scales]

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.rounds and "disk" in getattr(model, "hf_device_map", {}).values():
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
    """For transformers 5: {name: [float weight]} -> {name: int8 weight, name of its scale: scale}."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(self, input_dict, *args, model=None, full_layer_name=None, **kwargs):
        (value,) = input_dict.values()
        return self.hf_quantizer.rounded(model, full_layer_name, value[0] if isinstance(value, list) else value)


def missing_quantized_weights_error(bits, found):
    """The error if the config has quantization_bit but the checkpoint has `found` in place of quantized weights."""
    return ValueError(
        f"quantization_bit={bits} needs int{bits} weights, but the checkpoint has {found}. If its weights are floats, "
        f"load them with quantization_bit=0 and call .quantize({bits}), or quantize them while loading, with "
        f"quantization_bit=0 and quantization_config=ChatGLMQuantizationConfig({bits})."
    )


def release_pages(weight):
    """Drop a weight's pages: a checkpoint that is mapped into memory would otherwise stay in it until loading ends.

    No data is lost: pages of a file are read again on the next access.
    """
    pageout = getattr(mmap, "MADV_PAGEOUT", 21)
    if weight.device.type == "cpu" and sys.platform == "linux" and weight.is_contiguous():
        page = mmap.PAGESIZE
        begin = -(-weight.data_ptr() // page) * page
        size = weight.data_ptr() + weight.numel() * weight.element_size() - begin
        if size > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), pageout)


register_quantization("chatglm", ChatGLMQuantizationConfig, ChatGLMQuantizer)
