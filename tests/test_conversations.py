"""lib/conversations.py: what an exported conversation may hold."""

import json

import pytest
from chatglm2.family_chatglm import Roles, Rounds
from conversations import read_conversation, rounds_of, written


def test_a_conversation_is_read():
    """With and without a system message; an empty one; text as it is."""
    turns = [("user", "  a\n"), ("assistant", ""), ("user", "b")]
    messages = [{"role": role, "content": content, "more": 1} for role, content in turns]
    assert read_conversation(json.dumps({"messages": messages})) == ("", turns)
    system = {"role": "system", "content": "s"}
    assert read_conversation(json.dumps({"messages": [system, *messages]})) == ("s", turns)
    assert read_conversation('{"messages": []}') == ("", [])


@pytest.mark.parametrize("system", ["", "请简短。"])
def test_what_is_written_is_read(system):
    """ChatGLM2's rounds; ChatGLM3's messages, with text in front of a call, its result, and a last question."""
    turns = [("user", "a"), ("assistant", "b\n"), ("user", "c")]
    assert read_conversation(written(Rounds(), [("a", "b\n")], system, "c")) == (system, turns)
    form, call = Roles(), "```python\ntool_call(x=1)\n```"
    history = form.offer([{"name": "f"}], system) + form.from_rounds([("a", f"I ask.<|assistant|>f\n {call}")])
    text = written(form, history, question="2")
    assert [message["role"] for message in json.loads(text)["messages"]] == [
        "system", "user", "assistant", "assistant", "observation"
    ]  # fmt: skip
    read, turns = read_conversation(text)
    assert (read, turns) == (system, [("user", "a"), ("assistant", f"I ask.<|assistant|>f\n {call}"), ("user", "2")])
    assert history[1:] == form.from_rounds(rounds_of(turns))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Not a conversation"),
        ("[]", "Not a conversation"),
        ("[" * 100_000, "Not a conversation"),
        ('{"messages": 1}', "Not a conversation"),
        ('{"messages": [{"role": "user"}]}', "Not a conversation"),
        ('{"messages": [["user", "a"]]}', "Not a conversation"),
        ('{"messages": [{"role": "assistant", "content": "a", "metadata": 1}]}', "metadata must be text"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', r"messages\[0\]: the role 'tool'"),
        ('{"messages": [{"role": "user", "content": [{"file": {"path": "/etc/passwd"}}]}]}', "content must be text"),
        (
            r'{"messages": [{"role": "user", "content": "a\ud800"}]}',
            r"messages\[0\] cannot be encoded in UTF-8: character 1",
        ),
    ],
)
def test_what_is_no_conversation_is_an_error(text, message):
    """Broken JSON, other JSON, unknown roles, content that is not text."""
    with pytest.raises(ValueError, match=message):
        read_conversation(text)


def test_a_second_system_message_is_an_error():
    """The page has one place for it."""
    system = {"role": "system", "content": "s"}
    with pytest.raises(ValueError, match=r"messages\[1\]"):
        read_conversation(json.dumps({"messages": [system, system]}))
