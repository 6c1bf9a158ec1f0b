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
from .blocks_chatglm import NotServed, PlainBlocks, require
from .c_library import FLOAT, LONG
from .inference_cpu import attention_scratch, is_plain, linear_scratch, most_rows, serves, turns, with_dense_rows
from .inference_cpu import load_library as load_floats
from .quantization import QuantizedLinear
from .quantization_cpu import groups_of, layout_shape, scratch_bytes
from .quantization_cpu import load_library as load_quantized
from .quantization_cpu_source import TYPES

MOST_TOKENS = 32  # of all rows together: with more, a call takes so long that Ctrl-C would have to wait


class Step(ctypes.Structure):
    """The C struct `step`; addresses are numbers."""

    _fields_ = [
        *((name, LONG) for name in ("blocks", "batch", "tokens", "seen", "heads", "groups", "size", "hidden", "inner")),
        *((name, LONG) for name in ("type", "norm_type", "threads", "cosine", "sine", "period")),
        *((name, LONG) for name in ("mask", "mask_batch", "mask_token", "stretches", "attention_scratch")),
        *((name, LONG) for name in ("x", "work", "scratch", "multiply", "multiply_float32", "overflow")),
        *((name, FLOAT) for name in ("eps", "scale")),
    ]


class BlocksInC(PlainBlocks):
    """The C code for plain blocks."""

    def __call__(self, blocks: Sequence[nn.Module], x: Tensor, rotary, mask, attend, cache) -> Optional[Tensor]:
        """x (B, T, C) after all blocks, with its keys and values in the cache; None if the modules have to compute it.

        rotary: cos, sin (B or 1, T, 1, D / 4), float32. mask: boolean (B or 1, 1, T, S), or None for causal; it and
        `attend` are those of attention_chatglm.
        """
        tokens = x.shape[1]
        try:
            require(attend is cpu_attention and x.shape[0] * tokens <= MOST_TOKENS and serves(x))
            layers = self.layers(blocks, x, cache)
            y = self.compute(blocks, x, rotary, mask, layers)
        except NotServed:
            return None
        for layer in layers:
            layer.extend(tokens)
        return y

    def compute(self, blocks, x, rotary, mask, layers):
        (B, T, C), arguments, first = x.shape, BlockArguments(x), None
        for i, block in enumerate(blocks):
            attention, (norm, second), (query_key_value, dense, gate_up, down) = self.parts(block, i)
            shape = attention.num_heads, attention.num_groups, attention.head_dim, attention.scaling
            shape += down.in_features, norm.eps, getattr(norm._parameters.get("weight"), "dtype", None)
            first = first or shape
            require(shape == first and second.eps == norm.eps)
            H, G, D, scaling, inner, eps, norm_dtype = shape
            arguments.add(norm._parameters.get("weight"), (C,), norm_dtype)
            arguments.add(second._parameters.get("weight"), (C,), norm_dtype)
            arguments.add_linear(query_key_value, C, (H + 2 * G) * D)
            arguments.add_linear(dense, H * D, C)
            arguments.add_linear(gate_up, C, 2 * inner)
            arguments.add_linear(down, inner, C)
        require(norm_dtype in TYPES and all(turns(angles, B, T, D) for angles in rotary))
        seen, threads = layers[0].keys.shape[2], arguments.threads
        require(all(layer.keys.shape == layer.values.shape == (B, G, seen, D) for layer in layers))
        slots = [number for layer in layers for number in self.slots(layer.reserve(T, x.dtype, x.dtype), x)]

        stretches, each, floats = attention_scratch(B, T, seen + T, H, G, D, threads)
        work = x.new_empty(B * T * (2 * C + 3 * (H + 2 * G) * D + 3 * inner))
        scratch = torch.empty(max(arguments.scratch, 4 * floats), dtype=torch.int8, device="cpu")
        y, (cos, sin) = x.clone(memory_format=torch.contiguous_format), map(Tensor.contiguous, rotary)
        mask = None if mask is None else with_dense_rows(mask.expand(B, 1, T, seen + T))
        multiply, multiply_float32 = quantized_products() if arguments.quantized else (0, 0)
        step = Step(
            blocks=len(blocks), batch=B, tokens=T, seen=seen, heads=H, groups=G, size=D, hidden=C, inner=inner,
            type=TYPES[x.dtype], norm_type=TYPES[norm_dtype], threads=threads,
            cosine=cos.data_ptr(), sine=sin.data_ptr(), period=cos.shape[0] * T,
            stretches=stretches, attention_scratch=each,
            x=y.data_ptr(), work=work.data_ptr(), scratch=scratch.data_ptr(),
            multiply=multiply, multiply_float32=multiply_float32,
            eps=eps, scale=scaling * math.log2(math.e),
        )  # fmt: skip
        if mask is not None:
            step.mask, step.mask_batch, step.mask_token = mask.data_ptr(), mask.stride(0), mask.stride(2)
        numbers, slots = array("q", arguments.numbers), array("q", slots)
        load_floats()[0].blocks(numbers.buffer_info()[0], slots.buffer_info()[0], ctypes.addressof(step))
        require(not step.overflow)
        return y

    @staticmethod
    def slots(buffers: Sequence[Tensor], x: Tensor) -> List[int]:
        """Where the cache holds a block's keys and values, and their strides in bytes, a struct `slots`."""
        (keys, values), size = buffers, x.element_size()
        (*k_strides, k_last), (*v_strides, v_last) = keys.stride(), values.stride()
        require(k_last == v_last == 1 and keys.is_cpu and values.is_cpu and keys.dtype == values.dtype == x.dtype)
        return [keys.data_ptr(), values.data_ptr(), *(stride * size for stride in (*k_strides, *v_strides))]


@functools.lru_cache(None)
def quantized_products() -> Sequence[int]:
    """Addresses of the C functions for quantized weights, which are compiled where a weight has their layout."""
    library, _ = load_quantized()
    return [ctypes.cast(function, ctypes.c_void_p).value for function in (library.linear, library.linear_float32)]


class BlockArguments:
    """What the C code has to know of each block, its structs `block` as numbers, for inputs like x."""

    def __init__(self, x: Tensor):
        self.dtype, self.tokens, self.threads = x.dtype, x.shape[0] * x.shape[1], torch.get_num_threads()
        self.numbers: List[int] = []
        self.scratch, self.quantized = 0, False  # bytes that the products need; whether a weight is quantized
        self.held: List[Tensor] = []  # another thread may replace the parameters of a quantized layer meanwhile
        self.ends: Dict[tuple, Tuple[int, ...]] = {}  # see `end`: layers of one kind have the same in every block

    def add(self, tensor: Optional[Tensor], shape: Tuple[int, ...], dtype: Optional[torch.dtype]) -> None:
        """The data pointer of a tensor, which has to be a dense one of this shape and dtype."""
        require(is_plain(tensor) and tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous())
        self.held.append(tensor)
        self.numbers.append(tensor.data_ptr())

    def add_linear(self, layer: nn.Module, k: int, out: int) -> None:
        """A linear layer with k inputs, a struct `matrix`."""
        weights = layer._weights if type(layer) is QuantizedLinear else None  # once, and first: see `Weights`
        numbers, parameters = self.numbers, layer._parameters
        weight, scale, bias = map(parameters.get, ("weight", "weight_scale", "bias"))
        if weights is not None:
            require(weights.parameters is parameters and weights.layout == "cpu" and scale is not None)
            bits, size, dtype = layer.bits, layer.group_size, scale.dtype
            self.add(weight, layout_shape(out, k, bits), torch.int8)
            self.add(scale, (out,) if size is None else (out, k // size), dtype)
        else:
            bits, size, dtype = 0, None, self.dtype
            self.add(weight, (out, k), dtype)
            numbers.append(0)
        if bias is None:
            numbers.append(0)
        else:
            self.add(bias, (out,), dtype)
        kind = k, out, bits, size, dtype
        if kind not in self.ends:
            self.ends[kind] = self.end(k, out, bits, scale)
        numbers += self.ends[kind]

    def end(self, k: int, out: int, bits: int, scale: Optional[Tensor]) -> Tuple[int, ...]:
        """The numbers of a struct `matrix` behind its addresses."""
        n = self.tokens
        if bits:
            require(scale.dtype in TYPES)
            groups, group = groups_of(scale, k)
            rest = groups, group, bits, TYPES[scale.dtype]
            needed = scratch_bytes(n, k, groups, group, self.threads, self.dtype)
        else:
            require(n <= most_rows(self.dtype))
            rest, needed = (0, 0, 0, 0), 4 * linear_scratch(n, k)
        self.scratch, self.quantized = max(self.scratch, needed), self.quantized or bits > 0
        return (k, out, *rest)
