"""quantize(): which layers it replaces, what it refuses, and training on top of a quantized model."""

import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
from chatglm2 import quantization
from chatglm2.modeling_chatglm import Linear
from chatglm2.quantization import QuantizedLinear
from chatglm2.quantization_format import quantize_weight
from chatglm2.quantization_loading import ChatGLMQuantizationConfig, ChatGLMQuantizer
from chatglm2.transformers_compat import register_quantization
from quantization_helpers import DTYPES, linears
from torch import nn


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_swaps_the_four_layers_of_every_block(make_model, bits, dtype):
    model = make_model().to(dtype)
    weights = {name: layer.weight.detach().clone() for name, layer in linears(model).items()}
    assert model.quantize(bits) is model and model.config.quantization_bit == bits
    assert len(weights) == 12
    for name, layer in linears(model).items():
        assert type(layer) is QuantizedLinear and layer.bits == bits
        packed, scale = quantize_weight(weights[name], bits)
        assert torch.equal(layer.state_dict()["weight"], packed) and torch.equal(layer.weight_scale, scale)
    assert type(model.transformer.output_layer) is Linear
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_every_public_class_quantizes(make_model):
    """The bare network and the classifier, as the one that chats; the classifier's head stays as it is."""
    from chatglm2.modeling_chatglm import ChatGLMForSequenceClassification, ChatGLMModel

    for cls in (ChatGLMModel, ChatGLMForSequenceClassification):
        model = make_model(cls=cls)
        assert model.quantize(4) is model and model.config.quantization_bit == 4
        assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 12
        assert model(torch.tensor([[5, 6, 7]]))[0].isfinite().all()


@pytest.mark.parametrize("option", ["embedding", "output_layer"])
def test_int8_vocabulary_cannot_be_resized(make_model, option):
    """An error before anything is changed; without them in int8 both may grow."""
    model = make_model().quantize(4, **{option: True})
    with pytest.raises(ValueError, match=f"new_num_tokens=330: the {option} has 320 rows in int8.*Resize the float"):
        model.resize_token_embeddings(330)
    assert model.get_input_embeddings().num_embeddings == 320 == model.config.padded_vocab_size
    model.resize_token_embeddings(320)
    model = make_model().quantize(4)
    model.resize_token_embeddings(330)
    assert model(torch.tensor([[5, 6, 329]])).logits.shape == (1, 3, 330)


def test_quantize_0_does_nothing(make_model):
    model = make_model()
    before = {name: id(module) for name, module in model.named_modules()}
    assert model.quantize(0) is model
    assert {name: id(module) for name, module in model.named_modules()} == before and not model.config.quantization_bit


def test_quantize_is_idempotent_and_rejects_other_bits(make_model):
    model = make_model().quantize(4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layers = {name: id(layer) for name, layer in linears(model).items()}
    model.quantize(4)
    assert {name: id(layer) for name, layer in linears(model).items()} == layers
    for bits, options in ((8, {}), (4, {"group_size": 32})):
        with pytest.raises(ValueError, match="already int4 with group_size=None"):
            model.quantize(bits, **options)
    assert model.config.quantization_bit == 4
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("order", ["before", "after"])
def test_quantize_before_and_after_a_cast_are_close(make_model, order):
    ids = torch.randint(3, 320, (2, 7), generator=torch.Generator().manual_seed(0))
    want = make_model()(ids).logits
    model = make_model()
    model = model.quantize(8).bfloat16() if order == "before" else model.bfloat16().quantize(8)
    error = (model(ids).logits.float() - want).norm() / want.norm()
    assert error < 0.06


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_weight_leaves_the_model_unchanged(make_model, value):
    """All layers are checked before the first is replaced."""
    model = make_model()
    with torch.no_grad():
        model.transformer.encoder.layers[1].mlp.dense_4h_to_h.weight[3, 5] = value
    before = {name: id(module) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="layers.1.mlp.dense_4h_to_h: the weight contains nan or inf"):
        model.quantize(4, embedding=True)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(v.nan_to_num(), state[n].nan_to_num()) for n, v in model.state_dict().items())
    assert not model.config.quantization_bit and not model.config.quantization_options


@pytest.mark.parametrize("options, message", [
    ({"group_size": 64}, "dense: group_size=64 must be even and divide in_features=96"),
    ({"group_size": 64, "empty_init": True}, "dense: group_size=64 must be even and divide in_features=96"),
    ({"output_layer": True}, "output_layer: is wrapped by an adapter"),
    ({"device": "nonsense"}, "'nonsense' is not a device"),
])  # fmt: skip
def test_errors_are_found_before_the_first_layer_is_quantized(make_model, options, message):
    model = make_model(kv_channels=24)  # query_key_value has 64 inputs, dense 96
    if "output_layer" in options:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["output_layer"])).base_model.model
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        model.quantize(4, **options)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_each_layer_is_rounded_once(make_model, monkeypatch):
    rounded = []
    monkeypatch.setattr(
        quantization, "round_weight", lambda weight, *rest: rounded.append(1) or quantize_weight(weight, *rest)
    )
    make_model().quantize(4, embedding=True, output_layer=True)
    assert len(rounded) == 12 + 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_quantize_keeps_the_config_consistent(make_model, monkeypatch, tmp_path, error):
    """Ctrl-C between two layers, or no memory for the next: the model still saves, and loads into the same layers."""
    calls, make_one = iter(range(100)), QuantizedLinear.from_linear.__func__

    def from_linear(cls, *args, **kwargs):
        if next(calls) == 6:
            raise error
        return make_one(cls, *args, **kwargs)

    model = make_model()
    monkeypatch.setattr(QuantizedLinear, "from_linear", classmethod(from_linear))
    with pytest.raises(error):
        model.quantize(4)
    assert sum(isinstance(layer, QuantizedLinear) for layer in model.modules()) == 6
    assert model.config.quantization_bit == 4 and len(model.config.quantization_options["skip"]) == 6
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_unavailable_backend_changes_nothing(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu"):
        model.quantize(4, backend="triton")
    assert not any(isinstance(layer, QuantizedLinear) for layer in model.modules())
    with pytest.raises(ValueError, match="meta"), torch.device("meta"):
        make_model().to("meta").quantize(4)


def test_peak_memory_is_the_model_and_one_layer(make_model):
    """Each layer's float weight is freed before the next layer is replaced."""
    model = make_model()
    alive = [weakref.ref(layer.weight) for layer in linears(model).values()]
    left = []
    swap = nn.Module.__setattr__

    def counting(self, name, value):
        if isinstance(value, QuantizedLinear):
            left.append(sum(weight() is not None for weight in alive))
        swap(self, name, value)

    nn.Module.__setattr__ = counting
    try:
        model.quantize(4)
    finally:
        nn.Module.__setattr__ = swap
    assert left == list(range(12, 0, -1))


def test_quantize_changes_the_backend_of_quantized_layers(make_model):
    """For a loaded int4 checkpoint, whatever layout it is in. Nothing changes if the backend cannot run."""
    model, ids = make_model().quantize(4, skip="layers.2", output_layer=True), torch.tensor([[5, 6, 7]])
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    state, logits = {name: value.clone() for name, value in model.state_dict().items()}, model(ids).logits
    for backend in ("stock", "torch", "auto"):
        assert model.quantize(4, skip="layers.2", backend=backend) is model
        assert len(layers) == 9 and {layer.backend for layer in layers} == {backend}
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-3, atol=1e-3)
    model.quantize(4, skip="layers.2", backend="stock").quantize(4, skip="layers.2")
    assert {layer.backend for layer in layers} == {"stock"}  # none was asked for
    for backend in ("triton", "tritn"):
        with pytest.raises(ValueError, match=f"backend='{backend}'"):
            model.quantize(4, skip="layers.2", backend=backend)
    assert {layer.backend for layer in layers} == {"stock"} and not any(
        isinstance(layer, QuantizedLinear) for name, layer in linears(model).items() if "layers.2" in name
    )
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrong", ["dense_4h", "layers.7", ["layers.0", "dense4h_to_h"]])
def test_unknown_name_in_skip_is_an_error(make_model, wrong):
    """The error gives the name. A single name need not be in a list."""
    model = make_model()
    with pytest.raises(ValueError, match="skip='(dense_4h|layers.7|dense4h_to_h)' matches no layer"):
        model.quantize(4, skip=wrong)
    assert not any(isinstance(layer, QuantizedLinear) for layer in model.modules())
    model.quantize(4, skip="dense_4h_to_h")
    assert {name[-13:] for name, m in linears(model).items() if not isinstance(m, QuantizedLinear)} == {"dense_4h_to_h"}


def test_second_quantize_covers_skipped_layers(make_model):
    model = make_model().quantize(4, skip=["layers.0"])
    assert len(model.config.quantization_options["skip"]) == 4
    model.quantize(4)
    assert not model.config.quantization_options
    assert all(isinstance(layer, QuantizedLinear) for layer in linears(model).values())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_on_top(make_model, bits, dtype):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = make_model().to(dtype).quantize(bits)
    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=names, init_lora_weights="gaussian"))
    ids = torch.randint(3, 320, (2, 12))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 24
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_layers_inside_an_adapter_are_rejected(make_model):
    """An error, never a model of both. With int4 under the adapter, quantizing again changes nothing."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query_key_value"])
    model = peft.get_peft_model(make_model(), config)
    with pytest.raises(ValueError, match="query_key_value: is wrapped by an adapter: quantize first"):
        model.quantize(4)
    assert not any(isinstance(layer, QuantizedLinear) for layer in model.modules())
    assert not model.config.quantization_bit
    model.quantize(4, skip="query_key_value")
    assert len(model.config.quantization_options["skip"]) == 3
    model = peft.get_peft_model(make_model().quantize(4), config)
    model.quantize(4)
    assert model.config.quantization_bit == 4 and not model.config.quantization_options


@pytest.mark.parametrize("bits", [8, 4])
def test_a_prefix_trains_on_top(make_model, bits):
    model = make_model(pre_seq_len=4).quantize(bits).train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("prefix_encoder" in name for name in trained)
    ids = torch.randint(3, 320, (2, 6), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.any() for parameter in trained.values())


@pytest.mark.skipif(sys.version_info >= (3, 14) or sys.platform == "win32", reason="torch.compile is not there")
def test_quantized_block_compiles_without_graph_breaks(make_model):
    model = make_model().quantize(4)
    mlp = model.transformer.encoder.layers[0].mlp
    x = torch.randn(1, 5, 64)
    torch.testing.assert_close(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))


def test_two_imports_of_the_files_share_the_op(make_model):
    """The Hugging Face loader keeps a copy of the files for each checkpoint that it has met."""
    package = types.ModuleType("chatglm2_twin")
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["chatglm2_twin"] = package
    try:
        from chatglm2_twin import quantization as twin
        from chatglm2_twin import quantization_loading  # noqa: F401

        assert twin.QuantizedLinear is not QuantizedLinear
        model = make_model().quantize(4)
        twin.quantize(model, 4)
        assert all(type(layer) is QuantizedLinear for layer in linears(model).values())
        layer = twin.QuantizedLinear.from_linear(nn.Linear(64, 32), 4)
        assert layer(torch.randn(2, 64)).shape == (2, 32)
    finally:
        for name in [name for name in sys.modules if name.startswith("chatglm2_twin")]:
            del sys.modules[name]
        register_quantization("chatglm", ChatGLMQuantizationConfig, ChatGLMQuantizer)  # the last import counts
