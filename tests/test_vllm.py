"""vLLM reads this repository's config.json and tokenizer: its own code does it here, without its GPU parts.

vLLM has a ChatGLM of its own, and a torch of its own that this environment need not have. So its sources are read from
an installed vllm or from a wheel: `pip download --no-deps vllm`, and its path in the variable VLLM.
"""

import ast
import contextlib
import copy
import importlib.util
import json
import os
import sys
import types
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, TINY

pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def source():
    """A function from the path of one of vLLM's modules to its text."""
    wheel = os.environ.get("VLLM")
    if wheel:
        archive = zipfile.ZipFile(wheel)
        return lambda path: archive.read(path).decode("utf-8")
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        pytest.skip("needs vllm: `pip download --no-deps vllm`, and VLLM=the wheel's path")
    return lambda path: (Path(spec.submodule_search_locations[0]).parent / path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def vllm_config_class(source):
    module = types.ModuleType("vllm_chatglm_config")
    exec(source("vllm/transformers_utils/configs/chatglm.py"), module.__dict__)
    return module.ChatGLMConfig


@pytest.fixture(scope="module")
def vllm_tokenizer(source, tokenizer):
    """The tiny checkpoint's tokenizer behind vLLM's cache of its properties."""
    module = ast.parse(source("vllm/tokenizers/hf.py"))
    function = next(node for node in module.body if getattr(node, "name", None) == "get_cached_tokenizer")
    scope = {"copy": copy, "contextlib": contextlib, "HfTokenizer": object}
    exec(ast.unparse(function), scope)
    return scope["get_cached_tokenizer"](tokenizer)


@pytest.mark.parametrize("folder", [ROOT, TINY], ids=["released", "tiny"])
def test_vllm_reads_the_config(source, vllm_config_class, folder):
    """All that vLLM's network asks of its config is there, and is what our ChatGLMConfig says."""
    from chatglm2.configuration_chatglm import ChatGLMConfig

    ours = ChatGLMConfig.from_pretrained(folder)
    theirs = vllm_config_class(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    network = ast.parse(source("vllm/model_executor/models/chatglm.py"))
    asked = {
        node.attr
        for node in ast.walk(network)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("config", "self.config")
    }
    assert {"num_layers", "multi_query_group_num", "original_rope", "tie_word_embeddings"} <= asked
    for name in asked:
        assert getattr(theirs, name) == getattr(ours, name), name


def test_vllm_finds_the_architecture(source):
    """Each name that a ChatGLM2's config.json gives its network is in vLLM's registry."""
    registry = source("vllm/model_executor/models/registry.py")
    names = {json.loads((folder / "config.json").read_text())["architectures"][0] for folder in (ROOT, TINY)}
    assert all(f'"{name}": ("chatglm", "ChatGLMForCausalLM")' in registry for name in names)


def test_vllm_accepts_the_documented_options(source):
    """README's `vllm serve FOLDER --trust-remote-code`."""
    options = source("vllm/engine/arg_utils.py")
    assert '"--trust-remote-code"' in options


def test_vllm_streams_the_same_text(source, vllm_tokenizer):
    """vLLM's incremental detokenization of a reply with spaces, newlines and characters spelled in bytes."""
    fake = types.ModuleType("vllm.tokenizers")
    fake.TokenizerLike = object
    sys.modules.update({"vllm": types.ModuleType("vllm"), "vllm.tokenizers": fake})
    try:
        scope = {}
        exec(source("vllm/tokenizers/detokenizer_utils.py"), scope)
    finally:
        del sys.modules["vllm"], sys.modules["vllm.tokenizers"]
    text = "Hello, 你好！\n\n  1 + 1 = 2 🦜龘 ok"
    prompt = vllm_tokenizer(vllm_tokenizer.build_prompt("你好"))["input_ids"]
    ids, tokens, pieces = list(prompt), None, []
    offsets = (0, 0)
    for i in vllm_tokenizer.encode(text, add_special_tokens=False) + [vllm_tokenizer.eos_token_id]:
        ids.append(i)
        new, piece, *offsets = scope["detokenize_incrementally"](
            vllm_tokenizer, ids, tokens, *offsets, skip_special_tokens=True
        )
        tokens = new if tokens is None else tokens + new
        pieces.append(piece)
    assert "".join(pieces).lstrip(" ") == text and sum(map(bool, pieces)) > 10


def test_vllm_tokenizer_has_the_same_prompt(vllm_tokenizer, tokenizer):
    """The chat template through vLLM's proxy gives the ids of build_prompt, [gMASK] sop in front."""
    ids = vllm_tokenizer.apply_chat_template(
        [{"role": "user", "content": "你好"}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert ids == tokenizer(tokenizer.build_prompt("你好"))["input_ids"]
    assert len(vllm_tokenizer) == len(tokenizer) and vllm_tokenizer.max_token_id < 1605
