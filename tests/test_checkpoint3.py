"""The small ChatGLM3 of examples/tiny3: it answers its dialogues, with system messages, tools and observations, and
what is around the model takes it as it takes ChatGLM2: demos, sessions, training, evaluation, quantization, export."""

import json
import subprocess
import sys

import pytest
import torch
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from conftest import ROOT, TINY3, import_train
from data import IGNORED, make_examples, rounds_of_messages
from sessions import Sessions

HELLO = "你好！我是一个很小的 ChatGLM3 演示模型，会调用工具。"
TIMES = "12 乘以 34 等于多少？"
CALL = {"name": "calculate", "parameters": {"a": 12, "operator": "*", "b": 34}}


@pytest.fixture(scope="module")
def three():
    return ChatGLMTokenizer.from_pretrained(TINY3)


@pytest.fixture(scope="module")
def model():
    """In float32; tests must not change it."""
    return ChatGLMForConditionalGeneration.from_pretrained(TINY3).float().eval()


@pytest.fixture(scope="module")
def dialogues():
    with open(TINY3 / "dialogues.jsonl", encoding="utf-8") as f:
        return [json.loads(line)["messages"] for line in f]


def asked(dialogues, query):
    """The messages of the dialogue that begins with this question."""
    return next(messages for messages in dialogues if query in [message["content"] for message in messages[:2]])


def test_dialogues_have_all_kinds_of_messages(dialogues):
    """System messages with and without tools, calls, text in front of a call, several calls, and observations."""
    roles = [[message["role"] for message in messages] for messages in dialogues]
    assert 20 <= len(dialogues) <= 40 and sum("observation" in row for row in roles) >= 10
    assert any(pair == ("assistant", "assistant") for row in roles for pair in zip(row, row[1:]))
    assert max(row.count("observation") for row in roles) >= 3
    assert [row[0] for row in roles].count("user") >= 5 and not all("tools" in row[0] for row in dialogues)


@pytest.mark.needs_transformers("4.57", "the Trainer that the training script was written for")
@pytest.mark.parametrize(
    ("dtype", "bits"), [("float32", 0), ("bfloat16", 0), ("float16", 0), ("float32", 8), ("bfloat16", 4)]
)
def test_all_dialogues_are_answered(three, dialogues, dtype, bits):
    """Every question and observation, greedy: the messages of the data, with the tools that they call."""
    model = ChatGLMForConditionalGeneration.from_pretrained(TINY3, torch_dtype=getattr(torch, dtype)).quantize(bits)
    assert import_train().wrong_messages(model.eval(), three, dialogues) == []


def test_a_tool_from_start_to_end(model, three, dialogues):
    """chat, stream_chat, and stream_chat on one cache: question, call, observation, answer."""
    messages = asked(dialogues, TIMES)
    for cached in (None, False, True):
        history, cache, said = messages[:1], None, []
        for query, role in ((TIMES, "user"), ("408", "observation")):
            if cached is None:
                response, history = model.chat(three, query, history, role=role, do_sample=False)
            else:
                options = {"role": role, "do_sample": False, "return_past_key_values": cached}
                *_, last = model.stream_chat(three, query, history, cache, **options)
                response, history, cache = last if cached else (*last, None)
            said.append(response)
        assert said == [CALL, "12 乘以 34 等于 408。"] and history == messages


def test_files(three, model):
    """What a released folder holds, with the family saved; the tokenizer.model of the tiny checkpoint; at most 4 MB."""
    assert three.model_family == model.config.model_family == "chatglm3" and model.config.seq_length == 8192
    assert model.config.eos_token_id == model.generation_config.eos_token_id == three.stop_ids()
    assert (TINY3 / "tokenizer.model").resolve() == ROOT / "examples" / "tiny" / "tokenizer.model"
    assert (TINY3 / "model.safetensors").stat().st_size <= 4e6
    names = {path.name for path in (ROOT / "examples" / "tiny").glob("*.py")} - {"train.py"}
    assert {path.name for path in TINY3.glob("*.py")} == names and all(path.exists() for path in TINY3.glob("*"))


# Around the model


def test_sessions(model, three):
    """The page's turns: answered as without a cache, and a turn encodes its own message alone."""
    sessions, history, answer = Sessions(model, three), [], "数学书为什么不开心？因为它的问题太多了。"
    for query in ("讲个笑话", "再讲一个"):
        *_, progress = sessions.stream("a", query, history, temperature=0, max_new_tokens=60)
        history = [*history, (query, progress.text)]
    assert progress.text == answer and "<|" not in history[0][1]
    assert progress.encoded == len(three.build_single_message("user", "", query)) + 1
    *_, lost = Sessions(model, three).stream("b", query, history[:1], temperature=0, max_new_tokens=60)
    assert lost.text == answer and lost.encoded > progress.encoded
    *_, brief = sessions.stream("a", "太阳是什么", [], "请用一句话回答。", temperature=0, max_new_tokens=60)
    assert brief.text == "太阳是离地球最近的恒星。"


def test_training_examples(three, dialogues):
    """Each answer with what ends it: the next role, or </s>. Together they are the dialogue, as the mask has it."""
    messages = asked(dialogues, "深圳热吗？")
    rounds = rounds_of_messages(1, messages, three.conversation.roles)
    rows = make_examples(three, rounds, 2000, 200, progress=False).rows
    learned = [i for row in rows for i in row["labels"] if i != IGNORED]
    text = three.decode(learned, skip_special_tokens=False)
    assert text.count("<|assistant|>") == text.count("<|observation|>") == 1 and learned[-1] == three.eos_token_id
    if hasattr(ChatGLMTokenizer.__base__, "apply_chat_template"):
        out = three.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert rows[-1]["input_ids"] == out["input_ids"]
        assert learned == [i for i, mask in zip(out["input_ids"], out["assistant_masks"]) if mask]
    openai = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "好。"},
    ]
    call, answer = rounds_of_messages(1, openai, three.conversation.roles)
    assert (call.metadata, call.answer, call.next_role) == ("f", "```python\ntool_call(a=1)\n```", "observation")
    assert [message["role"] for message in answer.messages] == ["user", "assistant", "observation"]
    with pytest.raises(ValueError, match="'user' is expected"):
        rounds_of_messages(1, [{"role": "observation", "content": "x"}])
    with pytest.raises(ValueError, match="the role 'robot': give one of system"):
        rounds_of_messages(1, [{"role": "robot", "content": "x"}], three.conversation.roles)


def test_evaluation_reads_the_letter_behind_the_first_line(model, three):
    """C-Eval's letter is the text's first token, which follows the empty line of metadata."""
    from evaluate_ceval import Judge, Question

    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0][0].tolist()))
    try:
        Judge(model, three).letters([Question("0", "x", "A", "there")], [Question("1", "y", "B", "there")])
    finally:
        hook.remove()
    history = [{"role": "user", "content": "y"}, {"role": "assistant", "content": "B"}]
    prompt = three.build_chat_input("x", history)["input_ids"][0].tolist()
    assert seen == [prompt + three.encode("\n", add_special_tokens=False)]


def test_terminal(model, three, capsys):
    """A call is shown as text, /observation answers it, `clear` offers the tools again; without tools, plain chat."""
    import cli_demo
    from conversation import Conversation

    args = cli_demo.parse_arguments(["--temperature", "0", "--tools", str(TINY3 / "tools.json")])
    chat = cli_demo.Chat(Conversation(model, three, tools=args.tools, do_sample=False), args)
    for typed, shown in (
        ("/regenerate", "There is no message yet."),
        (TIMES, json.dumps(CALL)),
        ("/observation 408", "12 乘以 34 等于 408。"),
        ("/regenerate", json.dumps(CALL)),
        ("clear", ""),
        ("你有哪些工具？", "我可以查询天气，也可以做加减乘除。"),
    ):
        chat.take(typed)
        assert capsys.readouterr().out.strip() == shown
    command = [sys.executable, ROOT / "demos" / "cli_demo.py", "--device", "cpu", "--temperature", "0"]
    done = subprocess.run(
        [*command, "--model", TINY3], input="你好\n", capture_output=True, text=True, encoding="utf-8"
    )
    assert done.stdout == HELLO + "\n", done.stderr
    done = subprocess.run([*command, "--tools", TINY3 / "tools.json"], input="你好\n", capture_output=True, text=True)
    assert "only ChatGLM3 calls tools" in done.stderr and "Traceback" not in done.stderr


def test_a_saved_conversation_keeps_its_calls(model, three, capsys, tmp_path):
    """/save and /load: the next prompt has the same ids. The page and fine-tuning read the file, too."""
    import cli_demo
    from conversation import Conversation
    from conversations import read_conversation

    path, prompts = tmp_path / "chat.json", []
    args = cli_demo.parse_arguments(["--temperature", "0", "--tools", str(TINY3 / "tools.json")])
    for typed in ((TIMES, "/observation 408", f"/save {path}"), (f"/load {path}",)):
        chat = cli_demo.Chat(Conversation(model, three, tools=args.tools, do_sample=False), args)
        for line in typed:
            chat.take(line)
        assert capsys.readouterr().out.splitlines()[-1].startswith("2 rounds ")
        prompts.append(three.conversation.prompt(three, "好", chat.conversation.history))
    assert prompts[0] == prompts[1] and "calculate" in [m.get("metadata") for m in chat.conversation.history]
    text = path.read_text(encoding="utf-8")
    system, turns = read_conversation(text)
    assert system == ""
    assert [text.partition("\n")[0] for _, text in turns] == [TIMES, "calculate", "408", "12 乘以 34 等于 408。"]
    learned = rounds_of_messages(1, json.loads(text)["messages"], three.conversation.roles)
    assert [(each.metadata, each.next_role) for each in learned] == [("calculate", "observation"), ("", None)]
    assert learned[0].messages[0]["tools"] == args.tools


def test_answers_are_read_as_the_server_reads_them(three):
    """The response template: text, calls with their literals, text in front of a call, and what is no call."""
    parsing = pytest.importorskip("transformers.utils.chat_parsing", reason="this transformers reads no answers")
    if not hasattr(parsing, "ResponseParser"):
        pytest.skip("this transformers reads no answers")
    fence = "```python\ntool_call({})\n```<|observation|>"

    def call(name, arguments):
        return {"tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}

    for text, message, pieces in (
        ("\n 你好！<|user|>", {"content": "你好！"}, "你好！"),
        ("第一行\n第二行", {"content": "第一行\n第二行"}, "第一行\n第二行"),
        ("get_weather\n " + fence.format("city='北)京'"), call("get_weather", {"city": "北)京"}), ""),
        ("now\n " + fence.format(""), call("now", {}), ""),
        (
            "\n 我查。<|assistant|>f\n " + fence.format("n=-3, q=\"a'b\", t=[1, {'k': 2}]"),
            {"content": "我查。", **call("f", {"n": -3, "q": "a'b", "t": [1, {"k": 2}]})},
            "我查。",
        ),
        ("f\n ```python\nprint(1)\n```", {"content": "f\n ```python\nprint(1)\n```"}, "f\n ```python\nprint(1)\n```"),
    ):
        parser = parsing.ResponseParser(three.response_template, prefix="<|user|> \n x<|assistant|>")
        events = [event for char in text for event in parser.feed(char)] + parser.finalize()[1]
        chunks = [event["text"] for event in events if event["type"] == "region_chunk" and event["field"] == "content"]
        assert "".join(chunks) == pieces
        assert three.parse_response(text, prefix="x") == three.tokenizer.parse_response(text, prefix="x") == message


@pytest.mark.needs_transformers("4.46", "GlmForCausalLM")
def test_exports_are_refused(tmp_path):
    """GLM's folder and GGUF get ChatGLM2's prompt: a ChatGLM3 is refused, not written with the wrong one."""
    import to_glm

    with pytest.raises(ValueError, match="model_family=chatglm3: .*prompt"):
        to_glm.export(TINY3, tmp_path / "glm")


def test_the_page_calls_a_tool(model, three, dialogues):
    """A call is an answer of the page, and the next message its result, encoded alone; a lost session goes on, too."""
    messages = asked(dialogues, TIMES)
    tools, wanted = messages[0]["tools"], [message["content"] for message in messages if message["role"] == "assistant"]
    sessions, settings = Sessions(model, three, tools=tools), {"temperature": 0, "max_new_tokens": 80}
    *_, call = sessions.stream("a", TIMES, [], **settings)
    assert call.text == f"calculate\n {wanted[0]}"
    for page in (sessions, Sessions(model, three, tools=tools)):
        *_, answer = page.stream("a", "408", [(TIMES, call.text)], **settings)
        assert answer.text == wanted[1] == "12 乘以 34 等于 408。"
        assert (answer.encoded < 12) == (page is sessions)


def test_tools_are_for_chatglm3(tiny_model, tokenizer):
    """ChatGLM2 calls none: the page says so before it starts."""
    with pytest.raises(ValueError, match="only ChatGLM3 calls tools"):
        Sessions(tiny_model, tokenizer, tools=[{"name": "f"}])
