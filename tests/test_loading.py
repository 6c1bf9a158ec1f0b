"""Files: what is saved comes back bit for bit, what is wrong with them is named, and Auto classes find it all."""

import json
import shutil
import sys

import pytest
import torch
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification
from chatglm2.transformers_compat import VERSION
from conftest import CODE_FILES, ROOT, TINY
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)


@pytest.fixture
def saved(make_model, tmp_path):
    """(model, folder): a small random model, saved."""
    model = make_model()
    model.save_pretrained(tmp_path / "saved", safe_serialization=True)
    return model, tmp_path / "saved"


def assert_same_weights(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# The released way: a folder with weights and these files


@pytest.fixture(scope="module")
def released_folder(tmp_path_factory):
    """The tiny checkpoint's weights with a copy of the package, laid out like a folder of the 6B weights."""
    folder = tmp_path_factory.mktemp("hub") / "chatglm2-small"
    folder.mkdir()
    for path in [*CODE_FILES, ROOT / "tokenizer_config.json", ROOT / "chat_template.jinja"]:
        shutil.copy(path, folder)
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(TINY / name, folder)
    state = {name: tensor.clone() for name, tensor in load_file(TINY / "model.safetensors").items()}
    state["transformer.rotary_pos_emb.inv_freq"] = torch.ones(8)  # released files have it; nothing needs it
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, members in shards.items():
        torch.save({name: state[name] for name in members}, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_only_the_prefix_trains_on_loaded_weights(released_folder, auto):
    """pre_seq_len at loading freezes the weights, whichever parameters the loader made; a new head trains too."""
    model = auto.from_pretrained(released_folder, trust_remote_code=True, pre_seq_len=4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("prefix_encoder" in name or "classifier" in name for name in trained)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
def test_auto_classes_load_a_released_folder(released_folder, tiny_model, auto):
    """From .bin shards with the unneeded inv_freq, trust_remote_code=True: the same weights, and they chat."""
    model = auto.from_pretrained(released_folder, trust_remote_code=True).float().eval()
    assert_same_weights(model, tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(released_folder, trust_remote_code=True)
    response, _ = model.chat(tokenizer, "你好", do_sample=False)
    assert response == "你好！我是一个很小的 ChatGLM2 演示模型，很高兴和你聊天。"


def test_auto_classes_load_the_tiny_checkpoint_through_its_links(tiny_model):
    """examples/tiny loads by the plain calls: safetensors, and code that it only links to."""
    config = AutoConfig.from_pretrained(TINY, trust_remote_code=True)
    assert (config.num_layers, config.model_type) == (4, "chatglm")
    model = AutoModel.from_pretrained(TINY, trust_remote_code=True).float()
    assert_same_weights(model, tiny_model)
    assert len(AutoTokenizer.from_pretrained(TINY, trust_remote_code=True)) == 1605


def test_released_configuration():
    """config.json at the root is the released 6B model's: 6,243,584,000 parameters, as the released files hold."""
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config_of(config))
    assert sum(p.numel() for p in model.parameters()) == 6_243_584_000
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert len(shapes) == 199  # and inv_freq
    assert shapes["transformer.encoder.layers.27.self_attention.query_key_value.weight"] == (4608, 4096)
    assert shapes["transformer.encoder.layers.0.mlp.dense_h_to_4h.weight"] == (27392, 4096)


def config_of(config):
    from chatglm2.configuration_chatglm import ChatGLMConfig

    return ChatGLMConfig(**{key: value for key, value in config.to_dict().items() if key != "model_type"})


def test_missing_classification_head_is_initialized_and_reported(released_folder):
    """Weights without a head: the classifier is new, as nn.Linear's own, and reported as missing."""
    model, report = AutoModelForSequenceClassification.from_pretrained(
        released_folder, trust_remote_code=True, num_labels=3, output_loading_info=True
    )
    assert {"classifier_head.weight", "classifier_head.bias"} <= set(report["missing_keys"])
    weight, limit = model.classifier_head.weight.float(), 256**-0.5
    assert weight.shape == (3, 256) and 0.9 * limit < weight.abs().max() <= limit * 1.001  # uniform
    assert 0 < model.classifier_head.bias.abs().max() <= limit * 1.001


def test_missing_prefix_is_initialized_and_reported(released_folder):
    """pre_seq_len on weights without a prefix: it is new, N(0, 1) and nn.Linear's own, never uninitialised memory."""
    model, report = AutoModel.from_pretrained(
        released_folder, trust_remote_code=True, pre_seq_len=7, prefix_projection=True, output_loading_info=True
    )
    missing = set(report["missing_keys"])
    assert {"transformer.prefix_encoder.embedding.weight", "transformer.prefix_encoder.trans.2.bias"} <= missing
    encoder = model.transformer.prefix_encoder
    assert 0.95 < encoder.embedding.weight.float().std() < 1.05
    for linear in (encoder.trans[0], encoder.trans[2]):
        limit = linear.in_features**-0.5
        assert 0.9 * limit < linear.weight.float().abs().max() <= limit * 1.01 and linear.bias.any()


OLD_NAME = pytest.mark.skipif("tests.tomorrow" in sys.modules, reason="AutoModel itself warns of torch_dtype")
NEW_NAME = pytest.mark.needs_transformers("4.56", "dtype= in from_pretrained")


@pytest.mark.parametrize(
    "argument", [pytest.param("torch_dtype", marks=OLD_NAME), pytest.param("dtype", marks=NEW_NAME)]
)
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_dtype_as_text(released_folder, name, argument):
    """The dtype may be a torch.dtype or its name."""
    for dtype in (name, getattr(torch, name)):
        model = AutoModel.from_pretrained(released_folder, trust_remote_code=True, **{argument: dtype})
        assert {p.dtype for p in model.parameters()} == {getattr(torch, name)}


@pytest.mark.parametrize("names", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype")], ids=" ".join)
def test_a_cast_is_saved_under_either_name(make_model, tmp_path, names):
    """Releases from 4.56 on write `dtype`, older ones `torch_dtype`: a file has one, or else the older name counts."""
    make_model().half().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    for name in ("dtype", "torch_dtype"):
        stored.pop(name, None)
    file.write_text(json.dumps({**stored, **dict(zip(names, ("float32", "float16")[-len(names) :]))}))

    def load(**how):
        model = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, **how)
        assert model.dtype == model.config.dtype == model.config.torch_dtype
        return model

    model = load()
    assert model.dtype == torch.float16
    model.bfloat16().save_pretrained(tmp_path)
    stored = json.loads(file.read_text())
    assert [stored[name] for name in ("dtype", "torch_dtype") if name in stored] == ["bfloat16"]
    assert load().dtype == load(config=ChatGLMConfig.from_pretrained(tmp_path)).dtype == torch.bfloat16


@pytest.mark.needs_transformers("4.31", "saving the code of a model along with it")
def test_code_saved_with_a_fine_tune_loads_again(released_folder, tmp_path):
    """save_pretrained of an Auto-loaded model takes the code along, so that the new folder stands alone."""
    model = AutoModel.from_pretrained(released_folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(released_folder, trust_remote_code=True)
    folder = tmp_path / "fine-tune"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert_same_weights(again, model)
    assert again.chat(AutoTokenizer.from_pretrained(folder, trust_remote_code=True), "你好", do_sample=False)[0]


# Save and reload


def test_files_that_are_written(make_model, tmp_path):
    """Those of the release: safetensors from 4.35 on, and before it the pytorch_model.bin that older scripts read."""
    model = make_model()
    model.save_pretrained(tmp_path)
    safe = VERSION >= (4, 35)
    assert (tmp_path / "model.safetensors").exists() == safe != (tmp_path / "pytorch_model.bin").exists()
    assert_same_weights(ChatGLMForConditionalGeneration.from_pretrained(tmp_path), model)


def test_reload_is_bit_equal(saved):
    """safetensors, and every value as it was."""
    model, folder = saved
    assert_same_weights(ChatGLMForConditionalGeneration.from_pretrained(folder), model)


def test_sharded_reload_is_bit_equal(make_model, tmp_path):
    """Several shards with an index."""
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="200KB", safe_serialization=True)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(ChatGLMForConditionalGeneration.from_pretrained(tmp_path), model)


def test_reload_keeps_dtype_and_config(make_model, tmp_path):
    """bfloat16 weights come back as they were with dtype "auto"; so do keys that do nothing, and unknown ones."""
    model = make_model(attention_softmax_in_fp32=False, some_tools_key=3).bfloat16()
    model.save_pretrained(tmp_path)
    again = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, torch_dtype="auto")
    assert again.dtype == torch.bfloat16
    assert_same_weights(again, model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["attention_softmax_in_fp32"] is False and config["some_tools_key"] == 3
    assert again.config.some_tools_key == 3 and config["multi_query_group_num"] == 2


def test_missing_unexpected_and_mismatched_tensors_are_reported(saved):
    """A checkpoint that does not fit says which tensor, and what is wrong with it."""
    _, folder = saved
    state = load_file(folder / "model.safetensors")
    norm = "transformer.encoder.final_layernorm.weight"
    changed = {name: tensor for name, tensor in state.items() if name != norm} | {"left.over": torch.ones(2)}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 of the model's 24 tensors: {norm}. .*strict=False"):
        ChatGLMForConditionalGeneration.from_pretrained(folder)
    model, report = ChatGLMForConditionalGeneration.from_pretrained(folder, output_loading_info=True, strict=False)
    assert set(report["missing_keys"]) == {norm} and set(report["unexpected_keys"]) == {"left.over"}
    assert torch.equal(model.transformer.encoder.final_layernorm.weight, torch.ones(64))
    state[norm] = torch.ones(32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match="(?s)final_layernorm.weight|size mismatch|mismatched"):
        ChatGLMForConditionalGeneration.from_pretrained(folder)


def test_weights_of_another_shape_are_rejected(saved):
    """The wrong config beside the weights: an error, not a model of random values."""
    _, folder = saved
    edit_config(folder, hidden_size=32)
    message = r"word_embeddings.weight has shape \[320, 64\], but by config.json \[320, 32\]"
    with pytest.raises(RuntimeError, match=message):
        ChatGLMForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("where", ["config.json", "argument"])
def test_float_weights_under_a_quantized_config_are_rejected(saved, bits, where):
    """quantization_bit beside a float checkpoint: an error with the cure, never weights of zeros; and it cures."""
    model, folder = saved
    asked = {"quantization_bit": bits} if where == "argument" else {}
    if where == "config.json":
        edit_config(folder, quantization_bit=bits)
    with pytest.raises(ValueError, match=rf"quantization_bit={bits} needs int{bits} weights.*quantization_bit=0"):
        ChatGLMForConditionalGeneration.from_pretrained(folder, **asked)
    cured = ChatGLMForConditionalGeneration.from_pretrained(folder, quantization_bit=0).quantize(bits)
    assert_same_weights(cured, model.quantize(bits))


def test_one_missing_scale_is_an_error(saved):
    """A quantized checkpoint without the scale of one layer names it."""
    model, folder = saved
    model.quantize(8).save_pretrained(folder, safe_serialization=True)
    state, name = load_file(folder / "model.safetensors"), "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight_scale"
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"no {name}"):
        ChatGLMForConditionalGeneration.from_pretrained(folder)


def test_folder_without_a_tokenizer_model_is_named(released_folder, tmp_path):
    """AutoTokenizer on a folder without tokenizer.model, or with one cut short, says so."""
    folder = tmp_path / "no-tokenizer"
    shutil.copytree(released_folder, folder, ignore=shutil.ignore_patterns("*.bin", "*.index.json"))
    (folder / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes()[:700])
    with pytest.raises(ValueError, match=r"tokenizer.model \(700 bytes\) is not a SentencePiece model"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="tokenizer.model is missing"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_classifier_reloads(make_model, tmp_path):
    """The classification head is saved under classifier_head, and comes back."""
    model = make_model(cls=ChatGLMForSequenceClassification, num_labels=4)
    model.save_pretrained(tmp_path, safe_serialization=True)
    assert "classifier_head.weight" in load_file(tmp_path / "model.safetensors")
    again = ChatGLMForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 4
    assert_same_weights(again, model)
