"""export/to_gguf.py: llama.cpp's own converter and its own server, on the tiny checkpoint.

LLAMA_CPP is a folder of llama.cpp's source, for its converter; the server comes prebuilt with the package xllamacpp.
"""

import json
import os
import shutil
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY3

pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def to_gguf():
    """The script as a module."""
    import to_gguf

    return to_gguf


@pytest.fixture(scope="module")
def llama_cpp():
    """The folder of llama.cpp's source."""
    folder = os.environ.get("LLAMA_CPP")
    if not folder or not Path(folder, "convert_hf_to_gguf.py").is_file():
        pytest.skip(f"LLAMA_CPP={folder}: give a folder of llama.cpp's source, for its convert_hf_to_gguf.py")
    return folder


@pytest.fixture(scope="module")
def serve():
    """A function that starts llama.cpp's server on a file: (path, body) -> answer, over HTTP."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp: llama.cpp's server, prebuilt")
    servers = []

    def start(file, **settings):
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.port = str(file), 1024, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.sampling.temp = 0
        for name, value in settings.items():
            setattr(params, name, value)
        servers.append(xllamacpp.Server(params))
        address = servers[-1].listening_address

        def ask(path, **body):
            data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=120) as answer:
                return json.load(answer)

        return ask

    yield start
    servers.clear()


@pytest.fixture(scope="module")
def ask(to_gguf, llama_cpp, serve, tmp_path_factory):
    """The server on the tiny checkpoint, converted."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    assert to_gguf.export(TINY, file, llama_cpp, "f32") == ""
    return serve(file)


def dialogues():
    return [json.loads(line)["turns"] for line in open(TINY / "dialogues.jsonl", encoding="utf-8")]


@torch.no_grad()
def greedy(model, tokenizer, prompt):
    """The ids that `model` adds to a prompt, up to </s>, at most 60."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :].tolist()
    return [i for i in ids if i != tokenizer.eos_token_id]


def completion(ask, ids):
    """The ids that llama.cpp adds to those of a prompt, up to </s>, at most 60."""
    tokens = ask("/completion", prompt=ids, n_predict=60, temperature=0, return_tokens=True)["tokens"]
    return [i for i in tokens if i != 2]


def test_greedy_ids_match(ask, tiny_model, tokenizer):
    """Of 20 dialogues' prompts, and of 20 that it has not learned."""
    for rounds in dialogues()[::10]:
        for query in (rounds[0][0], rounds[0][0][::-1]):
            prompt = tokenizer.build_prompt(query)
            assert completion(ask, tokenizer(prompt)["input_ids"]) == greedy(tiny_model, tokenizer, prompt), prompt


def test_text_encodes_to_the_same_ids(ask, tokenizer):
    """Of all dialogues and odd texts, without the prefix, which llama.cpp puts in front of chats alone."""
    odd = ["  a  b ", "\n\n a", "a\tb\r\n", "😀 한국어", "=" * 33, "[gMASK]sop", "</s>", "sophisticated", "<0x0A>"]
    for text in [text for rounds in dialogues() for turn in rounds for text in turn] + odd:
        ids = ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_chat_prompts_match(ask, tokenizer):
    """The chat endpoint renders [gMASK] sop and the rounds, and gives the answers that were learned."""
    rounds = next(rounds for rounds in dialogues() if len(rounds) == 3)
    messages = []
    for query, answer in rounds:
        messages.append({"role": "user", "content": query})
        text = ask("/apply-template", messages=messages)["prompt"]
        ids = ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        choice = ask("/v1/chat/completions", messages=messages, temperature=0, max_tokens=100)["choices"][0]
        assert choice["message"]["content"] == answer and choice["finish_reason"] == "stop"
        messages.append({"role": "assistant", "content": answer})


QUANTIZED = [(4, {}), (8, {}), (4, {"group_size": 32}), (4, {"embedding": True, "output_layer": True})]


@pytest.mark.parametrize("bits, options", QUANTIZED, ids=str)
def test_quantized_weights_are_the_same_numbers(to_gguf, llama_cpp, serve, tokenizer, tmp_path, bits, options):
    """int4 and int8 folders as Q4_0 and Q8_0: every weight as this package restores it, and its greedy ids."""
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm2.quantization_format import dequantize_weight

    model = ChatGLMForConditionalGeneration.from_pretrained(TINY).half().quantize(bits, **options)
    model.save_pretrained(tmp_path / "source")
    shutil.copy(TINY / "tokenizer.model", tmp_path / "source")
    to_gguf.export(tmp_path / "source", tmp_path / "tiny.gguf", llama_cpp)
    sys.path.insert(0, str(Path(llama_cpp, "gguf-py")))
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    names = {"attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense"}
    names |= {"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}
    state = model.state_dict()
    for i in range(model.config.num_layers):
        for theirs, ours in names.items():
            name, tensor = f"transformer.encoder.layers.{i}.{ours}.weight", stored[f"blk.{i}.{theirs}.weight"]
            assert tensor.tensor_type.name == {4: "Q4_0", 8: "Q8_0"}[bits]
            want = dequantize_weight(state[name], state[name + "_scale"].float(), bits)
            assert torch.equal(torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)), want), name
    assert ("Q8_0" in stored["output.weight"].tensor_type.name) == bool(options.get("output_layer"))
    ask, model = serve(tmp_path / "tiny.gguf"), model.float().eval()
    same = 0
    for rounds in dialogues()[::10]:
        prompt = tokenizer.build_prompt(rounds[0][0])
        same += completion(ask, tokenizer(prompt)["input_ids"]) == greedy(model, tokenizer, prompt)
    assert same >= 19  # of 20: both round activations to int8, each in its own way


@pytest.mark.parametrize("kind", ["linear", "base"])
def test_longer_contexts(to_gguf, llama_cpp, serve, tiny_model, tokenizer, tmp_path, kind):
    """rope_ratio in both meanings: "base" is in the file, "linear" in the options that the export names."""
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration

    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.model", "model.safetensors"):
        shutil.copy(TINY / name, source)
    values = {**json.loads((TINY / "config.json").read_text()), "rope_ratio": 2.0, "rope_ratio_type": kind}
    (source / "config.json").write_text(json.dumps(values))
    model = ChatGLMForConditionalGeneration.from_pretrained(source).float().eval()
    options = to_gguf.export(source, tmp_path / "tiny.gguf", llama_cpp, "f32")
    assert options == {"linear": "--rope-scaling linear --rope-scale 2", "base": ""}[kind]
    ask = serve(tmp_path / "tiny.gguf", **({"rope_freq_scale": 0.5} if options else {}))
    changed = 0
    for rounds in dialogues()[::40]:
        prompt = tokenizer.build_prompt(rounds[0][0])
        expected = greedy(model, tokenizer, prompt)
        assert completion(ask, tokenizer(prompt)["input_ids"]) == expected
        changed += expected != greedy(tiny_model, tokenizer, prompt)
    assert changed  # or the ratio had no effect, and nothing was tested


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"multi_query_attention": False}, "multi_query_attention=False"),
        (
            {"quantization_bit": 4, "quantization_options": {"group_size": 48}},
            "group_size=48: GGUF has one scale for 32",
        ),
        ({"quantization_bit": 8, "hidden_size": 40}, "must be multiples of 32 for quantized weights"),
        ({"kv_channels": 16}, "kv_channels=16"),
        ({"rmsnorm": False}, "rmsnorm=False"),
    ],
)
def test_variants_unsupported_by_llama_cpp_are_rejected(to_gguf, llama_cpp, tmp_path, changes, message):
    values = {**json.loads((TINY / "config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        to_gguf.export(tmp_path, tmp_path / "tiny.gguf", llama_cpp)


def test_chatglm3_is_rejected(to_gguf, llama_cpp, tmp_path):
    """Its prompt is not the one that this export marks."""
    with pytest.raises(ValueError, match="(?i)chatglm3"):
        to_gguf.export(TINY3, tmp_path / "tiny3.gguf", llama_cpp)


def test_invalid_folder_is_rejected(to_gguf, llama_cpp, tmp_path):
    with pytest.raises(ValueError, match="has no convert_hf_to_gguf.py. Give --llama-cpp"):
        to_gguf.export(TINY, tmp_path / "tiny.gguf", tmp_path)
    with pytest.raises(ValueError, match="already exists"):
        to_gguf.export(TINY, TINY / "config.json", llama_cpp)
