"""A few new tokens through all blocks in one call of C, for eager inference on a CPU.

Otherwise Python and torch take a tenth of a decode step or more, between the products. The C code
(`blocks_cpu_source`) calls the functions that inference_cpu and quantization_cpu call for a layer, so the modules are
its reference: their results are equal, bit for bit.
"""

import ctypes
import functools
import math
from array import array
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .attention_chatglm import cpu_attention
from .inference_cpu import attention_scratch, is_plain, linear_scratch, most_rows, serves, with_dense_rows
from .inference_cpu import load_library as load_floats
from .quantization import QuantizedLinear
from .quantization_cpu import GROUP, groups_of, layout_shape, scratch_bytes
from .quantization_cpu import load_library as load_quantized
from .quantization_cpu_source import TYPES
from .torch_compat import autocast_dtype, has_forward_hooks, has_global_hooks
from .transformers_compat import growing_layers

MOST_TOKENS = 32  # of all rows together: with more, a call takes so long that Ctrl-C would have to wait


class LeftToPython(Exception):
    """The modules have to compute these blocks."""


def require(served: bool) -> None:
    if not served:
        raise LeftToPython


class BlocksInC:
    """The C code for blocks of these classes, as they are now: GLMBlock, SelfAttention, MLP, RMSNorm and Linear.

    Blocks with adapters or hooks, of subclasses, or with a `forward` that other code has replaced are left to Python.
    """

    def __init__(self, *classes: type):
        self.forwards = {cls: cls.forward for cls in (*classes, QuantizedLinear)}

    def __call__(self, blocks: Sequence[nn.Module], x: Tensor, rotary, mask, attend, cache) -> Optional[Tensor]:
        """x (B, T, C) after all blocks, with its keys and values in the cache; None if Python has to compute it.

        rotary: cos, sin (B or 1, T, 1, D / 4), float32. mask: boolean (B or 1, 1, T, S), or None for causal; it and
        `attend` are those of attention_chatglm.
        """
        layers, tokens = growing_layers(cache), x.shape[1]
        try:
            require(attend is cpu_attention and 0 < len(layers) == len(blocks) and x.shape[0] * tokens <= MOST_TOKENS)
            require(serves(x) and autocast_dtype("cpu") is None and not has_global_hooks())
            y = self.compute(blocks, x, rotary, mask, layers)
        except LeftToPython:
            return None
        if x.dtype == torch.float32 and not math.isfinite(y.sum()):
            return None  # a quantized product may have exceeded float32 on the way: Python multiplies again, scaled
        for layer in layers:
            layer.extend(tokens)
        return y

    def compute(self, blocks, x, rotary, mask, layers):
        (B, T, C), seen, threads = x.shape, layers[0].keys.shape[2], torch.get_num_threads()
        first = self.check(blocks[0])
        attention, norm = first["self_attention"], first["input_layernorm"]
        down = self.check(first["mlp"])["dense_4h_to_h"]
        for part in (attention, norm, down):
            self.check(part)
        H, G, D, scaling = shape = head_shape(attention)
        inner, eps, norm_dtype = down.in_features, norm.eps, norm.weight.dtype
        require(D % 16 == 0 and norm_dtype in TYPES and all(angles.device == x.device for angles in rotary))
        require(all(angles.shape in ((1, T, 1, D // 4), (B, T, 1, D // 4)) for angles in rotary))

        call = Call(x)
        for block, layer in zip(blocks, layers):
            parts = self.check(block)
            attention, mlp = self.check(parts["self_attention"]), self.check(parts["mlp"])
            require(not (block.residual_after_norm or parts["dropout"].training))
            require(head_shape(parts["self_attention"]) == shape and not parts["self_attention"].interleaved)
            for other in (parts["input_layernorm"], parts["post_attention_layernorm"]):
                self.check(other)
                require(other.eps == eps)
                call.numbers.append(call.address(other._parameters["weight"], (C,), norm_dtype))
            for parent, name, size in (
                (attention, "query_key_value", (C, (H + 2 * G) * D)),
                (attention, "dense", (H * D, C)),
                (mlp, "dense_h_to_4h", (C, 2 * inner)),
                (mlp, "dense_4h_to_h", (inner, C)),
            ):
                self.check(parent[name])
                call.add_linear(parent[name], *size)
            require(layer.keys.shape == layer.values.shape == (B, G, seen, D))
            call.add_buffers(layer.reserve(T, x.dtype))

        stretches, each, floats = attention_scratch(B, T, seen + T, H, G, D, threads)
        work = x.new_empty(B * T * (2 * C + 3 * (H + 2 * G) * D + 3 * inner))
        scratch = torch.empty(max(call.scratch, 4 * floats), dtype=torch.int8, device="cpu")
        y, (cos, sin) = x.clone(memory_format=torch.contiguous_format), map(Tensor.contiguous, rotary)
        masked = [0, 0, 0]
        if mask is not None:
            mask = with_dense_rows(mask.expand(B, 1, T, seen + T))
            masked = [mask.data_ptr(), mask.stride(0), mask.stride(2)]
        numbers = array("q", call.numbers)
        step = [len(blocks), B, T, seen, H, G, D, C, inner, TYPES[x.dtype], TYPES[norm_dtype], threads]
        step += [cos.data_ptr(), sin.data_ptr(), cos.shape[0] * T, *masked, stretches, each]
        step = array("q", step + [t.data_ptr() for t in (y, work, scratch)] + quantized_products())
        addresses = (a.buffer_info()[0] for a in (numbers, step))
        load_floats()[0].blocks(*addresses, eps, scaling * math.log2(math.e))
        return y

    def check(self, module: nn.Module) -> Dict[str, nn.Module]:
        """Require that the module computes what the C code does; return its parts."""
        kind = type(module)
        require(kind.forward is self.forwards.get(kind) and not has_forward_hooks(module))
        return module._modules


def head_shape(attention: nn.Module) -> Tuple[int, int, int, float]:
    return attention.num_heads, attention.num_groups, attention.head_dim, attention.scaling


@functools.lru_cache(None)
def quantized_products() -> List[int]:
    """Addresses of the C functions for quantized weights, if they were compiled."""
    library, _ = load_quantized()
    functions = (library.linear, library.linear_float32) if library else ()
    return [ctypes.cast(function, ctypes.c_void_p).value for function in functions] or [0, 0]


class Call:
    """The numbers that describe blocks to the C code, its structs `block` one after another, for inputs like x."""

    def __init__(self, x: Tensor):
        self.x, self.tokens, self.threads = x, x.shape[0] * x.shape[1], torch.get_num_threads()
        self.numbers: List[int] = []
        self.scratch = 0  # bytes
        self.held: List[Tensor] = []  # another thread may replace the parameters of a layer meanwhile

    def address(self, tensor: Optional[Tensor], shape: Tuple[int, ...], dtype: torch.dtype) -> int:
        """Where a tensor's numbers are, or 0 for None."""
        if tensor is None:
            return 0
        require(is_plain(tensor, self.x.device) and tensor.shape == shape and tensor.dtype == dtype)
        require(tensor.is_contiguous())
        self.held.append(tensor)
        return tensor.data_ptr()

    def add_linear(self, layer: nn.Module, k: int, out: int) -> None:
        """A linear layer with k inputs, a struct `matrix`."""
        parameters, dtype, n = layer._parameters, self.x.dtype, self.tokens
        scale, bias = parameters.get("weight_scale"), parameters.get("bias")
        if scale is None:
            require(n <= most_rows(dtype))
            self.numbers += [self.address(parameters["weight"], (out, k), dtype), 0, self.address(bias, (out,), dtype)]
            self.numbers += [k, out, 0, 0, 0, 0]
            self.scratch = max(self.scratch, 4 * linear_scratch(n, k))
            return
        require(layer._weights.parameters is parameters and layer._weights.layout == "cpu" and scale.dtype in TYPES)
        weight = self.address(parameters["weight"], layout_shape(out, k, layer.bits), torch.int8)
        groups, group = groups_of(scale, k)
        self.numbers += [weight, self.address(scale, scale.shape, scale.dtype), self.address(bias, (out,), scale.dtype)]
        self.numbers += [k, out, groups, group, layer.bits, TYPES[scale.dtype]]
        padded = 4 * -(-n // 8) * 8 * -(-k // GROUP) * GROUP if dtype == torch.float32 else 0
        self.scratch = max(self.scratch, padded + scratch_bytes(n, k, groups, group, self.threads))

    def add_buffers(self, buffers: Sequence[Tensor]) -> None:
        """Where the cache holds keys and values, and their strides in bytes."""
        for buffer in buffers:
            require(buffer.dtype == self.x.dtype and buffer.device == self.x.device and buffer.stride(-1) == 1)
            self.numbers.append(buffer.data_ptr())
        size = self.x.element_size()
        self.numbers += [stride * size for buffer in buffers for stride in buffer.stride()[:3]]
