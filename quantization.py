"""INT8 and INT4 weights: the released checkpoints' format, the layers that hold it, and the op that multiplies by it.

Format. Symmetric, one scale an output row: scale = max|w| / 127 (int8) or / 7 (int4), in the weight's dtype, and
q = round_half_even(w / scale). `weight` is int8 [out, in]; in int4 it is [out, in / 2], two columns a byte, the even
column in the high nibble: (q[2j] & 15) << 4 | (q[2j + 1] & 15). `weight_scale` is [out], or [out, in / group_size]
where every group_size inputs have a scale of their own (better int4, and not the released format).

A kernel family is a file, `quantization_<family>.py`, behind the one op `chatglm::quantized_linear`.
"""

import functools
import warnings
from typing import Callable, Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .torch_compat import autocast_dtype, is_compiling, is_watched

LAYERS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")  # the four linear layers of every block
LIMIT = {8: 127, 4: 7}  # bits -> the largest |q|
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # what a layer multiplies
CHUNK = 1 << 22  # weights rounded or restored at a time: what keeps the peak at one layer


# ---- the format -----------------------------------------------------------------------------------------------------


def check_bits(bits: int, in_features: int = 2, group_size: Optional[int] = None) -> None:
    """Raise ValueError where `bits`, or groups of `group_size`, cannot hold rows of `in_features` weights."""
    if bits not in LIMIT:
        raise ValueError(f"bits={bits!r}: weights are held in 8 or 4 bits; 0 leaves the model as it is")
    if bits == 4 and in_features % 2:
        raise ValueError(
            f"in_features={in_features} is odd, and int4 packs two columns a byte: leave it out with skip="
        )
    if group_size is not None and (group_size < 2 or group_size % 2 or in_features % group_size):
        raise ValueError(f"group_size={group_size} must be even and divide in_features={in_features}: try 32 or 128")


def pack(q: Tensor) -> Tensor:
    """int8 [out, in] of values -8..7 -> int8 [out, in / 2], the even column in the high nibble."""
    return (q[:, 0::2] & 15) << 4 | (q[:, 1::2] & 15)


def unpack(packed: Tensor) -> Tensor:
    """int8 [out, in / 2] -> int8 [out, in] of values -8..7: the reverse of `pack`."""
    return torch.stack((packed >> 4, (packed << 4) >> 4), dim=-1).flatten(-2)


@torch.no_grad()
def quantize_weight(weight: Tensor, bits: int, group_size: Optional[int] = None) -> Tuple[Tensor, Tensor]:
    """Round a float weight [out, in] to (int8 weight in the released packing, scale [out] or [out, in / group_size]).

    Division and rounding are done in the weight's dtype, as the released files were; what bfloat16 rounds up to 128 is
    held at 127, and a row of zeros has scale 0. Raises ValueError on nan, inf and weights that hold no values.
    """
    check_bits(bits, weight.shape[1], group_size)
    if weight.is_meta:
        raise ValueError("the weight is on the meta device and holds no values yet: load the checkpoint first")
    out, columns = weight.shape
    group = group_size or columns
    packed = torch.empty(out, columns * bits // 8, dtype=torch.int8, device=weight.device)
    scale = torch.empty(out, columns // group if group else 1, dtype=weight.dtype, device=weight.device)
    rows = max(CHUNK // max(columns, 1), 1)
    for i in range(0, out if columns else 0, rows):
        w = weight[i : i + rows].reshape(-1, columns // group, group)
        scale[i : i + rows] = w.abs().amax(dim=2) / LIMIT[bits]
        s = scale[i : i + rows, :, None]
        q = (w / torch.where(s == 0, 1, s)).float().round_().clamp_(-LIMIT[bits], LIMIT[bits]).to(torch.int8).flatten(1)
        packed[i : i + rows] = q if bits == 8 else pack(q)
    if not scale.isfinite().all():
        raise ValueError("the weight holds nan or inf, which cannot be quantized: repair the checkpoint, or use skip=")
    return packed, scale if group_size else scale[:, 0].contiguous()


def dequantize_weight(weight: Tensor, weight_scale: Tensor, bits: int, dtype: Optional[torch.dtype] = None) -> Tensor:
    """The float weight [out, in] = q * scale, each product rounded once to `dtype` (default: the scale's dtype)."""
    dtype = dtype or weight_scale.dtype
    q = (unpack(weight) if bits == 4 else weight).to(dtype)
    if weight_scale.dim() == 1:
        return q * weight_scale.to(dtype)[:, None]
    return (q.unflatten(1, (weight_scale.shape[1], -1)) * weight_scale.to(dtype)[:, :, None]).flatten(1)


# ---- the op ---------------------------------------------------------------------------------------------------------


def reference_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int) -> Tensor:
    """x [N, in] times the dequantized weight [out, in], transposed, plus bias [out]: what every kernel is held to.

    Float32 on a CPU, where half precision is slower and no more exact; x's own dtype elsewhere.
    """
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    y = F.linear(x.to(dtype), dequantize_weight(weight, weight_scale, bits, dtype))
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


BACKENDS = ("auto", "triton", "cpm", "cpu", "stock", "torch")
FAMILIES = {"cpu": ("cpu", "stock"), "cuda": ("triton", "cpm")}  # in the order "auto" tries them


class Family(NamedTuple):
    """What a kernel family's file gives; the last three where its kernel reads weights in a layout of its own."""

    linear: Callable  # as `reference_linear`
    unavailable: Callable  # device -> None, or why it cannot run there
    readable: Callable = lambda *_: False  # out_features, in_features, bits, group_size -> whether the layout holds it
    to_layout: Optional[Callable] = None  # weight, bits -> the weight in the layout
    from_layout: Optional[Callable] = None  # layout, out_features, in_features, bits -> the weight

    def laid_out(self, weight: Tensor, in_features: int, bits: int, group_size: Optional[int]) -> Tensor:
        """A weight in the released packing, in the layout where it holds these weights, else as it is."""
        if not self.readable(weight.shape[0], in_features, bits, group_size):
            return weight
        with torch.inference_mode(False):  # what is made under it could not be trained on later
            return self.to_layout(weight, bits)


@functools.lru_cache(None)
def family(name: str) -> Family:
    """The kernel family `name`; its file is imported when it is first asked for."""
    if name == "triton":
        from .quantization_triton import linear, unavailable

        return Family(linear, unavailable)
    if name == "cpm":
        from .quantization_cpm import linear, unavailable

        return Family(linear, unavailable)
    if name == "cpu":
        from .quantization_cpu import from_layout, linear, readable, to_layout, unavailable

        return Family(linear, unavailable, readable, to_layout, from_layout)
    if name == "stock":
        from .quantization_stock import from_layout, linear, readable, to_layout, unavailable

        return Family(linear, unavailable, readable, to_layout, from_layout)
    return Family(reference_linear, lambda device: None)  # "torch"


def check_backend(backend: str) -> None:
    """Raise ValueError where nobody knows `backend`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}")


@functools.lru_cache(None)
def choose(backend: str, device: torch.device) -> str:
    """The family that computes `backend` on `device`; ValueError where a named one cannot run there, with the cure."""
    check_backend(backend)
    if backend != "auto":
        reason = family(backend).unavailable(device)
        if reason:
            raise ValueError(f"backend={backend!r} cannot run on {device}: {reason}")
        return backend
    for name in FAMILIES.get(device.type, ()):
        reason = family(name).unavailable(device)
        if reason is None:
            return name
        message = f"quantized layers run slower on {device} than they might: {name} is passed over, since {reason}"
        warnings.warn(message, stacklevel=2)
    return "torch"


def quantized_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Optional[Tensor], bits: int, backend: str
) -> Tensor:
    """x [..., in] -> [..., out] in x's dtype. `weight` is in the released packing or in its family's own layout."""
    _check_input(x, weight, bits)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    name = "torch" if torch.float64 in (x.dtype, weight_scale.dtype) else choose(backend, x.device)
    if laid_out_by(weight) not in (None, name):
        weight = released(weight, weight_scale, rows.shape[1], bits)
    y = family(name).linear(rows, weight, weight_scale, bias, bits)
    return y.view(*x.shape[:-1], weight_scale.shape[0])


def _check_input(x: Tensor, weight: Tensor, bits: int) -> None:
    """Raise ValueError where a kernel would read past x or the weight, or does not know x's dtype."""
    if x.dtype not in FLOATS:
        raise ValueError(f"the input is {x.dtype}: cast it to float32, float16, bfloat16 or float64 first")
    columns = weight.shape[1] * (32 if weight.dim() == 3 else 8) // bits
    padding = columns - x.shape[-1]
    if padding and not (weight.dim() == 3 and 0 < padding < 128):  # the layout of "cpu" is padded to as many
        raise ValueError(f"the input has {x.shape[-1]} channels, and the weight has {columns}")


def laid_out_by(weight: Tensor) -> Optional[str]:
    """The family in whose layout `weight` is, or None: then it is in the released packing."""
    return "cpu" if weight.dim() == 3 else "stock" if weight.dtype == torch.uint8 else None


def released(weight: Tensor, weight_scale: Tensor, in_features: int, bits: int) -> Tensor:
    """The released packing of a weight in any layout."""
    name = laid_out_by(weight)
    return family(name).from_layout(weight, weight_scale.shape[0], in_features, bits) if name else weight


def _save_for_backward(ctx, inputs, output):
    x, weight, weight_scale, _, ctx.bits, _ = inputs
    ctx.in_features = x.shape[-1]
    ctx.save_for_backward(weight, weight_scale)


def _input_gradient(ctx, grad):
    weight, weight_scale = ctx.saved_tensors
    weight = released(weight, weight_scale, ctx.in_features, ctx.bits)
    dtype = torch.promote_types(grad.dtype, torch.float32) if grad.device.type == "cpu" else grad.dtype
    x_grad = grad.to(dtype) @ dequantize_weight(weight, weight_scale, ctx.bits, dtype)
    return x_grad.to(grad.dtype), None, None, None, None, None


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
        _op.register_fake(lambda x, weight, scale, bias, bits, backend: x.new_empty(*x.shape[:-1], scale.shape[0]))
        _op.register_autograd(_input_gradient, setup_context=_save_for_backward)
    op = torch.ops.chatglm.quantized_linear


# ---- the layers -----------------------------------------------------------------------------------------------------


class Frozen(nn.Module):
    """What int8 and int4 layers share: their parameters ask for no gradient, whoever sets them, and are no floats."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value.requires_grad_(False) if isinstance(value, nn.Parameter) else value)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype != torch.int8:  # copying would truncate each float to -1, 0 or 1
            found = f"{prefix}weight is {weight.dtype} in the checkpoint, and int{self.bits} is held as torch.int8"
            errors.append(f"{found}: load a float checkpoint into the unquantized model, then quantize")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)


class QuantizedLinear(Frozen, nn.Linear):
    """y [..., out] = x [..., in] W^T + b, with W in int8 or int4. An nn.Linear, so that PEFT wraps it.

    Its state dict is the released format: `weight` int8, `weight_scale`, `bias`. In memory a kernel may hold `weight`
    in a layout of its own (`laid_out_by`): laid out at the first forward, and put back, in the same single copy, before
    it is saved, loaded, moved, copied or pickled. .half() and the like cast `weight_scale` and `bias` alone; float32
    and back loses nothing of a scale, and bfloat16 rounds it, by 0.4% of its row at most.
    """

    def __init__(self, in_features, out_features, bits, *, bias=True, group_size=None, backend="auto", device=None,
                 dtype=None):  # fmt: skip
        check_bits(bits, in_features, group_size)
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.backend = bits, group_size, backend
        groups = (out_features,) if group_size is None else (out_features, in_features // group_size)
        weight = torch.empty(out_features, in_features * bits // 8, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(groups, dtype=dtype, device=device), requires_grad=False)
        bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, bits: int, *, group_size=None, backend="auto") -> "QuantizedLinear":
        """The quantized form of `linear`, on its device, with scales in its dtype. `linear` itself is left alone."""
        check_bits(bits, linear.in_features, group_size)
        weight, scale = quantize_weight(linear.weight.detach(), bits, group_size)
        layer = cls(linear.in_features, linear.out_features, bits, bias=False, group_size=group_size, backend=backend,
                    device="meta")  # fmt: skip
        layer.weight, layer.weight_scale = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, scale))
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return layer.train(linear.training)

    def __setattr__(self, name, value):
        if name == "backend":
            check_backend(value)
            if hasattr(self, "weight"):
                self._release()  # the next forward lays it out for this backend
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the input has {x.shape[-1]} channels, the layer takes in_features={self.in_features}")
        dtype = autocast_dtype(x.device.type)
        if dtype is not None and x.is_floating_point() and x.dtype != torch.float64:  # as autocast treats nn.Linear
            x = x.to(dtype)
        weight = self.weight  # one reading: nn.Module takes a microsecond for it, and many behind cold caches
        if weight.is_cpu and not laid_out_by(weight) and not is_compiling() and not self._comes_and_goes():
            weight = self.lay_out()
        compute = op if is_watched(x) else quantized_linear
        return compute(x, weight, self.weight_scale, self.bias, self.bits, self.backend)

    def _comes_and_goes(self) -> bool:
        """Whether accelerate offloads the weight: then it is brought in the released packing for each forward."""
        hook = getattr(self, "_hf_hook", None)
        return any(getattr(hook, "offload", False) for hook in getattr(hook, "hooks", (hook,)))

    def lay_out(self) -> Tensor:
        """Put the weight into the layout that its kernel reads, where it has one of its own, and return it."""
        weight = self.weight  # one reading: another thread may be here, too
        if laid_out_by(weight):
            return weight
        kernel = family(choose(self.backend, weight.device))
        laid_out = kernel.laid_out(weight, self.in_features, self.bits, self.group_size)
        return weight if laid_out is weight else self._replace_weight(laid_out)

    @torch.inference_mode(False)
    def _release(self) -> Tensor:
        """Put the released packing back, and return it: another thread's forward may lay it out again at once."""
        held = self.weight
        weight = released(held, self.weight_scale, self.in_features, self.bits)
        return held if weight is held else self._replace_weight(weight)

    def _replace_weight(self, weight: Tensor) -> Tensor:
        weight = self.weight = nn.Parameter(weight.detach(), requires_grad=False)  # a forward may read the old one yet
        return weight

    def _apply(self, *args, **kwargs):
        self._release()
        return super()._apply(*args, **kwargs)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        weight = self._release()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        self._release()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def __getstate__(self):  # copy.deepcopy and pickle
        weight = self._release()
        return {**self.__dict__, "_parameters": {**self._parameters, "weight": weight}}

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.group_size else ""
        return f"{super().extra_repr()}, bits={self.bits}{group}, backend={self.backend}"


class QuantizedEmbedding(Frozen, nn.Embedding):
    """An embedding table in int8: `weight` [tokens, C] and `weight_scale` [tokens]; a row is q * scale."""

    def __init__(self, tokens: int, size: int, *, device=None, dtype=None):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.bits, self.group_size = tokens, size, 8, None
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.weight = nn.Parameter(torch.empty(tokens, size, dtype=torch.int8, device=device), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.empty(tokens, dtype=dtype, device=device), requires_grad=False)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> "QuantizedEmbedding":
        layer = cls(embedding.num_embeddings, embedding.embedding_dim, device="meta")
        weight, scale = quantize_weight(embedding.weight.detach(), 8)
        layer.weight, layer.weight_scale = (nn.Parameter(tensor, requires_grad=False) for tensor in (weight, scale))
        return layer.train(embedding.training)

    def forward(self, ids: Tensor) -> Tensor:
        scale = F.embedding(ids, self.weight_scale[:, None])
        return F.embedding(ids, self.weight).to(scale.dtype) * scale


# ---- the swap -------------------------------------------------------------------------------------------------------


def quantize(model: nn.Module, bits: int, *, group_size: Optional[int] = None, skip=(), embedding: bool = False,
             output_layer: bool = False, backend: Optional[str] = None, empty: bool = False) -> nn.Module:  # fmt: skip
    """Swap the four linear layers of every block for int8 or int4 ones, in place, and return the model.

    bits: 8, 4, or 0, which changes nothing. group_size: a scale for every 32 or 128 inputs, for quality. skip: names
    of layers, or of modules around them, that stay as they are ("dense_4h_to_h", "layers.0"). embedding, output_layer:
    these too, in int8. backend: a kernel family by name, for the layers that are quantized already, too; the default
    is "auto" for new ones. empty: the layers hold no values, a checkpoint will fill them.
    Layer by layer: the peak is the model and one layer. Every layer is rehearsed before the first is swapped, so that a
    failure leaves the model as it was. A layer that is quantized already keeps its weight; asking other bits of it is a
    ValueError.
    """
    if bits == 0:
        return model
    check_bits(bits)
    new_backend = backend or "auto"
    check_backend(new_backend)

    def quantized(layer):
        like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        if isinstance(layer, nn.Embedding):
            if empty:
                return QuantizedEmbedding(layer.num_embeddings, layer.embedding_dim, **like)
            return QuantizedEmbedding.from_embedding(layer)
        head = name.endswith("output_layer")
        options = {"bits": 8 if head else bits, "group_size": None if head else group_size, "backend": new_backend}
        if empty:
            bias = layer.bias is not None
            return QuantizedLinear(layer.in_features, layer.out_features, bias=bias, **options, **like)
        return QuantizedLinear.from_linear(layer, **options)

    names, held = [], []
    for name, layer in _find(model, skip).items():
        kind = name.rpartition(".")[2]
        try:
            if hasattr(layer, "weight_scale"):
                if kind in LAYERS and (layer.bits, layer.group_size) != (bits, group_size):
                    raise ValueError(f"already int{layer.bits} with group_size={layer.group_size}, not int{bits} with "
                                     f"{group_size}: quantize the float checkpoint instead")  # fmt: skip
                if backend and isinstance(layer, nn.Linear):
                    held.append(layer)
                    if not layer.weight.is_meta:
                        choose(backend, layer.weight.device)
            elif {"word_embeddings": embedding, "output_layer": output_layer}.get(kind, True):
                if layer is not model.get_submodule(name):
                    raise ValueError("an adapter stands around it: quantize first, then add the adapter")
                names.append(name)
                if not empty:
                    choose(new_backend, layer.weight.device)
                    quantized(layer)  # the rehearsal
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{name}: {error}") from error
    for layer in held:
        layer.backend = backend
    try:
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized(model.get_submodule(name)))
    finally:  # stopped by hand it is quantized in part, and its config says which part
        if getattr(model, "config", None) is not None:
            _write_config(model, bits, group_size)
    return model


def _write_config(model: nn.Module, bits: int, group_size: Optional[int]) -> None:
    """What of the model is quantized, and how, so that a checkpoint of it loads into the same layers."""
    layers = {name: hasattr(layer, "weight_scale") for name, layer in _find(model).items()}
    if not any(layers.values()):
        return
    options = {
        "group_size": group_size,
        "skip": [
            name[name.find("encoder.") :]
            for name, done in layers.items()
            if name.rpartition(".")[2] in LAYERS and not done
        ],
        "embedding": any(done for name, done in layers.items() if name.endswith("word_embeddings")),
        "output_layer": any(done for name, done in layers.items() if name.endswith("output_layer")),
    }
    model.config.quantization_bit = bits
    model.config.quantization_options = {key: value for key, value in options.items() if value}
    if not model.config.quantization_options:  # the released format needs none
        del model.config.quantization_options


def _find(model: nn.Module, skip=()) -> Dict[str, nn.Module]:
    """{name: layer} of what can be quantized, or is, but for what `skip` names; PEFT's wrappers are looked into."""
    kinds = {"word_embeddings": nn.Embedding, "output_layer": nn.Linear, **dict.fromkeys(LAYERS, nn.Linear)}
    layers, skipped = {}, set()
    for name, module in model.named_modules():
        layer = getattr(module, "base_layer", module)
        if isinstance(layer, kinds.get(name.rpartition(".")[2], ())):
            layers[name] = layer
    for entry in (skip,) if isinstance(skip, str) else skip:
        named = {name for name in layers if f".{entry}." in f".{name}."}
        if not named:
            raise ValueError(f"skip names {entry!r}, and no layer is called so: try {LAYERS[-1]!r} or 'layers.0'")
        skipped |= named
    return {name: layer for name, layer in layers.items() if name not in skipped}
