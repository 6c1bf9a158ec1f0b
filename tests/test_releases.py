"""What broke ChatGLM2 on one release of transformers or another, each test named for the error that users met.

They run on every release: whatever broke once, on whichever release, must hold on all. `python tests/test_releases.py`
writes golden/releases.json anew, which holds the figures that all releases must agree on.
"""

import json
import shutil
import sys

import conftest
import pytest
import torch
import transformers
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification
from chatglm2.transformers_compat import attention_name
from conftest import CODE_FILES, ROOT, SMALL, TINY
from formula import formula_tensor
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

GOLDEN = ROOT / "tests" / "golden" / "releases.json"
REMOTE = {"trust_remote_code": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder as it is downloaded: the code, a small checkpoint, a tokenizer."""
    folder = tmp_path_factory.mktemp("releases") / "small_chatglm2"
    torch.manual_seed(0)
    # `SMALL` has fewer rows than the tokenizer has ids, and every id must have a row
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**{**SMALL, "padded_vocab_size": 1664}))
    model.save_pretrained(folder)
    for path in [*CODE_FILES, ROOT / "chat_template.jinja", ROOT / "tokenizer_config.json", TINY / "tokenizer.model"]:
        shutil.copy(path, folder)
    released = json.loads((ROOT / "config.json").read_text())
    edit_config(folder, auto_map=released["auto_map"], torch_dtype="float16")
    return folder


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    config.pop("dtype", None)
    path.write_text(json.dumps(config))


def copy_of(folder, tmp_path, state=None):
    """Another folder with the same files, and with the weights `state` in place of its own."""
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    for path in [*copy.glob("*.bin"), *copy.glob("*.safetensors")] if state is not None else []:
        path.unlink()
    if state is not None:
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def load(folder, auto=AutoModel, **kwargs):
    return auto.from_pretrained(folder, **REMOTE, **kwargs).eval()


def stored(folder):
    """The tensors of the folder's one file of weights."""
    (path,) = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model.bin")]
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def batch():
    """ids [2, 7], the second row padded on the left, and their mask."""
    ids = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :3], ids[1, :3] = 0, 0
    return ids, mask


# Tokenizer


def test_eos_token_has_no_setter(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, **REMOTE)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 0)


def test_no_attribute_tokenizer_at_load(folder, tmp_path):
    """transformers asks for the vocabulary while its own constructor runs."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **REMOTE)
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("你好")["input_ids"] == tokenizer("你好")["input_ids"]
    assert again.get_vocab() == tokenizer.get_vocab()


def test_pad_got_an_unexpected_keyword_argument_padding_side(tokenizer):
    padded = tokenizer(["你好", "请用一句话介绍北京"], padding=True, return_tensors="pt")
    assert padded["input_ids"][0, 0] == tokenizer.pad_token_id
    assert padded["attention_mask"][0, 0] == 0 and padded["position_ids"][0, 0] == 0
    assert tokenizer.pad([{"input_ids": [5]}, {"input_ids": [6, 7]}])["input_ids"] == [[0, 5], [6, 7]]


def test_len_of_the_tokenizer_is_wrong(tokenizer):
    """From 4.36 on len(tokenizer) counts the vocabulary's distinct names; resize_token_embeddings is given it."""
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab())


def test_vocabulary_with_ids_collapsed_onto_nothing(tokenizer):
    vocabulary = tokenizer.get_vocab()
    assert "" not in vocabulary
    assert sorted(vocabulary.values()) == list(range(tokenizer.vocab_size))


# Configuration


@pytest.mark.parametrize("name", ["max_length", "num_hidden_layers", "use_cache"])
def test_config_has_no_attribute(folder, name):
    """`generate` and the caches read these, from the object, from the class, or from what to_dict saved."""
    config = AutoConfig.from_pretrained(folder, **REMOTE)
    if name == "max_length":  # 5.x keeps it elsewhere
        model = AutoModel.from_config(config, **REMOTE)
        assert model.generate(torch.tensor([[64, 65]]), do_sample=False, eos_token_id=None).shape[1] in (20, 22)
    else:
        wanted = {"num_hidden_layers": 3, "use_cache": True}[name]
        assert getattr(config, name) == wanted
        assert config.to_dict()[{"num_hidden_layers": "num_layers"}.get(name, name)] == wanted


# Generation: what the original's copy of the loop called, and one release after the other removed


def streamed(model, ids, mask, **kwargs):
    *_, last = model.stream_generate(ids, attention_mask=mask, max_new_tokens=6, **kwargs)
    return last


def test_unexpected_keyword_argument_standardize_cache_format(make_model):
    """Every step hands its cache to the next one."""
    model, (ids, mask) = make_model(), batch()
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(streamed(model, ids, mask, do_sample=False), whole)


def test_no_attribute_extract_past_from_model_output(make_model):
    """The caller gets the cache of all tokens but the last, which no step has read."""
    model, (ids, mask) = make_model(), batch()
    settings = {"max_new_tokens": 3, "do_sample": False, "return_past_key_values": True}
    *_, (last, cache) = model.stream_generate(ids, attention_mask=mask, **settings)
    assert cache.get_seq_length() == last.shape[1] - 1


def test_get_logits_warper_missing_device(make_model):
    """Sampling, with warpers: top_k=1 leaves greedy's token alone."""
    model, (ids, mask) = make_model(), batch()
    greedy = streamed(model, ids, mask, do_sample=False)
    assert torch.equal(streamed(model, ids, mask, do_sample=True, top_p=0.8, temperature=0.8, top_k=1), greedy)


def test_no_attribute_eos_token_tensor(make_model):
    """Two eos ids, rows that end at different steps; those that have ended are padded."""
    model, (ids, mask) = make_model(), batch()
    free = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ends = [free[0, 7].item(), free[1, 9].item()]
    last = streamed(model, ids, mask, do_sample=False, eos_token_id=ends, pad_token_id=0)
    assert last[0, 7] == ends[0] and (last[0, 8:] == 0).all()
    assert last.shape[1] <= 10


def test_no_attribute_generate(folder):
    """From 4.50 on PreTrainedModel has no `generate`; from 5.23 on it does not get one from the loader either."""
    for auto in (AutoModel, AutoModelForCausalLM):
        model = load(folder, auto).float()
        assert model.can_generate()
        ids, mask = batch()
        greedy = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        beams = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, num_beams=3)
        assert greedy.shape[0] == beams.shape[0] == 2


# Loading


def test_no_attribute_all_tied_weights_keys(folder, tmp_path):
    """A checkpoint loads, is saved and loads again: whole, in shards, and in a pickled file."""
    model = load(folder)
    wanted = stored(folder)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    pickled = copy_of(folder, tmp_path)
    for path in [*pickled.glob("*.safetensors"), *pickled.glob("*.bin")]:
        path.unlink()
    torch.save(wanted, pickled / "pytorch_model.bin")
    assert len([*(tmp_path / "shards").glob("*-of-*")]) > 1
    for saved in (tmp_path / "whole", tmp_path / "shards", pickled):
        again = ChatGLMForConditionalGeneration.from_pretrained(saved)
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, wanted[name].to(tensor.dtype)), (saved.name, name)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_argument_dtype_must_be_torch_dtype_not_str(folder, name):
    """By the new and by the old keyword, as text and as a dtype, from a checkpoint and from a configuration."""
    dtype = getattr(torch, name)
    for kwargs in ({"dtype": dtype}, {"dtype": name}, {"torch_dtype": dtype}, {"torch_dtype": name}):
        assert {p.dtype for p in load(folder, **kwargs).parameters()} == {dtype}, kwargs
    config = AutoConfig.from_pretrained(folder, **REMOTE)
    assert AutoModel.from_config(config, **REMOTE, dtype=dtype).dtype == dtype
    assert AutoModel.from_config(config, **REMOTE, torch_dtype=dtype).dtype == dtype


def test_default_dtype_is_that_of_the_checkpoint(folder, tmp_path):
    """Not float32, which takes twice the memory; whatever the name under which the configuration stores it."""
    assert load(folder).dtype == torch.float16
    renamed = copy_of(folder, tmp_path)
    config = json.loads((renamed / "config.json").read_text())
    config["dtype"] = config.pop("torch_dtype")
    (renamed / "config.json").write_text(json.dumps(config))
    assert load(renamed).dtype == torch.float16


def test_buffers_made_on_the_meta_device(folder):
    """5.x builds on the meta device: a plain tensor stays there, and a buffer that no file holds comes up garbage."""
    model = load(folder)
    assert not dict(model.named_buffers())
    for name, module in model.named_modules():
        assert not [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)], name
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]


def test_loaded_weights_overwritten_by_initialization(folder):
    """On 5.0.0 an _init_weights that wrote through `.data` ran over what had been loaded."""
    wanted = stored(folder)
    for auto in (AutoModel, AutoModelForSequenceClassification):
        state = load(folder, auto).state_dict()
        for name, tensor in wanted.items():
            assert torch.equal(state[name], tensor.to(state[name].dtype)), name


def test_missing_weights_left_uninitialized(folder, tmp_path):
    """From 4.36 on a model is built without initialisation, and what the files lack gets it afterwards."""
    layer = "transformer.encoder.layers.1."
    state = {name: tensor for name, tensor in stored(folder).items() if not name.startswith(layer)}
    assert len(state) < len(stored(folder))
    torch.manual_seed(1)
    model = load(
        copy_of(folder, tmp_path, state), AutoModelForSequenceClassification, torch_dtype=torch.float32, strict=False
    )
    got = model.state_dict()
    for name in [*(name for name in got if name.startswith(layer)), "classifier_head.weight", "classifier_head.bias"]:
        if "classifier" in name:
            assert 0 < got[name].abs().max() <= 1.001 * got["classifier_head.weight"].shape[1] ** -0.5, name
        elif name.endswith("bias"):
            assert (got[name] == 0).all(), name
        elif "layernorm" in name:
            assert (got[name] == 1).all(), name
        else:
            assert 0.01 < got[name].std() < 0.03, name


def test_attn_implementation_at_load(folder):
    """`attn_implementation` is taken by name, also where the release does not know the word."""
    ids, mask = batch()
    out = {}
    for name in ("sdpa", "eager"):
        model = load(folder, attn_implementation=name, torch_dtype=torch.float32)
        assert attention_name(model.config) == name
        out[name] = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(out["sdpa"], out["eager"], atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(
    conftest.release(transformers.__version__) >= (4, 48), reason="the attention interface is there: nothing to refuse"
)
def test_attention_of_a_later_release_is_named(make_model):
    model = make_model()
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"flex_attention.*4\.\d\d"):
        model(input_ids=torch.tensor([[5, 6]]))


def test_classification_loads_from_a_checkpoint_without_a_head(folder):
    model = load(folder, AutoModelForSequenceClassification, num_labels=3, torch_dtype=torch.float32)
    assert model(input_ids=torch.tensor([[5, 6]])).logits.shape == (1, 3)
    assert type(model).__name__ == ChatGLMForSequenceClassification.__name__


# The same figures everywhere

VARIANTS = {
    "plain": {},
    "one head a key": {"multi_query_attention": False, "rope_ratio": 2.0, "rope_ratio_type": "linear"},
    "layer norm, biases": {"rmsnorm": False, "add_bias_linear": True, "rope_ratio": 2.0, "rope_ratio_type": "base"},
    "prefix": {"pre_seq_len": 3},
}


def formula_model(**changes):
    """A model whose weights are the same numbers wherever it is built; its logits are about 1."""
    shape = {"num_layers": 2, "hidden_size": 32, "kv_channels": 8, "ffn_hidden_size": 48, "padded_vocab_size": 96}
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**{**SMALL, **shape, **changes})).float().eval()
    state = model.state_dict()
    for seed, (name, tensor) in enumerate(sorted(state.items())):
        offset = 1.0 if "layernorm.weight" in name else 0.0
        state[name] = formula_tensor(tuple(tensor.shape), 0.2, seed, offset)
    model.load_state_dict(state)
    return model


@torch.no_grad()
def figures(model):
    ids, mask = batch()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    beams = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, num_beams=3)
    return {"logits": logits.tolist(), "greedy": greedy.tolist(), "beams": beams.tolist()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_results_match_the_newest_release(variant, attention):
    """Logits to 1e-6 in float32, greedy and beam ids equal, for rows with and without padding."""
    wanted = json.loads(GOLDEN.read_text())["figures"][variant]
    model = formula_model(**VARIANTS[variant])
    model.config._attn_implementation = attention
    got = figures(model)
    torch.testing.assert_close(torch.tensor(got["logits"]), torch.tensor(wanted["logits"]), atol=1e-6, rtol=1e-6)
    assert got["greedy"] == wanted["greedy"]
    assert got["beams"] == wanted["beams"]


def write_golden():
    content = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "figures": {name: figures(formula_model(**changes)) for name, changes in VARIANTS.items()},
    }
    GOLDEN.write_text(json.dumps(content))


if __name__ == "__main__":
    sys.exit(write_golden())
