"""checkpoint_chatglm: each file that is damaged and each tensor that cannot be right is one error, never an answer."""

import json
import shutil
from unittest import mock

import options
import pytest
import torch
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification, ChatGLMModel
from conftest import CODE_FILES, TINY
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

NORM = "transformer.encoder.final_layernorm.weight"
LAYER = "transformer.encoder.layers.1.mlp.dense_4h_to_h"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1980000000\n"
KINDS = ["safetensors", "sharded safetensors", "bin", "sharded bin", "old bin"]


def write(model, folder, kind="safetensors", change=None):
    """Save `model` in files of `kind` ("old": by torch before 1.6); `change` gets the tensors before."""
    model.save_pretrained(folder, safe_serialization=True)
    state = load_file(folder / "model.safetensors")
    if change is not None:
        change(state)
    (folder / "model.safetensors").unlink()
    zipped, single, kind = not kind.startswith("old"), not kind.startswith("sharded"), kind.split(" ")[-1]
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    names = sorted(state)
    shards = {f"{stem}-0000{i + 1}-of-00002.{kind}": names[i::2] for i in (0, 1)}
    if single:
        shards = {f"{stem}.{kind}": names}
    for shard, members in shards.items():
        part = {name: state[name] for name in members}
        if kind == "bin":
            torch.save(part, folder / shard, _use_new_zipfile_serialization=zipped)
        else:
            save_file(part, folder / shard, metadata={"format": "pt"})
    if not single:
        index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def assert_same_weights(got, want):
    got, want = got.state_dict(), want.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def refuses(folder, message, cls=ChatGLMForConditionalGeneration, **options):
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(folder, **options)


# ---- what the tensors are -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (8, {}),
        (4, {}),
        (4, {"group_size": 16, "skip": ["layers.0.self_attention"], "embedding": True}),
        (8, {"embedding": True, "output_layer": True}),
    ],
    ids=str,
)
def test_quantized_weights_load_without_a_word_in_the_config(make_model, tmp_path, bits, options, kind):
    """config.json of the float model beside int8 or int4 weights: the scales say what they are."""
    model = make_model().quantize(bits, **options)
    folder = write(model, tmp_path, kind)
    edit_config(folder, quantization_bit=None, quantization_options=None)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(folder)
    assert_same_weights(loaded, model)
    assert loaded.config.quantization_bit == bits
    assert loaded.config.quantization_options == model.config.quantization_options
    config = type(model.config).from_pretrained(folder)
    assert_same_weights(ChatGLMForConditionalGeneration.from_pretrained(folder, config=config), model)
    assert config.quantization_bit == 0  # the caller's is not modified


@pytest.mark.parametrize(("bits", "asked"), [(8, 4), (4, 8)])
def test_other_bits_than_the_weights_have(make_model, tmp_path, bits, asked):
    folder = write(make_model().quantize(bits), tmp_path)
    message = f"quantization_bit={asked}, but .*model.safetensors has int{bits} weights: set quantization_bit to {bits}"
    refuses(folder, message, quantization_bit=asked)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.uint8, torch.int64])
def test_weights_of_a_dtype_that_no_weight_has(make_model, tmp_path, dtype, kind):
    """transformers casts them to floats without a word."""

    def change(state):
        state[f"{LAYER}.weight"] = state[f"{LAYER}.weight"].to(dtype)

    name = str(dtype)[len("torch.") :]
    refuses(write(make_model(), tmp_path, kind, change), rf"model\.{kind}: {LAYER}.weight is {name}[,.]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(f"{LAYER}.weight"), f"{LAYER}.weight is missing"),
        (lambda state: state.update({f"{LAYER}.weight": torch.ones(64, 96)}), "weight is float32. It must be int8, as"),
        (
            lambda state: state.update({f"{LAYER}.weight": torch.ones(64, 7, dtype=torch.int8)}),
            r"int8 \[64, 7\], which",
        ),
        (lambda state: state.update({f"{LAYER}.weight_scale": torch.ones(64).int()}), "weight_scale is int32. It must"),
        (lambda state: state.update({f"{LAYER}.weight": torch.ones(64, 48, dtype=torch.int8)}), "int8 and int4 layers"),
    ],
)
def test_damaged_quantized_weights(make_model, tmp_path, change, message):
    refuses(write(make_model().quantize(8), tmp_path, change=change), message)


# ---- missing tensors, and those of another model --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("cls", [ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification, ChatGLMModel])
def test_missing_weights_are_an_error(make_model, tmp_path, kind, cls):
    """Their names, and strict=False as the way to random values. A new classifier is not missing."""
    folder = write(make_model(), tmp_path, kind, lambda state: state.pop(NORM))
    refuses(folder, r"lacks 1 of the model's \d+ tensors: (transformer\.)?encoder.final_layernorm.weight\. .*", cls)
    model = cls.from_pretrained(folder, strict=False)
    assert torch.equal(model.base_model.encoder.final_layernorm.weight, torch.ones(64))


def test_many_missing_weights_are_shortened(make_model, tmp_path):
    def change(state):
        for name in [name for name in state if ".layers." in name]:
            del state[name]

    refuses(write(make_model(), tmp_path, change=change), r"lacks 21 .*: (transformer\S+, ){2}\S+ and 18 more\. Give")


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"device_map": {"": "cpu"}}], ids=str)
def test_missing_weights_however_they_are_loaded(make_model, tmp_path, options):
    pytest.importorskip("accelerate")
    refuses(write(make_model(), tmp_path, change=lambda state: state.pop(NORM)), NORM, **options)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_auto_classes_pass_strict(make_model, tmp_path, auto):
    folder = write(make_model(), tmp_path, change=lambda state: state.pop(NORM))
    for path in CODE_FILES:
        shutil.copy(path, folder)
    edit_config(folder, auto_map=json.loads((TINY / "config.json").read_text())["auto_map"])
    with pytest.raises(ValueError, match=NORM):
        auto.from_pretrained(folder, trust_remote_code=True)
    auto.from_pretrained(folder, trust_remote_code=True, strict=False)


def test_half_of_a_prefix_or_of_a_classifier_is_missing(make_model, tmp_path):
    """What training adds is new as a whole, or not at all."""
    changes = {"pre_seq_len": 4, "prefix_projection": True}
    prefix = "transformer.prefix_encoder.trans.0.bias"
    folder = write(make_model(**changes), tmp_path / "prefix", change=lambda state: state.pop(prefix))
    refuses(folder, prefix)
    model = make_model(cls=ChatGLMForSequenceClassification)
    folder = write(model, tmp_path / "classifier", change=lambda state: state.pop("classifier_head.bias"))
    refuses(folder, "classifier_head.bias", ChatGLMForSequenceClassification)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_layers": 2}, "layers.2."),
        ({"add_qkv_bias": False}, "query_key_value.bias"),
        ({"pre_seq_len": 0}, "prefix"),
    ],
)
def test_weights_without_a_place_are_an_error(make_model, tmp_path, changes, name):
    """A config that is not theirs would drop layers, biases or the prefix and answer nevertheless."""
    folder = write(make_model(**dict.fromkeys(changes.keys() & {"pre_seq_len"}, 4)), tmp_path)
    edit_config(folder, **changes)
    refuses(folder, f"that the model of its config.json lacks: .*{name}")
    ChatGLMForConditionalGeneration.from_pretrained(folder, strict=False)


def test_published_p_tuning_calls(make_model, tmp_path):
    """Base weights with pre_seq_len, then the prefix alone from pytorch_model.bin by load_state_dict."""
    folder = write(make_model(), tmp_path / "base")
    tuned = make_model(pre_seq_len=4, seed=1)
    torch.save(
        {name: value for name, value in tuned.state_dict().items() if "prefix_encoder" in name},
        tmp_path / "pytorch_model.bin",
    )
    config = type(tuned.config).from_pretrained(folder)
    config.pre_seq_len = 4
    model = ChatGLMForConditionalGeneration.from_pretrained(folder, config=config)
    prefix = torch.load(tmp_path / "pytorch_model.bin")
    prefix = {name[len("transformer.prefix_encoder.") :]: value for name, value in prefix.items()}
    model.transformer.prefix_encoder.load_state_dict(prefix)
    shutil.copy(folder / "config.json", tmp_path)
    refuses(tmp_path, "P-Tuning prefixes are loaded on top")


def test_state_dict_is_given(make_model, tmp_path):
    """Weights from memory: what they lack is an error, too."""
    model = make_model()
    state = model.state_dict()
    loaded = ChatGLMForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=state)
    assert_same_weights(loaded, model)
    del state[NORM]
    refuses(None, NORM, config=model.config, state_dict=state)


# ---- damaged files --------------------------------------------------------------------------------------------------


def files_of(folder):
    return sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rest", [0, 1, 7, 30, 0.5, -1])
def test_truncated_weights(make_model, tmp_path, kind, rest):
    """Cut anywhere: the error names the file and its size."""
    path = files_of(write(make_model(), tmp_path, kind))[-1]
    data = path.read_bytes()
    data = data[: int(rest * len(data)) if rest == 0.5 else rest]
    path.write_bytes(data)
    refuses(tmp_path, rf"{path.name} has {len(data):,} bytes and .* incomplete or damaged. Download the file again")


@pytest.mark.parametrize("kind", KINDS[:4])
def test_git_lfs_pointers(make_model, tmp_path, kind):
    path = files_of(write(make_model(), tmp_path, kind))[-1]
    path.write_bytes(POINTER)
    refuses(tmp_path, f"{path.name} is a Git LFS pointer in place of the file: run `git lfs pull` in {tmp_path}")


def test_file_that_would_run_code(make_model, tmp_path):
    """A pickle of more than tensors is not loaded, and nobody is told to load it anyway."""
    path = files_of(write(make_model(), tmp_path, "bin"))[0]
    torch.save({"a.weight": torch.ones(2), "b": print}, path)
    with pytest.raises(ValueError, match="cannot be read as a file of tensors") as raised:
        ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert "weights_only" not in str(raised.value)


@pytest.mark.parametrize("kind", ["sharded safetensors", "sharded bin"])
def test_damaged_index(make_model, tmp_path, kind):
    write(make_model(), tmp_path, kind)
    (index,) = tmp_path.glob("*.index.json")
    text = index.read_text()
    for damaged, message in [
        (text[: len(text) // 2], r"has [\d,]+ bytes and is not valid JSON .*Download the file again"),
        ("", "has 0 bytes and is not valid JSON"),
        (POINTER.decode(), "is a Git LFS pointer"),
        ("[1]", "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "has no weight_map"),
    ]:
        index.write_text(damaged)
        refuses(tmp_path, f"{index.name} {message}")


@pytest.mark.parametrize("kind", ["sharded safetensors", "sharded bin"])
def test_index_of_absent_files(make_model, tmp_path, kind):
    path = files_of(write(make_model(), tmp_path, kind))[-1]
    path.unlink()
    refuses(tmp_path, f"index.json names {path.name}, which cannot be found. Download the missing files")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("data", [b"", b'{"eos_token_id": ', b"\xff\xfe{}", POINTER])
def test_damaged_json(make_model, tmp_path, name, data):
    """transformers goes on without generation_config.json. (It reads config.json itself in the Auto classes.)"""
    path = write(make_model(), tmp_path) / name
    path.write_bytes(data)
    what = "is a Git LFS pointer" if data == POINTER else f"has {len(data)} bytes and is not valid JSON.*Download"
    refuses(tmp_path, f"[/_]{name} {what}")


def test_only_the_files_that_are_loaded_are_read(make_model, tmp_path):
    """use_safetensors and variant choose as in transformers."""
    model = make_model()
    write(model, tmp_path, "bin")
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    assert_same_weights(ChatGLMForConditionalGeneration.from_pretrained(tmp_path, use_safetensors=False), model)
    refuses(tmp_path, "model.safetensors is a Git LFS pointer")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model.fp16.bin")
    options = {"use_safetensors": False, "variant": "fp16"}
    assert_same_weights(ChatGLMForConditionalGeneration.from_pretrained(tmp_path, **options), model)
    (tmp_path / "pytorch_model.fp16.bin").write_bytes(POINTER)
    refuses(tmp_path, "pytorch_model.fp16.bin is a Git LFS pointer", **options)


# ---- the demos and the evaluation -----------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path, monkeypatch):
    """What a demo or the evaluation loads, or the message that it ends with; the tiny checkpoint's tokenizer."""
    monkeypatch.setattr(options, "logging", mock.Mock())  # it would silence the tests after this one, too
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)

    def load(*arguments):
        args = options.model_parser("").parse_args(["--model", str(tmp_path), "--device", "cpu", *arguments])
        try:
            return options.load_or_exit(args)
        except SystemExit as exit:
            return exit.code

    return load


@pytest.mark.parametrize("bits", [8, 4])
def test_demos_load_quantized_weights_of_a_float_config(make_model, tmp_path, start, bits):
    folder = write(make_model().quantize(bits), tmp_path)
    edit_config(folder, quantization_bit=None)
    model, _ = start()
    assert model.config.quantization_bit == bits and model.dtype == torch.bfloat16


def test_demos_end_at_missing_and_damaged_weights(make_model, tmp_path, start):
    write(make_model(), tmp_path, change=lambda state: state.pop(NORM))
    assert f"lacks 1 of the model's 24 tensors: {NORM}" in start()
    for name in ("model.safetensors", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes(POINTER)
        assert f"{name} is a Git LFS pointer" in start()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "adapter_model.safetensors"])
def test_demos_end_at_a_damaged_prefix_or_adapter(make_model, tmp_path, start, name):
    pytest.importorskip("peft" if "adapter" in name else "torch")
    write(make_model(), tmp_path)
    trained = tmp_path / "trained"
    trained.mkdir()
    (trained / name).write_bytes(POINTER)
    if "adapter" in name:
        (trained / "adapter_config.json").write_text("{}")
    assert f"{name} is a Git LFS pointer" in start("--checkpoint", str(trained))
