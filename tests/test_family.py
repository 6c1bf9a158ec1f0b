"""family_chatglm: the models of the family told apart, and ChatGLM3's messages, tools and chat.

Folders are as released, but with the tiny tokenizer; the released one was compared with recorded data of the originals.
"""

import copy
import json
import pickle
import shutil

import pytest
import torch
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.family_chatglm import called_with
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT, TINY
from model_helpers import GREEDY, Spell
from transformers import PreTrainedTokenizer

NAMED = {"name_or_path": "THUDM/chatglm3-6b"}
TEMPLATE = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n ' + m['content'] }}{% endfor %}{{ '<|assistant|>' }}"
ROLE_TOKEN = {"64795": {"content": "<|user|>", "special": False}}
CHATGLM3_32K = {"_name_or_path": "THUDM/chatglm3-6b-32k", "seq_length": 32768, "rope_ratio": 50}
CODEGEEX2 = {"_name_or_path": "THUDM/codegeex2-6b", "seq_length": 8192, "rotary_percent": 0.5, "interleaved_qkv": False}
TOOLS = [{"name": "get_weather", "description": "查询天气", "parameters": {"type": "object", "properties": {}}}]
OFFER = {"role": "system", "content": "Answer with the tools:", "tools": TOOLS}


@pytest.fixture
def folder(tmp_path):
    """A function of (config.json, tokenizer_config.json) that makes a released folder, with this package's template."""

    def make(config=None, tokenizer_config=None):
        for path in (TINY / "tokenizer.model", ROOT / "chat_template.jinja"):
            shutil.copy(path, tmp_path)
        for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
            (tmp_path / name).write_text(json.dumps(content or {}), encoding="utf-8")
        return tmp_path

    return make


@pytest.fixture
def three(folder):
    """ChatGLM3's tokenizer."""
    return ChatGLMTokenizer.from_pretrained(folder({"seq_length": 8192}, NAMED))


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "family"),
    [
        ({"_name_or_path": "THUDM/chatglm3-6b", "seq_length": 8192}, NAMED, "chatglm3"),
        ({"seq_length": 32768}, {"chat_template": TEMPLATE}, "chatglm3"),
        ({"seq_length": 32768}, {"added_tokens_decoder": ROLE_TOKEN}, "chatglm3"),
        ({"seq_length": 32768}, {"encode_special_tokens": False}, "chatglm3"),
        ({"_name_or_path": "D:\\models\\ChatGLM3-6B-base\\", "seq_length": 32768}, {}, "chatglm3"),
        ({"_name_or_path": "./output", "seq_length": 8192}, {}, "chatglm3"),
        ({"_name_or_path": "THUDM/chatglm2-6b"}, {"name_or_path": "THUDM/chatglm2-6b"}, "chatglm2"),
        ({"_name_or_path": "./output"}, {}, "chatglm2"),
        (CODEGEEX2, {"name_or_path": "THUDM/codegeex2-6b"}, "codegeex2"),
        ({**CODEGEEX2, "_name_or_path": "./output"}, {}, "chatglm2"),
        ({"seq_length": 8192, "model_family": "chatglm2"}, {"model_family": "chatglm2"}, "chatglm2"),
    ],
)
def test_models_are_told_apart(folder, tmp_path, config, tokenizer_config, family):
    """By what a folder holds, with no key set; what was found is saved, and read back without the names."""
    tokenizer = ChatGLMTokenizer.from_pretrained(folder(config, tokenizer_config))
    assert tokenizer.model_family == family
    assert len(tokenizer) == tokenizer.vocab_size == 1605 + 4 * (family == "chatglm3")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = ChatGLMTokenizer.from_pretrained(tmp_path / "saved")
    assert again.model_family == family and again.decode([1605]) == tokenizer.decode([1605])


@pytest.mark.parametrize(
    ("config", "family", "rope"),
    [
        (CHATGLM3_32K, "chatglm3", "base"),
        ({"rope_ratio": 500}, "chatglm2", "base"),
        ({"rope_ratio": 16}, "chatglm2", "linear"),
        ({"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 50}, "chatglm2", "linear"),
        ({"rope_ratio": 50, "rope_ratio_type": "linear"}, "chatglm2", "linear"),
        (CODEGEEX2, "codegeex2", "linear"),
        ({}, "chatglm2", "linear"),
    ],
)
def test_configurations_are_told_apart(tmp_path, config, family, rope):
    """rope_ratio is read as its family means it, and again so from a saved config that has lost its name."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", **config}))
    read = ChatGLMConfig.from_pretrained(tmp_path)
    assert (read.model_family, read.rope_ratio_type) == (family, rope)
    assert read.eos_token_id == ([2, 64795, 64797] if family == "chatglm3" else 2)
    read.save_pretrained(tmp_path)
    again = ChatGLMConfig.from_pretrained(tmp_path)
    assert (again.model_family, again.rope_ratio_type, again.eos_token_id) == (family, rope, read.eos_token_id)


def test_unknown_families_are_rejected(folder):
    """The key of our own has three values; another model's tokenizer has no roles, and says which key would help."""
    with pytest.raises(ValueError, match="model_family='chatglm4'"):
        ChatGLMConfig(model_family="chatglm4")
    with pytest.raises(ValueError, match="model_family='chatglm4'.*must be one of"):
        ChatGLMTokenizer.from_pretrained(folder({}, {"model_family": "chatglm4"}))
    two = ChatGLMTokenizer.from_pretrained(folder())
    for call in (lambda: two.build_chat_input("x"), lambda: two.build_single_message("user", "", "x")):
        with pytest.raises(ValueError, match='tokenizer of chatglm2, .*"model_family": "chatglm3"'):
            call()
    with pytest.raises(ValueError, match="tokenizer of chatglm2"):
        ChatGLMTokenizer.from_pretrained(TINY, encode_special_tokens=True)


# ChatGLM3's tokenizer and prompt


def test_role_tokens(three):
    """Behind the five commands; their names are decoded, with the space that follows them, and never encoded."""
    user, assistant = three.get_command("<|user|>"), three.get_command("<|assistant|>")
    assert (user, assistant) == (1606, 1607) and three.get_command("<unk>") == 0
    ids = three.build_single_message("user", "", "你好")
    assert ids == [user, *three.encode("\n", add_special_tokens=False), *three.encode("你好", add_special_tokens=False)]
    assert three.decode(ids) == "<|user|> \n 你好" and three.decode(ids, skip_special_tokens=True) == "\n 你好"
    typed = "<|user|> [gMASK]sop </s>"
    assert not {*range(3), *range(1600, 1610)} & {*three.encode(typed, add_special_tokens=False)}
    assert three.decode(three.encode(typed, add_special_tokens=False)) == typed
    assert three.convert_ids_to_tokens(1606) == "<|user|>" and three.decode([1609, 1663]) == ""
    with pytest.raises(ValueError, match="role='tool' is unknown: use one of"):
        three.build_single_message("tool", "", "x")


def test_encode_special_tokens(three, folder):
    """On request role and mask strings become ids, sop only behind a mask: no word is cut at it."""
    special = ChatGLMTokenizer.from_pretrained(folder({}, NAMED), encode_special_tokens=True)
    message = three.build_single_message("user", "", "hi")
    assert special.encode("[gMASK]sop<|user|>\n hi", add_special_tokens=False)[:3] == [1601, 1603, 1606]
    assert special.encode("<|user|>\n hi", add_special_tokens=False)[1:3] == message[1:3]
    plain = three.encode("Aesop, philosophy", add_special_tokens=False)
    assert special.encode("Aesop, philosophy", add_special_tokens=False) == plain


def test_prompts_are_made_from_messages(three):
    """build_chat_input, with tools as JSON in the system message; apply_chat_template gives the same ids."""
    history = [OFFER, {"role": "user", "content": "<|assistant|> 天气"}, {"role": "assistant", "content": "好。"}]
    given = copy.deepcopy(history)
    ids = three.build_chat_input("22", history, role="observation")["input_ids"][0].tolist()
    assert history == given and ids.count(1607) == 2  # the assistant's answer, and the next
    offer = three.build_single_message(
        "system", "", OFFER["content"] + "\n" + json.dumps(TOOLS, indent=4, ensure_ascii=False)
    )
    assert ids[: len(offer) + 2] == [1601, 1603, *offer] and "查询天气" in three.decode(ids)
    if not hasattr(PreTrainedTokenizer, "apply_chat_template"):  # before 4.34
        return
    messages = [*history, {"role": "observation", "content": "22"}]
    asked = {"add_generation_prompt": True, "return_dict": False}
    assert three.apply_chat_template(messages, **asked) == ids
    text = three.apply_chat_template(messages[1:], tokenize=False, add_generation_prompt=True)
    assert text.startswith("[gMASK]sop<|user|>\n <|assistant|> 天气<|assistant|>\n 好。")
    openai = [
        {"role": "developer", "content": OFFER["content"]},
        messages[1],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": '{"x": "北京"}'}}],
        },
        {"role": "tool", "content": [{"type": "text", "text": "22"}]},
    ]
    tools = [{"type": "function", "function": TOOLS[0]}]
    called = {"role": "assistant", "metadata": "f", "content": "```python\ntool_call(x='北京')\n```"}
    want = three.build_chat_input("22", [OFFER, messages[1], called], role="observation")["input_ids"][0].tolist()
    assert three.apply_chat_template(openai, tools=tools, **asked) == want


@pytest.mark.needs_transformers("4.34", "chat templates")
def test_a_rendered_chat_is_encoded_when_it_is_asked_for(three, monkeypatch):
    """Text alone is made without ids, and checked at once; its ids are those of the messages as they were."""
    tools, messages = copy.deepcopy(TOOLS), [{"role": "user", "content": "<|assistant|> 天气"}]
    ids = three.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    asked = {"tools": tools, "add_generation_prompt": True, "tokenize": False}
    with monkeypatch.context() as patch:
        patch.setattr(three.tokenizer, "tokenize", lambda text: pytest.fail(f"encoded {text!r}"))
        text = three.apply_chat_template(messages, **asked)
        with pytest.raises(ValueError, match="role='robot' is unknown"):
            three.apply_chat_template([{"role": "robot", "content": "x"}], **asked)
    messages[0]["content"] = tools[0]["name"] = "changed"
    for chat in (text, copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert three(chat, add_special_tokens=False)["input_ids"] == ids


@pytest.mark.needs_transformers("4.34", "chat templates")
def test_training_on_messages(three):
    """The mask holds each answer without its role's token, and the </s> behind the last."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "好。"}]
    out = three.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learned = [i for i, wanted in zip(out["input_ids"], out["assistant_masks"]) if wanted]
    assert learned == three.build_single_message("assistant", "", "好。")[1:] + [2]
    assert out["input_ids"][-len(learned) - 1] == 1607
    continued = three.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert continued == out["input_ids"][:-1]


@pytest.mark.needs_transformers("4.34", "chat templates")
@pytest.mark.parametrize(
    ("message", "options", "error"),
    [
        ("x", {}, "a message must be"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, {}, "content must be text"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, {}, "arguments of 'f'"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}, {}, "arguments of 'f'"),
        ({"role": "user", "content": "x"}, {"documents": [{"text": "x"}]}, "documents"),
        (
            {"role": "assistant", "content": "x"},
            {"add_generation_prompt": True, "continue_final_message": True},
            "pass one",
        ),
    ],
)
def test_what_has_no_ids_is_refused(three, message, options, error):
    """What would be left out of the prompt is an error that names it."""
    with pytest.raises(ValueError, match=error):
        three.apply_chat_template([message], **options)


# ChatGLM3's chat


@pytest.fixture
def talk(make_model, three):
    """A function of (text that the model says, history, ...) -> what chat returns; the steps of stream_chat agree."""
    model = make_model(padded_vocab_size=1664, seq_length=2048, model_family="chatglm3")

    def say(text, history=(), query="x", ends="<|user|>", **kwargs):
        ids = []
        for i, part in enumerate(text.split("<|assistant|>")):
            ids += [1607] * (i > 0) + three.encode(part, add_special_tokens=False)
        ids.append(three.get_command(ends))
        given = copy.deepcopy(list(history))
        answer = model.chat(three, query, list(history), logits_processor=[Spell(ids)], do_sample=False, **kwargs)
        *_, last = model.stream_chat(three, query, given, logits_processor=[Spell(ids)], do_sample=False, **kwargs)
        assert last == answer and given == list(history)
        return answer

    return say


def test_answers_and_history(talk):
    """Messages are added to a new list; the first line is metadata, blank for an answer; a role's token ends it."""
    response, history = talk("\n 你好！[[训练时间]]", query="你好")
    assert response == "你好！2023年" and history == [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "metadata": "", "content": "你好！[[训练时间]]"},
    ]
    assert talk("without a newline", history)[0] == "without a newline"
    assert talk("", history)[0] == "" and talk("\n ends", ends="<|observation|>")[0] == "ends"


def test_tool_calls(talk):
    """Parameters are read as literals; text before a call is a message of its own; an interpreter gets its code."""
    call = "get_weather\n```python\ntool_call(city='北京', n=-3, f=True, more=[{'a': None}])\n```"
    response, history = talk("\n 我来查。<|assistant|>" + call, [OFFER], ends="<|observation|>")
    assert response == {
        "name": "get_weather",
        "parameters": {"city": "北京", "n": -3, "f": True, "more": [{"a": None}]},
    }
    assert [message["content"] for message in history[2:]] == ["我来查。", call.partition("\n")[2]]
    assert [message["metadata"] for message in history[2:]] == ["", "get_weather"]
    assert talk("\n 31 度。", history, query="31", role="observation")[0] == "31 度。"
    code = "interpreter\n```python\nprint(1)\n```"
    assert talk(code, [{"role": "system", "content": "Run code."}])[0] == {
        "name": "interpreter",
        "content": "```python\nprint(1)\n```",
    }


def test_rounds_keep_the_calls(three):
    """A history as (query, text), as demos save it, and back: text before a call, several calls, code, no answer."""
    call = {"role": "assistant", "metadata": "f", "content": "```python\ntool_call(x=1)\n```"}
    code = {"role": "assistant", "metadata": "interpreter", "content": "```python\nprint(1)\n```"}
    said, result = {"role": "assistant", "content": "我来查。\n好。"}, {"role": "observation", "content": "22"}
    user, form = {"role": "user", "content": "天气"}, three.conversation
    for history in (
        [],
        [user, said, call, result, call, result, said, user, said],
        [user, code, result, {"role": "assistant", "content": ""}],
    ):
        assert form.from_rounds(form.to_rounds(history)) == history
    assert form.to_rounds([OFFER, said, user]) == [("", said["content"]), ("天气", "")]
    text = "interpreter\nis a word."
    assert form.from_rounds([("x", text)])[1] == {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "code",
    [
        "tool_call(x=__import__('os').getpid())",
        "tool_call(**{'x': 1})",
        "tool_call('北京')",
        "other(x=1)",
        "tool_call(x=1) + 1",
        "tool_call(",
        "tool_call(x=" + "[" * 5000 + "]" * 5000 + ")",
        "tool_call(x='\0')",
        "",
    ],
    ids=lambda code: code[:30],
)
def test_nothing_but_literals_is_read(talk, code):
    """Anything else than tool_call(key=literal, ...) is returned as it was written, and nothing is evaluated."""
    assert called_with(code) is None
    if 0 < len(code) < 100 and "\0" not in code:
        response, _ = talk(f"f\n```python\n{code}\n```", [OFFER])
        assert response == {"name": "f", "content": f"```python\n{code}\n```"}


def test_cached_rounds_add_their_own_messages(make_model, three):
    """A round with a cache feeds the new message and the assistant's token, no second prefix, and answers the same."""
    model, fed = make_model(padded_vocab_size=1664, seq_length=512), []
    model.transformer.embedding.word_embeddings.register_forward_hook(lambda m, i, o: fed.append(i[0][0].tolist()))
    asked = {"return_past_key_values": True, **GREEDY}
    *_, (_, history, cache) = model.stream_chat(three, "你好", **asked)
    fed.clear()
    *_, (_, history, cache) = model.stream_chat(three, "22", history, cache, role="observation", **asked)
    assert fed[0] == three.build_single_message("observation", "", "22") + [1607]
    assert [message["role"] for message in history] == ["user", "assistant", "observation", "assistant"]


def test_system_and_limits_of_a_conversation(make_model, three):
    """system= stands in front; max_history_tokens drops the oldest rounds, never the system message of the history."""
    model = make_model(padded_vocab_size=1664, seq_length=512)
    first = model.build_inputs(three, "x", system="Be brief.")["input_ids"][0].tolist()
    assert first == three.build_chat_input("x", [{"role": "system", "content": "Be brief."}])["input_ids"][0].tolist()
    rounds = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(3)]
    history = [OFFER, *sum(rounds, [])]
    room = len(three.build_chat_input("x", [OFFER, *rounds[2]])["input_ids"][0])
    room -= len(three.build_chat_input("x", [OFFER])["input_ids"][0])
    assert model._recent_rounds(three, "x", history, room) == [OFFER, *rounds[2]]
    assert model._recent_rounds(three, "x", history, room - 1) == [OFFER]


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("x", "got a str"),
        ([("a", "b")], r"history\[0\] must be .*got \('a', 'b'\)"),
        ([{"role": "user"}], r"history\[0\] must be"),
        ([{"role": "tool", "content": "x"}], "role='tool' is unknown"),
        ([{"role": "user", "content": None}], r"content of history\[0\] must be a string, got None"),
    ],
)
def test_malformed_messages_are_rejected(make_model, three, history, message):
    """The error names the message and what it has to be."""
    with pytest.raises(ValueError, match=message):
        make_model(padded_vocab_size=1664).chat(three, "x", history)


def test_roles_are_for_chatglm3(make_model, tokenizer):
    """ChatGLM2 has no roles: an argument that it cannot honour is an error."""
    with pytest.raises(ValueError, match="role='observation': only ChatGLM3 has roles"):
        make_model(padded_vocab_size=1664).chat(tokenizer, "x", role="observation")


# CodeGeeX2


@pytest.fixture
def no_dummy_space(tmp_path):
    """A tokenizer.model that puts no space in front of a text, as CodeGeeX2's."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    model.ParseFromString((TINY / "tokenizer.model").read_bytes())
    model.normalizer_spec.add_dummy_prefix = False
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    (tmp_path / "config.json").write_text(json.dumps(CODEGEEX2))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    return ChatGLMTokenizer.from_pretrained(tmp_path)


def test_no_dummy_space(no_dummy_space, make_model):
    """Text keeps its leading space; a cached round keeps the line feeds in front of it."""
    for text in ("# language: Python\n", " x", "x"):
        assert no_dummy_space.decode(no_dummy_space.encode(text, add_special_tokens=False)) == text
    model = make_model(padded_vocab_size=1664)
    ids = model.build_stream_inputs(no_dummy_space, "b", [("a", "A")])["input_ids"][0].tolist()
    assert no_dummy_space.decode(ids) == "\n\n[Round 2]\n\n问：b\n\n答："
    assert torch.tensor(ids).shape == (
        len(no_dummy_space.encode("\n\n[Round 2]\n\n问：b\n\n答：", add_special_tokens=False)),
    )
