"""Saving and loading quantized models, quantizing while loading, and offloading."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from chatglm2 import quantization_loading
from chatglm2.quantization import QuantizedLinear
from chatglm2.quantization_loading import ChatGLMQuantizationConfig
from chatglm2.transformers_compat import DTYPE
from quantization_helpers import CPU, linears, needs_compiled
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group_size": 32},
        {"skip": ["dense_4h_to_h", "layers.2"]},
        {"embedding": True, "output_layer": True},
        {"group_size": 16, "skip": ["layers.0.self_attention"], "embedding": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [8, 4])
def test_save_and_reload_are_bit_equal(make_model, tmp_path, bits, options):
    model = make_model().half().quantize(bits, **options)
    ids = torch.randint(3, 320, (2, 7), generator=torch.Generator().manual_seed(0))
    logits = model(ids).logits
    left = [n for n, m in linears(model).items() if not isinstance(m, QuantizedLinear)]
    assert len(left) == {2: 6, 1: 2, 0: 0}[len(options.get("skip", []))]
    model.save_pretrained(tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_bit"] == bits
    state = load_file(tmp_path / "model.safetensors")
    assert state["transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"].dtype == torch.int8
    other = type(model).from_pretrained(tmp_path).half().eval()
    assert torch.equal(other(ids).logits, logits)
    for (name, value), (other_name, other_value) in zip(model.state_dict().items(), other.state_dict().items()):
        assert name == other_name and torch.equal(value, other_value) and value.dtype == other_value.dtype
    other.quantize(bits, **options)  # what many scripts do with a quantized checkpoint
    assert torch.equal(other(ids).logits, logits)


def test_a_released_checkpoint_loads(make_model, tmp_path):
    """Released int4: torch .bin, float16 scales, `quantization_bit` in the config, and an inv_freq nobody needs."""
    model = make_model().half().quantize(4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["transformer.rotary_pos_emb.inv_freq"] = torch.zeros(4, dtype=torch.float16)
    model.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(other.half()(ids).logits, model(ids).logits)
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    other = type(model).from_pretrained(tmp_path)
    assert torch.equal(other.half()(ids).logits, model(ids).logits)


@pytest.mark.needs_transformers("4.55.0", "quantizers that round while loading, as they are today")
@pytest.mark.parametrize(
    "bits, options", [(8, {}), (4, {}), (4, {"group_size": 32, "skip": ["layers.0"], "embedding": True})]
)
def test_quantizing_while_loading_matches_quantize(make_model, tmp_path, bits, options):
    model = make_model().half()
    model.save_pretrained(tmp_path)
    model.quantize(bits, **options)
    config = ChatGLMQuantizationConfig(bits, **options)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config, **{DTYPE: torch.float16})
    state = model.state_dict()
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.config.quantization_bit == bits and not hasattr(loaded.config, "quantization_config")
    assert not any(p.requires_grad for m in loaded.modules() if hasattr(m, "weight_scale") for p in m.parameters())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again", quantization_config=config, **{DTYPE: torch.float16})
    assert torch.equal(again(ids).logits, model(ids).logits)
    loaded.half().float()  # transformers refuses to cast models that it holds for quantized


@pytest.mark.needs_transformers("4.55.0", "quantizers that round while loading, as they are today")
def test_unavailable_backend_while_loading(make_model, tmp_path):
    """With a device_map the device is known, and refused at once; without one, .cuda() may come."""
    pytest.importorskip("accelerate")
    model = make_model()
    model.save_pretrained(tmp_path)
    config = {"quant_method": "chatglm", "bits": 4, "backend": "triton", "skip": "dense"}
    with pytest.raises(ValueError, match="backend='triton' cannot run on cpu"):
        type(model).from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    assert {getattr(layer, "backend", "float") for layer in linears(loaded).values()} == {"triton", "float"}


@pytest.mark.needs_transformers("4.55.0", "quantizers that round while loading, as they are today")
@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_more_layers_of_a_quantized_checkpoint_while_loading(make_model, tmp_path, bits):
    """Its int8 and int4 layers load as they are; the float embedding and output layer are rounded, not truncated."""
    more = {"embedding": True, "output_layer": True}
    model = make_model().quantize(bits)
    model.save_pretrained(tmp_path)
    model.quantize(bits, **more)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=ChatGLMQuantizationConfig(bits, **more))
    assert loaded.config.quantization_options == more
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.needs_transformers("4.55.0", "quantizers that round while loading, as they are today")
def test_quantizing_while_loading_names_the_invalid_layer(make_model, tmp_path):
    with pytest.raises(ValueError, match="bits=5"):
        ChatGLMQuantizationConfig(5)
    with pytest.raises(ValueError, match="backend='tritn'"):
        ChatGLMQuantizationConfig(4, backend="tritn")
    with pytest.raises(ValueError, match="does not support groupsize: give bits, group_size"):
        ChatGLMQuantizationConfig(4, groupsize=32)
    model = make_model().quantize(8)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already int8"):
        type(model).from_pretrained(tmp_path, quantization_config=ChatGLMQuantizationConfig(4))


@needs_compiled
@pytest.mark.parametrize("bits", [8, 4])
def test_loading_lays_the_weights_out(make_model, tmp_path, monkeypatch, bits):
    """No forward has to; a cast of the scales keeps the layout, in place, and the state dict is that of the file."""
    model = make_model().quantize(bits)
    model.save_pretrained(tmp_path, safe_serialization=True)
    loaded = type(model).from_pretrained(tmp_path)
    layers = [layer for layer in loaded.modules() if isinstance(layer, QuantizedLinear)]
    weights = [layer.weight for layer in layers]
    assert len(layers) == 12 and all(layer._weights.layout == "cpu" for layer in layers)
    loaded.half().to("cpu").eval()(torch.tensor([[5, 6, 7]]))
    assert all(layer.weight.data_ptr() == weight.data_ptr() for layer, weight in zip(layers, weights))
    assert layers[0].weight_scale.dtype == torch.float16
    stored, state = load_file(tmp_path / "model.safetensors"), loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in stored.items() if value.dtype == torch.int8)
    monkeypatch.setattr(quantization_loading, "has_accelerator", lambda: True)  # the model is likely to be moved there
    loaded = type(model).from_pretrained(tmp_path)
    assert not any(layer._weights.layout for layer in loaded.modules() if isinstance(layer, QuantizedLinear))


@needs_compiled
def test_what_writes_to_a_weight_gets_the_released_packing(make_model):
    """_apply with a function that writes in place, or makes another tensor."""
    layer, x = QuantizedLinear.from_linear(torch.nn.Linear(64, 64), 4), torch.ones(1, 64)
    for change in (torch.zero_, lambda tensor: torch.zeros_like(tensor)):
        layer(x)
        layer._apply(change)
        assert layer.weight.shape == (64, 32) and not layer(x).any()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/pagemap is Linux'")
def test_a_weight_that_was_laid_out_is_unmapped(tmp_path):
    """Its pages leave the process, but not the file cache. What this process has written stays."""
    values, file = torch.arange(1 << 23, dtype=torch.int32), tmp_path / "weights"
    file.write_bytes(values.numpy().tobytes())
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())  # a page that is still to be written could not leave the cache
    mapped, written = (torch.from_file(str(file), False, len(values), dtype=torch.int32) for _ in range(2))
    other = values.clone()
    mapped.sum()
    before = resident("RssFile")
    written[5000] = -1
    for weight in (mapped, written, other):
        quantization_loading.release_pages(weight)
    assert before - resident("RssFile") > 0.8 * values.nbytes  # code that it runs is mapped, too
    with open(file, "rb") as opened:
        try:  # read what is in the cache, or nothing
            assert os.preadv(opened.fileno(), [bytearray(values.nbytes)], 0, os.RWF_NOWAIT) == values.nbytes
        except OSError as error:
            assert error.errno == errno.EOPNOTSUPP  # a file system without
    assert torch.equal(mapped, values) and torch.equal(other, values) and written[5000] == -1


def resident(kind):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind + ":"))


def test_offloaded_layers_compute_the_same(make_model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = make_model().quantize(4)
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = model(ids).logits  # converts the weights: they must be converted back before they are moved
    accelerate.disk_offload(model, tmp_path, execution_device=CPU)
    assert linears(model)["transformer.encoder.layers.0.mlp.dense_h_to_4h"].weight.device.type == "meta"
    for _ in range(2):
        torch.testing.assert_close(model(ids).logits, logits)
