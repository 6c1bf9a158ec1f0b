"""export/compressed_weights.py: int8 and int4 leave as the same integers and scales, in formats that others read."""

import json
import shutil

import pytest
import torch
from chatglm2.quantization_format import dequantize_weight
from conftest import TINY
from safetensors.torch import load_file

pytestmark = pytest.mark.needs_transformers("4.46", "GlmForCausalLM")

CASES = {
    "int4": ({"bits": 4}, None),
    "int4-groups": ({"bits": 4, "group_size": 32}, None),
    "int8": ({"bits": 8}, None),
    "int8-weights": ({"bits": 8}, "pack-quantized"),
    "int8-groups": ({"bits": 8, "group_size": 64}, "pack-quantized"),
}


@pytest.fixture
def quantized(make_model):
    """A function of quantize()'s options: a small model whose sizes vLLM takes, in float16."""
    sizes = {"hidden_size": 64, "ffn_hidden_size": 192, "kv_channels": 16, "padded_vocab_size": 1664}
    return lambda bits, **options: make_model(**sizes).half().quantize(bits, backend="torch", **options)


@pytest.fixture
def export(tmp_path):
    """A function of a model: (folder of its export, ...) by way of a folder of its own."""
    import to_glm

    def run(model, form=None, **options):
        source, target = tmp_path / "source", tmp_path / "glm"
        model.save_pretrained(source)
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(TINY / file, source)
        to_glm.export(source, target, form=form, **options)
        return target

    return run


def restored(tensors, name, bits):
    """The weight `name` [out, in] of a folder, by the description of the formats."""
    scale = tensors[f"{name}.weight_scale"]
    if f"{name}.weight" in tensors:
        q = tensors[f"{name}.weight"].int()
    else:
        words, (out, columns) = tensors[f"{name}.weight_packed"].long() & 0xFFFFFFFF, tensors[f"{name}.weight_shape"]
        q = torch.stack([(words >> shift & (1 << bits) - 1) - (1 << bits - 1) for shift in range(0, 32, bits)], dim=-1)
        q = q.flatten(1)
        assert q.shape == (out, columns)
    return (q.unflatten(1, (scale.shape[1], -1)).to(scale.dtype) * scale[..., None]).flatten(1)


@pytest.mark.parametrize("case", CASES)
def test_every_weight_is_the_same(quantized, export, case):
    """Each q * scale has the bits of this package's; q, k and v are their rows of query_key_value."""
    options, form = CASES[case]
    model = quantized(**options)
    tensors = load_file(export(model, form) / "model.safetensors")
    for i, block in enumerate(model.transformer.encoder.layers):
        layers = {"self_attn.o_proj": block.self_attention.dense, "mlp.down_proj": block.mlp.dense_4h_to_h}
        layers["mlp.gate_up_proj"] = block.mlp.dense_h_to_4h
        want = {name: dequantize_weight(layer.weight, layer.weight_scale, layer.bits) for name, layer in layers.items()}
        fused = block.self_attention.query_key_value
        rows = dequantize_weight(fused.weight, fused.weight_scale, fused.bits).split([64, 32, 32])
        want.update(zip([f"self_attn.{letter}_proj" for letter in "qkv"], rows))
        for name, weight in want.items():
            assert torch.equal(restored(tensors, f"model.layers.{i}.{name}", options["bits"]), weight), name
            assert tensors[f"model.layers.{i}.{name}.weight_scale"].dtype == torch.float16


def test_what_is_not_quantized_is_named(quantized, export):
    """A skipped layer is float and in `ignore`, like the output layer; int8 embedding and output layer are restored."""
    model = quantized(4, skip="layers.1.mlp", embedding=True, output_layer=True)
    folder = export(model)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    skipped = [f"model.layers.1.mlp.{name}" for name in ("gate_up_proj", "down_proj")]
    assert sorted(config["ignore"]) == sorted(["lm_head", *skipped]) and config["format"] == "pack-quantized"
    tensors, head = load_file(folder / "model.safetensors"), model.transformer.output_layer
    assert torch.equal(tensors["lm_head.weight"], dequantize_weight(head.weight, head.weight_scale, 8))
    assert tensors[f"{skipped[0]}.weight"].dtype == tensors["model.embed_tokens.weight"].dtype == torch.float16


def test_shards(quantized, export):
    """Tensors in several files, each once, as the index says."""
    folder = export(quantized(4), max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
    assert found == index and len(set(found.values())) > 3


@pytest.mark.parametrize(
    ("changes", "options", "form", "message"),
    [
        ({}, {}, "int-quantized", "quantization_bit=4 cannot be written as int-quantized: give pack-quantized, float"),
        ({}, {"bits": 0}, "pack-quantized", "quantization_bit=0 cannot be written as pack-quantized: give float"),
        (
            {},
            {"bits": 8, "group_size": 32},
            None,
            "group_size=32: int-quantized has one scale per row. Give pack",
        ),
        ({}, {"group_size": 16}, None, "group_size=16: vLLM multiplies groups of 32, 64 or 128. Give float"),
        ({"ffn_hidden_size": 100}, {}, None, "ffn_hidden_size=100: vLLM multiplies multiples of 32. Give float"),
        ({"kv_channels": 20, "hidden_size": 80}, {}, None, "(?s)hidden_size=80.*kv_channels . num_key_value_heads=40"),
    ],
)
def test_what_cannot_be_written_is_refused(make_model, export, tmp_path, changes, options, form, message):
    """By value and cure, and before anything is written."""
    model = make_model(padded_vocab_size=1664, **changes).quantize(**{"bits": 4, "backend": "torch", **options})
    with pytest.raises(ValueError, match=message):
        export(model, form)
    assert not (tmp_path / "glm").exists()
