"""Quantize while loading: from_pretrained(folder, quantization_config=ChatGLMQuantizationConfig(4)).

Each weight is rounded as it is read, so peak memory is the quantized model and one float weight. The result is that of
`quantize()` after loading, and is saved and reloaded by `quantization_bit` alone. Importing this file registers
quant_method "chatglm" with transformers 4.39 and later; with older releases, load first, then quantize.
"""

import ctypes
import mmap
import sys

import torch

from .quantization import FAMILIES, QuantizedLinear, check_backend, check_scale, choose, quantize, round_weight
from .quantization_format import check_bits
from .torch_compat import has_accelerator
from .transformers_compat import QuantizationConfigMixin, RoundingQuantizer, progress_bar, register_quantization


class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """bits 8 or 4, and the options of `quantization.quantize`."""

    def __init__(self, bits=4, group_size=None, skip=(), embedding=False, output_layer=False, backend="auto",
                 scale="max", quant_method="chatglm", **unknown):  # fmt: skip
        check_bits(bits)
        check_backend(backend)
        check_scale(scale)
        if unknown:
            raise ValueError(f"quantization_config does not support {', '.join(unknown)}: give bits, group_size, skip, "
                             "embedding, output_layer, backend, scale")  # fmt: skip
        self.quant_method = quant_method
        self.bits, self.group_size, self.skip = bits, group_size, (skip,) if isinstance(skip, str) else tuple(skip)
        self.embedding, self.output_layer, self.backend, self.scale = embedding, output_layer, backend, scale


class ChatGLMQuantizer(RoundingQuantizer):
    """Creates empty quantized layers, rounds each float weight as it loads, then removes itself from the model."""

    def create_layers(self, model, device_map):
        backend, devices = self.quantization_config.backend, set()
        if backend != "auto" and isinstance(device_map, dict):  # without one, the model may be moved later
            devices = set(device_map.values()) - {"disk"}
        if len(devices) == 1:
            choose(backend, torch.device(*devices))
        stored = {name for name, layer in model.named_modules() if hasattr(layer, "weight_scale")}
        options = {key: value for key, value in vars(self.quantization_config).items() if key != "quant_method"}
        quantize(model, empty_init=True, **options)
        layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight_scale")}
        return {name: layer for name, layer in layers.items() if name not in stored}  # the others are int8 and int4

    def rounded(self, layer, name, weight):
        """(rounded weight, its scale) for `layer`, from its float weight, which is called `name`."""
        try:
            scale = self.quantization_config.scale if isinstance(layer, QuantizedLinear) else "max"
            tensors = round_weight(weight, layer.bits, layer.group_size, scale)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        release_pages(weight)
        return tensors


def missing_quantized_weights_error(bits, found):
    """The error if the config has quantization_bit but the checkpoint has `found` in place of quantized weights."""
    return ValueError(
        f"quantization_bit={bits} needs int{bits} weights, but the checkpoint has {found}. If its weights are floats, "
        f"load them with quantization_bit=0 and call .quantize({bits}), or quantize them while loading, with "
        f"quantization_bit=0 and quantization_config=ChatGLMQuantizationConfig({bits})."
    )


def lay_out(model):
    """Convert the weights to their kernel's layout, which the first forward would do otherwise.

    They stay as they are where the model is likely to be moved or sharded first.
    """
    if has_accelerator() or (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    for layer in progress_bar(layers, "Laying out weights"):
        weight, kind = layer.weight, FAMILIES.get(layer.backend, "cpu")
        if weight.device.type == kind == "cpu":
            layer.lay_out()
            if layer.weight is not weight:
                release_pages(weight)


def release_pages(weight):
    """Unmap a weight that was read from a mapped file: it would otherwise count as this process's until loading ends.

    Its pages stay in the system's file cache, from which the next access, or the next start, reads them.
    """
    if weight.device.type != "cpu" or sys.platform != "linux" or not weight.is_contiguous():
        return
    first = -(-weight.data_ptr() // mmap.PAGESIZE)
    count = (weight.data_ptr() + weight.numel() * weight.element_size()) // mmap.PAGESIZE - first
    if count > 0 and are_file_pages(first, count):
        begin, size = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE)
        ctypes.CDLL(None).madvise(begin, size, mmap.MADV_DONTNEED)


def are_file_pages(first, count):
    """Whether these pages of memory hold a file's bytes or nothing yet, and not what this process has written."""
    try:
        with open("/proc/self/pagemap", "rb") as pagemap:
            pagemap.seek(8 * first)
            pages = torch.frombuffer(bytearray(pagemap.read(8 * count)), dtype=torch.int64)
    except OSError:  # not shown in every container
        return False
    present, swapped, of_file = pages < 0, pages >> 62 & 1, pages >> 61 & 1
    return len(pages) == count and not (swapped.bool() | (present & (of_file == 0))).any()


register_quantization("chatglm", ChatGLMQuantizationConfig, ChatGLMQuantizer)
