"""The registry of kernel families, the op, and the quantized layers."""

import copy
import io
import pickle
import sys
import types

import pytest
import torch
from chatglm2 import quantization
from chatglm2.quantization import QuantizedLinear, choose, quantized_linear
from chatglm2.quantization_format import Family, Layout, dequantize_weight, quantize_weight, reference_linear
from quantization_helpers import BACKENDS, DTYPES, make, needs_compiled
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


@pytest.mark.parametrize(
    "backend, device, message",
    [
        ("cuda9", "cpu", f"backend='cuda9'.*{', '.join(quantization.BACKENDS[:-1])} or torch"),
        ("triton", "cpu", "backend='triton' cannot run on cpu: "),
        ("cpm", "cpu", "backend='cpm' cannot run on cpu: "),
        ("cpu", "meta", "backend='cpu' cannot run on meta: .*\\.cpu\\(\\)"),
    ],
)
def test_a_backend_that_cannot_run_is_an_error_with_the_cure(backend, device, message):
    with pytest.raises(ValueError, match=message):
        choose(backend, torch.device(device))


def test_a_new_family_is_one_file_and_one_line_of_the_registry(monkeypatch):
    """A family for another device, whose layout has the rows in reverse: choice, layout, saving and gradients."""
    module = types.ModuleType("chatglm2.quantization_reverse")
    layout = Layout(
        dtype=torch.int16,
        shape=lambda out, columns, bits: (out, columns * bits // 8),
        fits_layout=lambda out, columns, bits, group_size: bits == 8,
        to_layout=lambda weight, bits: weight.flip(0).short(),
        from_layout=lambda weight, out, columns, bits: weight.flip(0).to(torch.int8),
        linear=lambda x, weight, *rest: reference_linear(x, weight.flip(0).to(torch.int8), *rest),
    )
    module.FAMILY = Family(reference_linear, lambda device: None, layout)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(quantization.FAMILIES, "reverse", "cpu")
    monkeypatch.setattr(quantization, "BACKENDS", (*quantization.BACKENDS, "reverse"))
    for bits in (8, 4):
        layer = QuantizedLinear.from_linear(nn.Linear(64, 48), bits, backend="reverse")
        want, x = copy.deepcopy(layer), torch.randn(3, 64, requires_grad=True)
        want.backend = "torch"
        assert torch.equal(layer(x), want(x)) and layer._weights.layout == ("reverse" if bits == 8 else "")
        gradients = [torch.autograd.grad(each(x).sum(), x)[0] for each in (layer, want)]
        assert torch.equal(*gradients) and torch.equal(layer.state_dict()["weight"], want.weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
def test_an_input_of_another_width_or_dtype_is_refused(backend, bits):
    """No kernel reads past the input or the weight: the layer and the op refuse, in the released packing and after."""
    layer = QuantizedLinear.from_linear(nn.Linear(64, 64), bits, backend=backend)
    for laid_out in (False, True):
        parameters, layout = layer._weights.parameters, layer._weights.layout
        for width in (1, 32, 96, 130, 1 << 22):
            with pytest.raises(ValueError, match=f"has {width} channels.*in_features=64"):
                layer(torch.ones(2, width))
        for width in (130, 1 << 22):
            with pytest.raises(ValueError, match=f"{width} channels"):
                quantization.op(
                    torch.ones(2, width), parameters["weight"], layer.weight_scale, None, bits, layout, backend
                )
        for dtype in (torch.int64, torch.bool):
            with pytest.raises(ValueError, match=f"the input is {dtype}.*float32"):
                layer(torch.ones(2, 64, dtype=dtype))
        layer(torch.ones(2, 64))
        assert not laid_out or layout == backend or backend == "torch" or (backend, bits) == ("stock", 8)


@pytest.mark.skipif(not hasattr(torch.library, "opcheck"), reason="torch.library.opcheck needs torch 2.5")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(backend, gradient):
    x, weight, scale, bias, bits = make(6, 64, 40, 4, torch.float32)
    x.requires_grad_(gradient)
    torch.library.opcheck(quantization.op, (x.view(2, 3, 64), weight, scale, bias, bits, "", backend))
    torch.library.opcheck(quantization.op, (x, weight, scale, None, bits, "", backend), test_utils="test_faketensor")


@pytest.mark.parametrize("backend", ["auto", "stock", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, group_size", [(8, None), (4, None), (4, 32)])
def test_the_gradient_is_that_of_the_dequantized_linear(backend, dtype, bits, group_size):
    torch.manual_seed(0)
    layer = QuantizedLinear.from_linear(nn.Linear(96, 40, dtype=dtype), bits, group_size=group_size, backend=backend)
    x = torch.randn(2, 5, 96, dtype=dtype, requires_grad=True)
    y = layer(x)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    packed = layer.state_dict()["weight"]
    want = grad.double() @ dequantize_weight(packed, layer.weight_scale, bits, torch.float64)
    assert x.grad.dtype == dtype
    own = (want.to(dtype).double() - want).norm()  # the error of rounding the gradient alone
    assert (x.grad.double() - want).norm() <= 2 * own + 1e-6 * want.norm()
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_the_gradient_survives_a_state_dict_between_forward_and_backward():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 40), 4)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    layer.state_dict()
    y.sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_autocast_casts_the_input_as_it_does_for_a_linear_layer():
    """float32 and float16 inputs become bfloat16, float64 stays; the gradient comes back in the input's dtype."""
    layer = QuantizedLinear.from_linear(nn.Linear(64, 48), 4)
    x = torch.randn(3, 64, requires_grad=True)
    want = layer(x.detach().bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert torch.equal(y, want) and layer(x.detach().half()).dtype == torch.bfloat16
        assert layer(x.detach().double()).dtype == torch.float64
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.any()
    assert layer(x).dtype == torch.float32


@pytest.mark.skipif(sys.version_info >= (3, 14) or sys.platform == "win32", reason="torch.compile is not there")
def test_autocast_compiles_without_a_break():
    """Which dtype autocast computes in is known while tracing; a graph made without it is not taken for one with it."""
    layer, x = QuantizedLinear.from_linear(nn.Linear(64, 48), 4), torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert compiled(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y, want = compiled(x), layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)


@pytest.mark.skipif(sys.version_info >= (3, 14) or sys.platform == "win32", reason="torch.compile is not there")
def test_compile_takes_the_op_as_it_is():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 32))
    network = nn.Sequential(*[QuantizedLinear.from_linear(m, 4) if isinstance(m, nn.Linear) else m for m in network])
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64, requires_grad=True)
    torch.testing.assert_close(compiled(x), network(x))
    gradient = torch.autograd.grad(compiled(x).sum(), x)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(network(x).sum(), x)[0])
    network.state_dict()  # puts the released packing back
    torch.testing.assert_close(compiled(x), network(x))


@pytest.mark.skipif(sys.version_info >= (3, 14) or sys.platform == "win32", reason="torch.compile is not there")
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_compiled), "stock", "torch"])
def test_export_leaves_the_layer_as_it_was(backend):
    layer, x = QuantizedLinear.from_linear(nn.Linear(64, 64), 4, backend=backend), torch.randn(2, 64)
    weight, y = layer.weight.clone(), layer(x)
    for _ in range(2):
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), y)
        assert torch.equal(layer(x), y)
        assert torch.equal(layer.state_dict()["weight"], weight)


def test_gradients_traces_and_modes_see_the_op(monkeypatch):
    """A layer calls its kernel directly only where nothing needs the dispatcher."""
    layer, x = QuantizedLinear.from_linear(nn.Linear(64, 32), 8, backend="torch"), torch.randn(2, 64)
    with torch.no_grad():
        assert "quantized_linear" in str(make_fx(lambda x: layer(x))(x).graph)
        assert "chatglm::quantized_linear" in str(torch.jit.trace(layer, x).graph)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert isinstance(layer(mode.from_tensor(x)), FakeTensor)
    calls = []
    monkeypatch.setattr(quantization, "op", lambda *arguments: calls.append(arguments) or quantized_linear(*arguments))
    layer(x.requires_grad_())
    assert len(calls) == 1
    with torch.no_grad():
        torch.testing.assert_close(layer(x.detach()), layer(x).detach())
    assert len(calls) == 2


@pytest.mark.parametrize("bits, group_size", [(8, None), (4, None), (4, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_is_the_released_format_whatever_was_run_before(bits, group_size, bias):
    linear = nn.Linear(64, 40, bias=bias).half()
    layer = QuantizedLinear.from_linear(linear, bits, group_size=group_size)
    weight, scale = quantize_weight(linear.weight, bits, group_size)
    x = torch.randn(3, 64).half()
    for _ in range(2):
        y = layer(x)
        state = layer.state_dict()
        assert sorted(state) == ["bias"] * bias + ["weight", "weight_scale"]
        assert torch.equal(state["weight"], weight) and torch.equal(state["weight_scale"], scale)
    for assign in (False, True):
        empty = QuantizedLinear(
            64, 40, bits, bias=bias, group_size=group_size, dtype=torch.float16, device="meta" if assign else None
        )
        if not assign:
            empty.state_dict()["weight"].zero_()
            empty(x)  # laid out before it is loaded
        empty.load_state_dict(state, assign=assign)
        assert torch.equal(empty(x), y)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    empty.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(empty(x), y)


def test_there_is_one_copy_of_the_weight():
    layer = QuantizedLinear.from_linear(nn.Linear(256, 256), 4)
    layer(torch.randn(2, 256))
    assert layer._weights.parameters is layer._parameters
    reachable = [layer, *vars(layer).values(), *vars(layer._weights).values(), *layer._parameters.values()]
    tensors = {value.data_ptr(): value.nbytes for value in reachable if torch.is_tensor(value)}
    assert sum(tensors.values()) == 256 * 256 // 2 + 2 * 256 * 4


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same(how):
    layer = QuantizedLinear.from_linear(nn.Linear(96, 40), 4, group_size=32)
    x = torch.randn(3, 96)
    y = layer(x)
    other = how(layer)
    assert torch.equal(other(x), y) and torch.equal(layer(x), y)
    assert other.group_size == 32 and other.weight is not layer.weight


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_compiled), "stock"])
def test_weights_that_others_put_in_place(backend):
    """functional_call swaps in weights in either form, nn.DataParallel attributes; what fits neither is an error."""
    layer, x = QuantizedLinear.from_linear(nn.Linear(64, 64), 4, backend=backend), torch.randn(2, 64)
    released = {name: value.clone() for name, value in layer.state_dict().items()}
    y = layer(x)
    laid_out = {name: value.clone() for name, value in layer.named_parameters()}
    for state in (released, laid_out):
        for _ in range(2):
            assert torch.equal(torch.func.functional_call(layer, dict(state), (x,)), y)
        assert torch.equal(layer(x), y)
    replica = layer._replicate_for_data_parallel()
    for name, value in layer.named_parameters():
        setattr(replica, name, value.detach())
    assert torch.equal(replica(x), y)
    with pytest.raises(ValueError, match=r"torch.int8 \[64, 30\].*expected torch.int8 \[64, 32\]"):
        torch.func.functional_call(layer, {**released, "weight": released["weight"][:, :30]}, (x,))
    assert torch.equal(layer(x), y) and torch.equal(layer.state_dict()["weight"], released["weight"])


def test_casting_changes_the_scale_and_never_the_weight():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 40).half(), 8)
    weight = layer.state_dict()["weight"].clone()
    scale = layer.weight_scale.clone()
    layer(torch.randn(2, 64).half())
    for cast in (lambda m: m.float(), lambda m: m.half(), lambda m: m.cpu()):
        layer = cast(layer)
        assert layer.weight.dtype == torch.int8 and torch.equal(layer.state_dict()["weight"], weight)
    assert torch.equal(layer.weight_scale, scale)  # float16 -> float32 -> float16 loses nothing
    layer.bfloat16()
    assert layer.weight_scale.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight_scale, scale.bfloat16())
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    assert layer.double()(torch.randn(2, 64).double()).dtype == torch.float64


def test_a_new_backend_converts_the_weight_once():
    """Not at every forward; an unknown backend is refused at once."""
    layer, x = QuantizedLinear.from_linear(nn.Linear(64, 64), 4), torch.randn(2, 64)
    weight, y = layer.weight.clone(), layer(x)
    for backend in ("torch", "stock"):
        layer.backend = backend
        torch.testing.assert_close(layer(x), y)
        weights = layer._weights
        layer(x)
        assert layer._weights is weights and weights.layout in ("", backend)
    with pytest.raises(ValueError, match="backend='tritn' is unknown: choose auto, triton"):
        layer.backend = "tritn"
    with pytest.raises(ValueError, match="backend='tritn' is unknown: choose auto, triton"):
        QuantizedLinear(64, 64, 4, backend="tritn")
    assert layer.backend == "stock" and torch.equal(layer.state_dict()["weight"], weight)


def test_a_float_weight_is_refused_rather_than_truncated():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 40), 8)
    with pytest.raises(RuntimeError, match="weight is torch.float32 in the checkpoint, but int8 is held as torch.int8"):
        layer.load_state_dict(nn.Linear(64, 40).state_dict(), strict=False)


def test_a_float_embedding_is_refused_rather_than_truncated():
    embedding = quantization.QuantizedEmbedding.from_embedding(nn.Embedding(9, 8))
    with pytest.raises(RuntimeError, match="weight is torch.float32 in the checkpoint"):
        embedding.load_state_dict(nn.Embedding(9, 8).state_dict(), strict=False)


def test_repr():
    layer = QuantizedLinear.from_linear(nn.Linear(64, 40, bias=False), 4, group_size=32)
    assert repr(layer) == (
        "QuantizedLinear(in_features=64, out_features=40, bias=False, bits=4, group_size=32, backend=auto)"
    )
