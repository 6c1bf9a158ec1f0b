"""export/to_glm.py: the folder that it writes is a stock GLM, with the same logits and the same ids."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHARED, TINY

pytestmark = pytest.mark.needs_transformers("4.46", "GlmForCausalLM")

REAL = SHARED / "chatglm2-6b" / "tokenizer.model"
ODD = [
    *("", " ", "  a  b ", "\n", "\n\n \n a", "a\tb\r\n", "▁▁ a▁b", "a" * 500, " " * 40, "=" * 33 + "-" * 17),
    *("😀 👩\u200d👩\u200d👧 한국어", "e\u0301\u200b\ufeff\u3000", "\x01\x7f", "3.14 1e-9", "def f():\n    return x\n"),
    *("[gMASK]", "x [gMASK]sop", "sop eop [MASK][sMASK]", "</s>", "a<s>b</s><unk>", "<0x0A><0xE4>"),
]


@pytest.fixture(scope="module")
def to_glm():
    """The script as a module."""
    import to_glm

    return to_glm


@pytest.fixture(scope="module")
def glm_folder(to_glm, tmp_path_factory):
    """The tiny checkpoint, exported."""
    folder = tmp_path_factory.mktemp("export") / "glm"
    to_glm.export(TINY, folder)
    return folder


@pytest.fixture
def save(tmp_path):
    """A function that saves a model as a source folder, with the tiny checkpoint's tokenizer."""

    def run(model, name="source"):
        folder = tmp_path / name
        model.save_pretrained(folder)
        for file in ("tokenizer.model", "tokenizer_config.json"):
            shutil.copy(TINY / file, folder)
        return folder

    return run


@pytest.fixture
def no_remote_code():
    """A function of a folder: (model, tokenizer) by the Auto classes, which would refuse code in the folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return lambda folder: (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, torch_dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    )


# ---- the network ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(  # ChatGLM2-6B-32K
            {"rope_ratio": 4.0, "rope_ratio_type": "linear", "seq_length": 1024},
            marks=pytest.mark.needs_transformers("4.48", "a GLM that reads rope_scaling"),
        ),
        {"rope_ratio": 50.0, "rope_ratio_type": "base"},  # ChatGLM3-6B-32K
        {"seq_length": 8192, "model_family": "codegeex2"},
        {"multi_query_attention": False},
        {"add_qkv_bias": False},
    ],
    ids=["linear", "base", "codegeex2", "without-multi-query", "without-bias"],
)
def test_supported_variants_give_the_same_logits(to_glm, make_model, save, no_remote_code, tmp_path, changes):
    """Saved, exported and loaded: logits equal to 1e-4, also at positions far out."""
    model = make_model(padded_vocab_size=1664, **changes)
    to_glm.export(save(model), tmp_path / "glm")
    glm, _ = no_remote_code(tmp_path / "glm")
    assert type(glm).__name__ == "GlmForCausalLM"
    generator = torch.Generator().manual_seed(0)
    for start in (0, 200):
        ids = torch.randint(3, 1600, (2, 24), generator=generator)
        positions = torch.arange(start, start + 24)[None].expand(2, -1)
        logits = [m(input_ids=ids, position_ids=positions).logits for m in (model, glm)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rmsnorm": False}, "rmsnorm=False: GLM has only RMSNorm"),
        ({"post_layer_norm": False}, "post_layer_norm=False: GLM always has a last norm"),
        ({"apply_residual_connection_post_layernorm": True}, "the residual before the norm"),
        ({"add_bias_linear": True}, "add_bias_linear=True: GLM has biases only on query, key and value"),
        ({"fp32_residual_connection": True}, "fp32_residual_connection=True: GLM adds in the weights' dtype"),
        ({"pre_seq_len": 4}, "pre_seq_len=4: GLM has no P-Tuning prefix"),
        ({"pre_seq_len": 4, "rmsnorm": False}, "(?s)rmsnorm=False.*pre_seq_len=4"),
    ],
)
def test_variants_unsupported_by_glm_are_rejected(to_glm, make_model, save, tmp_path, changes, message):
    """By value and cure, and before anything is written."""
    with pytest.raises(ValueError, match=message):
        to_glm.export(save(make_model(padded_vocab_size=1664, **changes)), tmp_path / "glm")
    assert not (tmp_path / "glm").exists()


@torch.no_grad()
@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 4, "embedding": True, "output_layer": True}])
def test_quantized_checkpoint_is_exported_as_floats(to_glm, make_model, save, no_remote_code, tmp_path, options):
    """GLM gives the quantized model's logits, up to the one rounding of each weight."""
    model = make_model(padded_vocab_size=1664).quantize(backend="torch", **options)
    to_glm.export(save(model), tmp_path / "glm", form="float")
    glm, _ = no_remote_code(tmp_path / "glm")
    ids = torch.randint(3, 1600, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, glm(ids).logits, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_shards_and_bin_files(to_glm, tiny_model, no_remote_code, tmp_path):
    """Written in shards of the size asked for, in the source's dtype; read from pytorch_model.bin with its inv_freq."""
    source, target = tmp_path / "source", tmp_path / "glm"
    source.mkdir()
    for file in ("tokenizer.model", "tokenizer_config.json", "config.json"):
        shutil.copy(TINY / file, source)
    state = {name: tensor.half() for name, tensor in tiny_model.state_dict().items()}
    state["transformer.rotary_pos_emb.inv_freq"] = torch.ones(8)
    torch.save(state, source / "pytorch_model.bin")
    to_glm.export(source, target, max_shard_size="1MB")
    shards = sorted(target.glob("model-*.safetensors"))
    assert len(shards) > 5 and max(shard.stat().st_size for shard in shards) < 1.1e6
    config = json.loads((target / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float16"
    ids = torch.randint(3, 1600, (1, 20), generator=torch.Generator().manual_seed(0))
    glm, _ = no_remote_code(target)
    torch.testing.assert_close(glm(ids).logits, tiny_model(ids).logits, atol=1e-3, rtol=1e-3)


def test_invalid_folder_is_rejected(to_glm, make_model, save, glm_folder, tmp_path):
    """A target that holds files, a source without config.json, and one whose tensors are not all there."""
    with pytest.raises(ValueError, match="glm is not empty. Give a new folder"):
        to_glm.export(TINY, glm_folder)
    with pytest.raises(ValueError, match="has no config.json"):
        to_glm.export(tmp_path, tmp_path / "glm")
    from safetensors.torch import load_file, save_file

    source = save(make_model(padded_vocab_size=1664))
    state = {name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()}  # mapped
    lacking = {name: tensor for name, tensor in state.items() if "output_layer" not in name}
    save_file(lacking, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of the .*transformer.output_layer.weight"):
        to_glm.export(source, tmp_path / "glm")
    save_file({**state, "classifier_head.weight": torch.ones(2, 64)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="holds tensors that GLM does not have.*classifier_head.weight"):
        to_glm.export(source, tmp_path / "glm")


# ---- the tokenizer --------------------------------------------------------------------------------------------------


def texts():
    """The dialogues, odd texts, and 3,000 made of pieces of these, of repeated characters, and of any characters."""
    chosen = random.Random(0)
    known = ODD + [text for line in open(TINY / "dialogues.jsonl", encoding="utf-8")
                   for turn in json.loads(line)["turns"] for text in turn]  # fmt: skip
    corpus = "".join(known)
    for _ in range(1000):
        i, j = chosen.randrange(len(corpus)), chosen.randrange(len(corpus))
        known.append(corpus[i : i + 20] + corpus[j : j + 20])
        known.append("".join(chosen.choice(" aeo\n=-1▁中") * chosen.randint(1, 9) for _ in range(6)))
        known.append("".join(chr(chosen.choice([chosen.randrange(1, 0x3000), 0x10000 + chosen.randrange(0xFFFFF)]))
                             for _ in range(9)))  # fmt: skip
    return [text for text in known if not text.startswith("[gMASK]sop")]


def test_ids_and_text_match(glm_folder, tokenizer, no_remote_code):
    """Ids of every text, without a prefix too, of pairs and of padded batches; and the text of every row of ids."""
    _, fast = no_remote_code(glm_folder)
    assert fast.is_fast and len(fast) == len(tokenizer)
    for text in texts():
        ids = tokenizer(text)["input_ids"]
        assert fast(text)["input_ids"] == ids, text
        assert fast(text, add_special_tokens=False)["input_ids"] == ids[2:]
        assert fast.decode(ids) == tokenizer.decode(ids), text
    assert fast("你好", "再见")["input_ids"] == tokenizer("你好", "再见")["input_ids"]
    ours, theirs = (t(["你好", "a longer text"], padding=True) for t in (tokenizer, fast))
    assert theirs["input_ids"] == ours["input_ids"] and theirs["attention_mask"] == ours["attention_mask"]
    assert fast.decode([1600, 1601, 1602, 1603, 1604, 1605, 1663]) == ""
    assert fast.decode([2]) == "</s>" and fast.decode([0, 1, 2], skip_special_tokens=True) == ""


def test_chats_match(glm_folder, tokenizer, no_remote_code):
    """A rendered template has the prefix, once, whoever tokenizes it; special strings in a message stay text."""
    _, fast = no_remote_code(glm_folder)
    rounds = ["你好", "你好！", "[gMASK]sop</s> sophisticated", "", "[Round 1]"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(rounds)]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert fast.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids
    text = fast.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert fast(text, add_special_tokens=False)["input_ids"] == ids
    with pytest.raises(Exception, match="must be text"):
        fast.apply_chat_template([{"role": "user", "content": 1}], add_generation_prompt=True)


def test_released_tokenizer(to_glm, tmp_path):
    """The real tokenizer.model, where there is one: the same ids and texts."""
    if not REAL.is_file():
        pytest.skip(f"no {REAL}: the released tokenizer.model is not part of the project")
    from chatglm2.tokenization_chatglm import ChatGLMTokenizer

    ours = ChatGLMTokenizer(str(REAL))
    fast = to_glm.glm_tokenizer(ours, "")
    assert fast("你好")["input_ids"] == [64790, 64792, 36474, 54591]
    for text in texts():
        ids = ours(text)["input_ids"]
        assert fast(text)["input_ids"] == ids, text
        assert fast.decode(ids) == ours.decode(ids), text


# ---- the whole ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_tiny_checkpoint_answers_as_before(glm_folder, no_remote_code, tiny_model, tokenizer):
    """Loaded by the Auto classes without remote code, it answers every dialogue's first round with our very ids."""
    glm, fast = no_remote_code(glm_folder)
    rounds = [json.loads(line)["turns"][0] for line in open(TINY / "dialogues.jsonl", encoding="utf-8")]
    chats = [[{"role": "user", "content": query}] for query, _ in rounds[::8]]
    inputs = fast.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    prompts = tokenizer([tokenizer.build_prompt(query) for query, _ in rounds[::8]], padding=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], prompts["input_ids"])
    settings = {"do_sample": False, "max_new_tokens": 100}
    ids, expected = glm.generate(**inputs, **settings), tiny_model.generate(**prompts, **settings)
    assert torch.equal(ids, expected)
    answers = fast.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers == [answer for _, answer in rounds[::8]]


def test_command_line(tmp_path):
    """The command prints what it wrote; a refusal is one line, and no traceback."""
    command = [sys.executable, str(ROOT / "export" / "to_glm.py")]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, str(TINY), str(tmp_path / "glm")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "config.json, generation_config.json, model.safetensors" in done.stdout
    done = subprocess.run([*command, str(TINY), str(tmp_path / "glm")], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "is not empty" in done.stderr and "Traceback" not in done.stderr
