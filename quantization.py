"""INT8 and INT4 layers for any device: the op that multiplies by quantized weights, the layers, and `quantize()`.

`quantization_format` defines the weights. A kernel family is a file `quantization_<name>.py` that ends in a record,
`FAMILY`; the op `chatglm::quantized_linear` chooses one of them by device. To add a family: write its file
(`quantization_format.Family` says what it offers), give it a line in `FAMILIES`, name it where modeling_chatglm.py
lists the files that the Hugging Face loader copies, and link it in examples/tiny; tests name what was forgotten.
"""

import functools
import importlib
import threading
import warnings
from dataclasses import dataclass
from typing import Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantization_calibration import calibrate, samples_for
from .quantization_format import (
    Family,
    check_bits,
    check_weight,
    dequantize_weight,
    quantize_weight,
    quantize_with_search,
    reference_linear,
)
from .torch_compat import autocast_dtype, is_compiling, needs_dispatch
from .transformers_compat import progress_bar

LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # the four linear layers of every block
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # dtypes of inputs
SCALES = ("max", "mse")  # how a row's scale is found
RELEASED = ""  # the layout of the released checkpoints; every other layout has the name of its family


# ---- the kernel families --------------------------------------------------------------------------------------------

FAMILIES = {  # name -> the type of device that it runs on, in the order in which "auto" tries them
    "triton": "cuda",
    "cpm": "cuda",
    "cpu": "cpu",
    "stock": "cpu",
}
BACKENDS = ("auto", *FAMILIES, "torch")


@functools.lru_cache(None)
def family(name: str) -> Family:
    """The kernel family `name`. Its file is imported on first use."""
    if name == "torch":
        return Family(reference_linear, lambda device: None)
    return importlib.import_module(f".quantization_{name}", __package__).FAMILY


def check_backend(backend: str) -> None:
    """Raise ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: choose {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")


@functools.lru_cache(None)
def choose(backend: str, device: torch.device) -> str:
    """The family to use for `backend` on `device`. ValueError, with the cure, if a named family cannot run there."""
    check_backend(backend)
    if backend != "auto":
        reason = family(backend).unavailable(device)
        if reason:
            raise ValueError(f"backend={backend!r} cannot run on {device}: {reason}")
        return backend
    for name in [name for name, kind in FAMILIES.items() if kind == device.type]:
        reason = family(name).unavailable(device)
        if reason is None:
            return name
        message = f"quantized layers run slower than they could on {device}: backend {name!r} is unavailable: {reason}"
        warnings.warn(message, stacklevel=2)
    if device.type not in {*FAMILIES.values(), "meta"}:
        message = f"no kernel runs on {device}: quantized layers restore their weights and multiply, which is slow"
        warnings.warn(message, stacklevel=2)
    return "torch"


def layout_of(weight: Tensor, layout: str, out_features: int, in_features: int, bits: int) -> str:
    """`layout` if the weight has its dtype and shape, else RELEASED if it has those; ValueError if neither."""
    if layout != RELEASED:
        record = family(layout).layout
        if weight.dtype == record.dtype and weight.shape == record.shape(out_features, in_features, bits):
            return layout
    if weight.dtype == torch.int8 and weight.shape == (out_features, in_features * bits / 8):
        return RELEASED
    raise ValueError(
        f"the weight is {weight.dtype} {list(weight.shape)}, which is not int{bits} for {in_features} channels and "
        f"{out_features} outputs: expected torch.int8 {[out_features, in_features * bits // 8]}"
    )


def to_released_format(weight: Tensor, layout: str, out_features: int, in_features: int, bits: int) -> Tensor:
    """The released packing of a weight in any layout."""
    if layout == RELEASED:
        return weight
    return family(layout).layout.from_layout(weight, out_features, in_features, bits)


def round_weight(
    weight: Tensor, bits: int, group_size: Optional[int] = None, scale: str = "max"
) -> Tuple[Tensor, Tensor]:
    """`quantize_weight`, bit for bit, by a kernel where a family for this device has one; scale="mse" searches."""
    if scale == "mse":
        return quantize_with_search(weight, bits, group_size)
    for name in [name for name, kind in FAMILIES.items() if kind == weight.device.type]:
        quantize = family(name).quantize
        if quantize and family(name).unavailable(weight.device) is None:
            return quantize(weight, bits, group_size)
    return quantize_weight(weight, bits, group_size)


# ---- the op ---------------------------------------------------------------------------------------------------------


def quantized_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int, layout: str, backend: str
) -> Tensor:
    """x [..., in] -> [..., out] in x's dtype. `layout` is RELEASED, or the family whose layout the weight is in."""
    columns, out_features = x.shape[-1], weight_scale.shape[0]
    if layout_of(weight, layout, out_features, columns, bits) != layout:
        raise ValueError(f"the weight is in the released packing, not in the layout of {layout!r}")
    return _multiply(x, weight, weight_scale, bias, bits, layout, backend)


def _multiply(x, weight, weight_scale, bias, bits, layout, backend):
    """`quantized_linear` for a weight that is known to have the right shape."""
    if x.dtype not in FLOATS:
        raise ValueError(f"the input is {x.dtype}: cast it to float32, float16, bfloat16 or float64 first")
    rows, out_features = x.reshape(-1, x.shape[-1]).contiguous(), weight_scale.shape[0]
    name = "torch" if torch.float64 in (x.dtype, weight_scale.dtype) else choose(backend, x.device)
    kernel = family(name)
    if layout == name:
        y = kernel.layout.linear(rows, weight, weight_scale, bias, bits)
    else:
        weight = to_released_format(weight, layout, out_features, rows.shape[1], bits)
        y = kernel.linear(rows, weight, weight_scale, bias, bits)
    return y.view(*x.shape[:-1], out_features)


def _save_for_backward(ctx, inputs, output):
    x, weight, weight_scale, _, ctx.bits, ctx.layout, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(weight, weight_scale)


def _input_gradient(ctx, grad):
    weight, weight_scale = ctx.saved_tensors
    weight = to_released_format(weight, ctx.layout, weight_scale.shape[0], ctx.in_features, ctx.bits)
    dtype = torch.promote_types(grad.dtype, torch.float32) if grad.device.type == "cpu" else grad.dtype
    x_grad = grad.to(dtype) @ dequantize_weight(weight, weight_scale, ctx.bits, dtype)
    return x_grad.to(grad.dtype), None, None, None, None, None, None


if not hasattr(torch.library, "custom_op"):  # before torch 2.4: the same without torch.compile

    class _Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            _save_for_backward(ctx, inputs, None)
            return quantized_linear(*inputs)

        backward = staticmethod(_input_gradient)

    op = _Op.apply
else:
    if not hasattr(torch.ops.chatglm, "quantized_linear"):  # the Hugging Face loader may import this file twice
        _op = torch.library.custom_op("chatglm::quantized_linear", quantized_linear, mutates_args=())
        _op.register_fake(lambda x, w, scale, bias, bits, layout, backend: x.new_empty(*x.shape[:-1], scale.shape[0]))
        _op.register_autograd(_input_gradient, setup_context=_save_for_backward)
    op = torch.ops.chatglm.quantized_linear


# ---- the layers -----------------------------------------------------------------------------------------------------

REPLACING = threading.RLock()  # held while the parameters of a layer are replaced or saved, not to compute


@dataclass(frozen=True)
class Weights:
    """What a layer computes with. It is read once per call, since other threads replace it as a whole.

    Not a tuple: torch.export takes those apart and puts copies in their place.
    """

    parameters: Dict[str, Optional[nn.Parameter]]  # the module's `_parameters`
    layout: str  # of parameters["weight"]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)


class QuantizedModule(nn.Module):
    """What int8 and int4 layers share: frozen parameters that change together, while other threads may compute."""

    def __init__(self, out_features: int, in_features: int, bits: int, group_size: Optional[int]):
        nn.Module.__init__(self)
        self.bits, self.group_size, self._sizes = bits, group_size, (out_features, in_features, bits)
        self._weights = Weights(self._parameters, RELEASED)

    def __setattr__(self, name, value):
        super().__setattr__(name, value.requires_grad_(False) if isinstance(value, nn.Parameter) else value)

    def _read(self) -> Tuple[dict, str]:
        """(parameters, layout of the weight) for one call."""
        weights = self._weights
        if is_compiling():  # compilers look for parameters where nn.Module has them
            return self._parameters, weights.layout
        if weights.parameters is not self._parameters:
            with REPLACING:  # wait for a thread that replaces them; replicas of nn.DataParallel have attributes instead
                parameters = self._parameters if "weight" in self._parameters else vars(self)
                weights = Weights(parameters, self._weights.layout)
        # functional_call and accelerate may have put a weight in the released packing in place of a converted one
        return weights.parameters, layout_of(weights.parameters["weight"], weights.layout, *self._sizes)

    def _replace(self, parameters: dict, layout: str = RELEASED) -> None:
        self._parameters = parameters
        self._weights = Weights(parameters, layout)

    def _convert(self, layout: str) -> Tuple[dict, str]:
        """Convert the weight to this layout, unless another thread has done so."""
        with REPLACING, torch.inference_mode(False):  # a tensor created in inference mode could not be trained on
            parameters, current = self._read()
            if current != layout:
                weight = to_released_format(parameters["weight"], current, *self._sizes)
                weight = weight if layout == RELEASED else family(layout).layout.to_layout(weight, self.bits)
                self._replace({**parameters, "weight": _frozen(weight)}, layout)
            return self._read()

    def _release(self) -> None:
        """Convert the weight back to the released packing, which it keeps as long as the caller holds REPLACING."""
        if self._weights.layout != RELEASED:
            self._convert(RELEASED)

    def _change(self, method: Callable, *args, copy=Tensor.detach, keep_layout=False, **kwargs) -> None:
        """Call a method that changes parameters one by one, on copies: threads compute with the old ones, or wait."""

        def copied(parameter):
            new = _frozen(copy(parameter))
            vars(new).update(vars(parameter))
            return new

        with REPLACING:
            if not keep_layout:
                self._release()
            old, layout = self._parameters.items(), self._weights.layout
            self._parameters = {name: None if value is None else copied(value) for name, value in old}
            method(*args, **kwargs)
            self._replace(self._parameters, layout)

    def _apply(self, fn, *args, **kwargs):
        with torch.inference_mode(False):
            probe = torch.empty(0, dtype=torch.int8, device=self.weight.device)
        same = fn(probe) is probe and probe._version == 0  # .half() and .cpu(), but not .cuda() or a fn that writes
        self._change(super()._apply, fn, *args, keep_layout=same, **kwargs)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(prefix + "weight")
        if weight is None or weight.dtype == torch.int8:
            return self._change(super()._load_from_state_dict, state_dict, prefix, *args, copy=torch.clone)
        # copying would truncate each float to -1, 0 or 1
        found = f"{prefix}weight is {weight.dtype} in the checkpoint, but int{self.bits} is held as torch.int8"
        args[-1].append(f"{found}: load a float checkpoint into the unquantized model, then quantize it")

    def _save_to_state_dict(self, *args):
        with REPLACING:
            self._release()
            super()._save_to_state_dict(*args)

    def __getstate__(self):  # copy.deepcopy and pickle
        with REPLACING:
            self._release()
            return dict(vars(self))


class QuantizedLinear(QuantizedModule, nn.Linear):
    """y [..., out] = x [..., in] W^T + b, with W in int8 or int4. An nn.Linear, so that PEFT can wrap it.

    The state dict is the released format: `weight` int8, `weight_scale`, `bias`. In memory a kernel family may keep
    `weight` in its own layout: the first forward converts it. It is converted back, and never kept twice, before it is
    saved, loaded, moved, copied or pickled. .half() and the like cast only `weight_scale` and `bias`: float16 scales
    survive float32 and back exactly; bfloat16 rounds each by at most 0.4%.
    """

    def __init__(self, in_features, out_features, bits, *, bias=True, group_size=None, backend="auto", device=None,
                 dtype=None):  # fmt: skip
        check_bits(bits, in_features, group_size)
        super().__init__(out_features, in_features, bits, group_size)
        self.in_features, self.out_features, self.backend = in_features, out_features, backend
        groups = (out_features,) if group_size is None else (out_features, in_features // group_size)
        self.weight = _frozen(torch.empty(out_features, in_features * bits // 8, dtype=torch.int8, device=device))
        self.weight_scale = _frozen(torch.empty(groups, dtype=dtype, device=device))
        bias = _frozen(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int, *, group_size=None, backend="auto", empty=False,
                    rounded=None) -> "QuantizedLinear":  # fmt: skip
        """The quantized form of `linear`, on its device, with scales in its dtype; without values if `empty`.

        rounded: (weight in the released packing, scale), by default those of `quantize_weight`.
        """
        device = linear.weight.device if empty else "meta"
        layer = cls(linear.in_features, linear.out_features, bits, bias=linear.bias is not None, group_size=group_size,
                    backend=backend, device=device, dtype=linear.weight.dtype)  # fmt: skip
        if not empty:
            rounded = rounded or round_weight(linear.weight.detach(), bits, group_size)
            layer.weight, layer.weight_scale = map(_frozen, rounded)
            layer.bias = None if linear.bias is None else _frozen(linear.bias.clone())
        return layer.train(linear.training)

    def __setattr__(self, name, value):
        if name == "backend":
            check_backend(value)
        super().__setattr__(name, value)
        if name == "backend":
            self._release()  # the next forward converts the weight to the layout of the new backend

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the input has {x.shape[-1]} channels, but the layer has in_features={self.in_features}")
        dtype = autocast_dtype(x.device.type)
        if dtype is not None and x.is_floating_point() and x.dtype != torch.float64:  # as autocast treats nn.Linear
            x = x.to(dtype)
        parameters, layout = self._read()
        if layout == RELEASED and not is_compiling():
            parameters, layout = self.lay_out()
        weight, weight_scale, bias = parameters["weight"], parameters["weight_scale"], parameters.get("bias")
        compute = op if needs_dispatch(x) else _multiply
        return compute(x, weight, weight_scale, bias, self.bits, layout, self.backend)

    def _is_offloaded(self) -> bool:
        """Whether accelerate offloads the weight: it then arrives in the released packing for each forward."""
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(hook, "offload", False) for hook in getattr(hook, "hooks", (hook,)))

    def lay_out(self) -> Tuple[dict, str]:
        """Convert the weight to the layout of its kernel family, where that has one. Returns (parameters, layout)."""
        parameters, current = self._read()
        name = choose(self.backend, parameters["weight"].device)
        layout, (out_features, in_features, bits) = family(name).layout, self._sizes
        if layout is None or not layout.fits_layout(out_features, in_features, bits, self.group_size):
            return parameters, current
        return (parameters, current) if self._is_offloaded() else self._convert(name)

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size else ""
        return f"{super().extra_repr()}, bits={self.bits}{group}, backend={self.backend}"


class QuantizedEmbedding(QuantizedModule, nn.Embedding):
    """An int8 embedding table: `weight` [tokens, C] and `weight_scale` [tokens]. A row is q * scale."""

    def __init__(self, tokens: int, size: int, *, device=None, dtype=None):
        super().__init__(tokens, size, 8, None)
        self.num_embeddings, self.embedding_dim = tokens, size
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = _frozen(torch.empty(tokens, size, dtype=torch.int8, device=device))
        self.weight_scale = _frozen(torch.empty(tokens, dtype=dtype, device=device))

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, *, empty=False) -> "QuantizedEmbedding":
        """The int8 form of `embedding`, on its device, with scales in its dtype; without values if `empty`."""
        device = embedding.weight.device if empty else "meta"
        layer = cls(embedding.num_embeddings, embedding.embedding_dim, device=device, dtype=embedding.weight.dtype)
        if not empty:
            layer.weight, layer.weight_scale = map(_frozen, round_weight(embedding.weight.detach(), 8))
        return layer.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        parameters, _ = self._read()
        scale = F.embedding(ids, parameters["weight_scale"][:, None])
        return F.embedding(ids, parameters["weight"]).to(scale.dtype) * scale


# ---- quantize() -----------------------------------------------------------------------------------------------------


def quantize(model: nn.Module, bits: int, *, group_size: Optional[int] = None, skip=(), embedding: bool = False,
             output_layer: bool = False, backend: Optional[str] = None, empty_init: bool = False,
             device=None, scale: str = "max", calibration=None, tokenizer=None,
             progress: Optional[str] = None) -> nn.Module:  # fmt: skip
    """Replace the four linear layers of every block with int8 or int4 ones, in place, and return the model.

    Args:
        bits: 8, 4, or 0, which changes nothing.
        group_size: one scale for every 32 or 128 inputs instead of one per row, for quality.
        skip: names of layers, or of modules around them, to leave unquantized ("dense_4h_to_h", "layers.0").
        embedding, output_layer: quantize these too, to int8.
        backend: a kernel family by name, also for layers that are quantized already. New layers default to "auto".
        empty_init: create the layers without values, for a checkpoint to fill.
        device: move `model` there once it is quantized.
        scale: "max" is the released format's max|w| / 7 (or / 127); "mse" searches the scale with the least squared
            error, in the same format.
        calibration: a few hundred samples, each a text, messages or token ids, on which the layers of the blocks keep
            their outputs as well as the format allows (quantization_calibration.py). It takes longer than rounding.
        tokenizer: for texts and messages.
        progress: a folder that keeps each calibrated layer, so that the same call goes on after it was stopped.

    Layers are replaced one by one, so peak memory is the model and one layer. All of them are checked first: a
    ValueError leaves the model unchanged. Layers that are quantized already keep their weights; it is a ValueError if
    they have other bits or groups.
    """
    if bits == 0:
        return model if device is None else model.to(device)
    check_bits(bits)
    check_backend(backend or "auto")
    check_scale(scale)
    if scale != "max" and calibration is not None:
        raise ValueError(f"scale={scale!r} and calibration were given: calibration searches scales itself, pass one")
    samples = samples_for(model, calibration, tokenizer, empty_init)
    wanted, quantized, chosen = {"word_embeddings": embedding, "output_layer": output_layer}, [], {}
    for name, layer in progress_bar(_find(model, skip).items(), "Checking weights"):
        kind = name.rpartition(".")[2]
        try:
            if hasattr(layer, "weight_scale"):
                if kind in LAYERS and (layer.bits, layer.group_size) != (bits, group_size):
                    raise ValueError(f"already int{layer.bits} with group_size={layer.group_size}, not int{bits} with "
                                     f"group_size={group_size}: quantize the float checkpoint instead")  # fmt: skip
                if backend and isinstance(layer, nn.Linear):
                    quantized.append(layer)
                    if not layer.weight.is_meta:
                        choose(backend, layer.weight.device)
            elif wanted.get(kind, True):
                if layer is not model.get_submodule(name):
                    raise ValueError("is wrapped by an adapter: quantize first, then add the adapter")
                options = (bits, group_size) if kind in LAYERS else (8, None)
                if empty_init:
                    check_bits(options[0], layer.weight.shape[1], options[1])
                else:
                    choose(backend or "auto", layer.weight.device)
                    check_weight(layer.weight.detach(), *options)
                chosen[name] = options
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{name}: {error}") from error
    for layer in quantized:
        layer.backend = backend
    try:
        calibrated = {name: chosen.pop(name) for name in list(chosen) if samples and name.rpartition(".")[2] in LAYERS}
        for name, options in progress_bar(chosen.items(), f"Quantizing to int{bits}"):
            _replace(model, name, *options, backend or "auto", empty_init, scale)
        for name, rounded in calibrate(model, calibrated, samples, progress):
            _replace(model, name, *calibrated[name], backend or "auto", rounded=rounded)
    finally:  # if interrupted, the config describes the layers that are quantized by then
        if getattr(model, "config", None) is not None:
            _write_config(model, bits, group_size)
    return model if device is None else model.to(device)


def check_scale(scale: str) -> None:
    """Raise ValueError for an unknown way to find scales."""
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown: choose {' or '.join(map(repr, SCALES))}")


def _replace(model: nn.Module, name: str, bits: int, group_size: Optional[int], backend: str, empty=False, scale="max",
             rounded: Optional[Tuple[Tensor, Tensor]] = None) -> None:  # fmt: skip
    """Put the quantized form of the layer `name` in its place."""
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    layer = getattr(parent, child)
    if isinstance(layer, nn.Embedding):
        new = QuantizedEmbedding.from_embedding(layer, empty=empty)
    else:
        if scale == "mse" and not empty:
            rounded = round_weight(layer.weight.detach(), bits, group_size, scale)
        new = QuantizedLinear.from_linear(
            layer, bits, group_size=group_size, backend=backend, empty=empty, rounded=rounded
        )
    setattr(parent, child, new)


def _write_config(model: nn.Module, bits: int, group_size: Optional[int]) -> None:
    """Record which layers are quantized, and how, so that a checkpoint of the model loads into the same layers."""
    layers = {name: hasattr(layer, "weight_scale") for name, layer in _find(model).items()}
    if not any(layers.values()):
        return
    left = [name for name, done in layers.items() if name.rpartition(".")[2] in LAYERS and not done]
    options = {
        "group_size": group_size,
        "skip": [name[name.find("encoder.") :] for name in left],
        "embedding": any(done for name, done in layers.items() if name.endswith("word_embeddings")),
        "output_layer": any(done for name, done in layers.items() if name.endswith("output_layer")),
    }
    model.config.quantization_bit = bits
    model.config.quantization_options = {key: value for key, value in options.items() if value}
    if not model.config.quantization_options:  # the released format has none
        del model.config.quantization_options


def _find(model: nn.Module, skip=()) -> Dict[str, nn.Module]:
    """{name: layer} of what is or can be quantized, except what `skip` names. PEFT's wrappers are looked into."""
    kinds = {"word_embeddings": nn.Embedding, "output_layer": nn.Linear, **dict.fromkeys(LAYERS, nn.Linear)}
    layers, skipped = {}, set()
    for name, module in model.named_modules():
        layer = getattr(module, "base_layer", module)
        if isinstance(layer, kinds.get(name.rpartition(".")[2], ())):
            layers[name] = layer
    for entry in (skip,) if isinstance(skip, str) else skip:
        matches = {name for name in layers if f".{entry}." in f".{name}."}
        if not matches:
            raise ValueError(f"skip={entry!r} matches no layer: try {LAYERS[-1]!r} or 'layers.0'")
        skipped |= matches
    return {name: layer for name, layer in layers.items() if name not in skipped}
