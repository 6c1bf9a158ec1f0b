"""The border to transformers: the cache's two names, what generate may hand over, and what is taken from it at all."""

import ast
import logging
import pickle
import re
import warnings

import pytest
import torch
import transformers
from chatglm2 import transformers_compat
from chatglm2.modeling_chatglm import ChatGLMForSequenceClassification, ChatGLMModel
from chatglm2.quantization import FAMILIES
from chatglm2.transformers_compat import CACHE, CACHE_NAMES, DynamicCache, with_both_cache_names
from conftest import CODE_FILES, ROOT, TINY
from model_helpers import some_ids

GREEDY = {"do_sample": False, "max_new_tokens": 8}


# ---- the cache ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_ids_are_the_same_with_and_without_a_cache(make_model, padded):
    """And with a cache every step feeds one token: the cache that generate holds reaches the model."""
    model, ids = make_model(), some_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0 if padded else 1
    without = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    fed = []
    model.transformer.embedding.register_forward_hook(lambda module, args, output: fed.append(output.shape[1]))
    assert torch.equal(model.generate(ids, attention_mask=mask, **GREEDY), without)
    assert fed == [9] + [1] * 7


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("cls", [None, ChatGLMModel, ChatGLMForSequenceClassification])
def test_forward_takes_both_names_of_the_cache(make_model, cls, name):
    model = make_model(**({"cls": cls} if cls else {})).eval()
    ids, cache = some_ids(1, 9), DynamicCache()
    whole = model(ids).to_tuple()[0]
    model(ids[:, :5], **{name: cache})
    output = model(ids[:, 5:], **{name: cache})
    assert cache.get_seq_length() == 9
    for answer in (output.cache, output.past_key_values, output["cache"], output["past_key_values"], output.get(name)):
        assert answer is cache
    assert name in output and output.to_tuple()[0].shape[-1] == whole.shape[-1]
    torch.testing.assert_close(output.to_tuple()[0][:, -1], whole[:, -1])


@torch.no_grad()
def test_cache_is_accepted_under_any_name(make_model):
    """A future generate that renames it again does not lose it."""
    model, ids, cache = make_model(), some_ids(1, 9), DynamicCache()
    model(ids[:, :5], attention_memory=cache)
    assert cache.get_seq_length() == 5
    inputs = model.prepare_inputs_for_generation(ids, attention_memory=cache, next_sequence_length=4)
    assert inputs[CACHE] is cache and inputs["input_ids"].shape[1] == 4


@torch.no_grad()
def test_an_empty_cache_gives_way(make_model):
    """PEFT's prefix tuning passes its cache as past_key_values beside the empty one that generate calls `cache`."""
    model, ids, held = make_model(), some_ids(1, 9), DynamicCache()
    model(input_ids=ids[:, :5], past_key_values=held)
    output = model(input_ids=ids[:, 5:], past_key_values=held, cache=DynamicCache())
    assert output.cache is held and held.get_seq_length() == 9


@torch.no_grad()
def test_invalid_caches_are_rejected(make_model):
    model, ids = make_model(), some_ids(1, 9)
    with pytest.raises(ValueError, match="Two caches"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())
    for wrong in (((torch.zeros(1), torch.zeros(1)),), {}, "static"):
        with pytest.raises(ValueError, match=f"The cache is a {type(wrong).__name__}: pass a .*DynamicCache"):
            model(ids, past_key_values=wrong)


@torch.no_grad()
def test_a_cache_that_derives_from_none_of_transformers(make_model):
    """A script's own one is read and filled like any other."""

    class Own:
        def __init__(self):
            self.held = {}

        def get_seq_length(self, layer_idx=0):
            return self.held[layer_idx][0].shape[2] if layer_idx in self.held else 0

        def update(self, key, value, layer_idx, cache_kwargs=None):
            past = self.held.get(layer_idx, (key[:, :, :0], value[:, :, :0]))
            self.held[layer_idx] = tuple(torch.cat(pair, dim=2) for pair in zip(past, (key, value)))
            return self.held[layer_idx]

    model, ids, cache = make_model(), some_ids(1, 9), Own()
    steps = [model(part, past_key_values=cache).logits for part in ids.split((5, 3, 1), dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids).logits, atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == 9


@torch.no_grad()
def test_outputs_keep_their_order_and_can_be_pickled(make_model):
    model, ids = make_model(attention="eager"), some_ids(1, 9)
    output = model(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    kinds = ["loss", "logits", CACHE, "hidden_states", "attentions"]
    assert list(output.keys()) == kinds
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert len(as_tuple) == 3 and as_tuple[2].get_seq_length() == 9
    copy = pickle.loads(pickle.dumps(output))
    assert torch.equal(copy.logits, output.logits) and copy.past_key_values.get_seq_length() == 9
    assert type(copy) is type(output) is with_both_cache_names(transformers.modeling_outputs.CausalLMOutputWithPast)


@torch.no_grad()
@pytest.mark.needs_transformers("4.36", "outputs of generate that hold the cache")
def test_outputs_of_generate_have_both_names(make_model):
    output = make_model().generate(some_ids(1, 9), return_dict_in_generate=True, output_scores=True, **GREEDY)
    assert len(output.scores) == 8 and output.sequences.shape == (1, 17)
    assert output.cache is output.past_key_values and output.cache is not None


# ---- never silently wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [None, ChatGLMModel, ChatGLMForSequenceClassification])
def test_unknown_keyword_of_forward_is_an_error(make_model, cls):
    model = make_model(**({"cls": cls} if cls else {}))
    with pytest.raises(TypeError, match="attenton_mask"):
        model(some_ids(1, 9), attenton_mask=torch.ones(1, 9))


def test_step_without_its_cache_is_an_error(make_model):
    """transformers 5.24 under code that did not know its name for the cache: one new id, and nothing before it."""
    model, ids = make_model(), some_ids(1, 9)
    with pytest.raises(ValueError, match="the cache or the whole prompt"):
        model.prepare_inputs_for_generation(ids, next_sequence_length=1, attention_mask=None)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
    with pytest.raises(ValueError, match="the cache or the whole prompt"):  # a cache that misses tokens
        model.prepare_inputs_for_generation(ids, cache=cache, next_sequence_length=1, attention_mask=None)


def test_unknown_arguments_of_generate_warn_and_are_ignored(make_model):
    model, ids = make_model(), some_ids(1, 9)
    with pytest.warns(UserWarning, match="step_budget"):
        inputs = model.prepare_inputs_for_generation(ids, attention_mask=torch.ones_like(ids), step_budget=3)
    assert "step_budget" not in inputs


@torch.no_grad()
def test_full_attention_mask_and_return_last_logit(make_model):
    model, ids = make_model(), some_ids(2, 9)
    torch.testing.assert_close(model(ids, return_last_logit=True).logits, model(ids).logits[:, -1:])
    base = model.transformer
    future = torch.ones(9, 9, dtype=torch.bool).triu(1).expand(2, 1, 9, 9)  # True where a query may not look
    causal = base(ids).last_hidden_state
    torch.testing.assert_close(base(ids, full_attention_mask=future).last_hidden_state, causal)
    torch.testing.assert_close(base(ids, full_attention_mask=future[:, 0]).last_hidden_state, causal)
    everything = base(ids, full_attention_mask=torch.zeros_like(future)).last_hidden_state
    assert not torch.allclose(everything, causal)


# ---- the mask -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.needs_transformers("4.53", "a mask maker of transformers")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_own_attention_uses_no_mask_of_transformers(make_model, monkeypatch, attention):
    """Causal, padded, static, packed and one new token, in forward and in generate."""

    def refuse(*args, **kwargs):
        raise AssertionError("a mask maker of transformers was called")

    for name in [name for name in dir(transformers.masking_utils) if name.startswith("create_")]:
        monkeypatch.setattr(transformers.masking_utils, name, refuse)
        if hasattr(transformers.generation.utils, name):
            monkeypatch.setattr(transformers.generation.utils, name, refuse)
    model, ids = make_model(attention=attention), some_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model(ids)
    model(ids, attention_mask=mask)
    model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2), use_cache=False)
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(wanted, model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY))


# ---- no deprecation reaches a user ----------------------------------------------------------------------------------


@pytest.fixture
def announcements():
    """Texts of transformers' warnings and log lines that announce a removal."""
    texts, root = [], logging.getLogger("transformers")
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    root.addHandler(handler)
    caches = [function for function in (getattr(transformers.utils.logging, "warning_once", None),) if function]
    for function in caches:
        function.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        announced = []
        yield announced
        texts += [str(w.message) for w in caught if "transformers" in str(w.message) or "transformers" in w.filename]
        announced += [text for text in texts if re.search("deprecat|will be removed|will stop", text)]
    root.removeHandler(handler)
    assert announced == []


@torch.no_grad()
def test_no_deprecation_warnings(announcements, make_model, tokenizer, tiny_model, tmp_path):
    """The fixture fails the test with what transformers announced."""
    from transformers import AutoModel

    with_code = {"trust_remote_code": True}
    model = AutoModel.from_pretrained(TINY, torch_dtype=torch.float32, **with_code).eval()
    _, history = model.chat(tokenizer, "你好", do_sample=False)
    *_, (_, history, cache) = model.stream_chat(
        tokenizer, "谢谢", return_past_key_values=True, do_sample=False, max_new_tokens=4
    )
    *_, (_, history, cache) = model.stream_chat(
        tokenizer, "再见", history, cache, return_past_key_values=True, do_sample=False, max_new_tokens=4
    )
    inputs = tokenizer(["你好"], return_tensors="pt")
    out = model(**inputs, past_key_values=DynamicCache())
    assert out.past_key_values.get_seq_length() == out.cache.get_seq_length()
    model.generate(**inputs, past_key_values=DynamicCache(), **GREEDY)
    model.generate(**inputs, num_beams=2, **GREEDY)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert model.config.torch_dtype == torch.float32
    model.save_pretrained(tmp_path)


# ---- what is taken from transformers --------------------------------------------------------------------------------

# documented, and exported for everyone to use
DOCUMENTED = {
    "transformers.modeling_outputs.BaseModelOutputWithPast",
    "transformers.modeling_outputs.CausalLMOutputWithPast",
    "transformers.modeling_outputs.SequenceClassifierOutputWithPast",
    "transformers.cache_utils.Cache",
    "transformers.cache_utils.DynamicCache",
    "transformers.quantizers.HfQuantizer",
    "transformers.utils.logging",
}
CLASSES = ("PreTrainedModel", "GenerationMixin", "PretrainedConfig", "PreTrainedTokenizer", "GenerationConfig")


def borrowed_names():
    """What the package's files take from transformers that is not public: names of modules and attributes, and ways of
    reading them off its code."""
    theirs = set()
    classes = [getattr(transformers, name) for name in CLASSES]
    classes += [transformers_compat.DynamicCache, transformers_compat.DynamicLayer, transformers_compat.HfQuantizer]
    for cls in classes:
        for base in cls.__mro__:
            theirs |= {*vars(base), *vars(base).get("__annotations__", {})} if base is not object else set()
    theirs -= set(vars(torch.nn.Module))
    theirs -= set(vars(torch.nn.Module()))
    theirs |= {"_attn_implementation", "_hf_hook", "_pre_quantization_dtype", "_is_quantized"}  # set on instances

    def private(name):
        return name.startswith("_") and not name.startswith("__") and name in theirs

    found = set()
    for path in CODE_FILES:
        if path.name in ("cli_demo.py", "web_demo.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {id(node) for node in tree.body if isinstance(node, ast.FunctionDef)}  # of the file, of no class
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {a.name for a in node.names if a.name.startswith("transformers.") or a.name == "inspect"}
            elif isinstance(node, ast.ImportFrom) and node.module == "inspect":
                found.add("inspect")
            elif isinstance(node, ast.Attribute) and (private(node.attr) or node.attr in ("__code__", "co_names")):
                found.add(node.attr)
            elif isinstance(node, ast.FunctionDef) and private(node.name) and id(node) not in functions:
                found.add(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and private(node.value):
                found.add(node.value)
            elif isinstance(node, ast.ClassDef):
                targets = [target for item in node.body if isinstance(item, ast.Assign) for target in item.targets]
                found |= {target.id for target in targets if isinstance(target, ast.Name) and private(target.id)}
    return found - DOCUMENTED


@pytest.mark.needs_transformers("5.23", "the names that the list was written against")
def test_names_taken_from_transformers_are_documented():
    """docs/compatibility.md has a line with the reason for each; a new one needs a line before it passes."""
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    section = page.split("## What is borrowed from transformers")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `([^`]+)` \|", section, flags=re.M))
    assert borrowed_names() == listed
    assert len(listed) < 38  # as many as there were before transformers 5.24


def test_loader_finds_every_file():
    """Some releases copy only what an entry file names itself: each names all that it needs, directly or not."""

    def relative_imports(name):
        text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        return set(re.findall(r"^\s*from\s+\.(\w+)\s+import", text, flags=re.M))

    lazily = {f"quantization_{name}" for name in FAMILIES}
    assert lazily <= relative_imports("modeling_chatglm")
    for entry in ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm"):
        needed, waiting = {entry}, [entry]
        while waiting:
            for name in relative_imports(waiting.pop()) - needed:
                needed.add(name)
                waiting.append(name)
        assert needed == relative_imports(entry) | {entry}
        for name in needed:
            assert (TINY / f"{name}.py").resolve() == ROOT / f"{name}.py"  # examples/tiny links it
