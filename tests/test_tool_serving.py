"""Tools through transformers' own server: the small ChatGLM3, asked by the real `openai` client."""

import json
import re

import pytest
from conftest import ROOT, TINY3
from test_serving import serving

pytestmark = pytest.mark.tools

TOOLS = [
    {"type": "function", "function": tool} for tool in json.loads((TINY3 / "tools.json").read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving("examples/tiny3", tmp_path_factory.mktemp("serve") / "log.txt") as (url, _):
        yield url


@pytest.fixture
def ask(url):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield lambda messages, **options: client.chat.completions.create(
            model="examples/tiny3", messages=messages, tools=TOOLS, temperature=0, max_tokens=100, **options
        )


def test_the_page(url, monkeypatch, capsys):
    """The block of docs/chatglm3.md: `tools` in, `tool_calls` out, `role: tool` back, and the answer."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "chatglm3.md").read_text(encoding="utf-8")
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "localhost" in text)
    exec(block.replace("http://localhost:8000/v1", url), {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"print\(.*\) *# (.*)", block)


def test_several_calls(ask):
    """Until the answer comes, each call is run; the server says why it stopped."""
    messages, results = [{"role": "user", "content": "北京比西安热几度？"}], iter(["晴，25 度", "晴，18 度", "7"])
    called = []
    while (choice := ask(messages).choices[0]).finish_reason == "tool_calls":
        (call,) = choice.message.tool_calls
        called.append((call.function.name, json.loads(call.function.arguments)))
        messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": next(results)}]
    assert choice.message.content == "北京比西安热 7 度。" and choice.finish_reason == "stop"
    cities = [("get_weather", {"city": "北京"}), ("get_weather", {"city": "西安"})]
    assert called == [*cities, ("calculate", {"a": 25, "operator": "-", "b": 18})]


def test_stream(ask):
    """A stream holds a call whole and none of its text; text comes in pieces, without the line in front of it."""
    chunks = [chunk.choices[0] for chunk in ask([{"role": "user", "content": "What is 7 plus 8?"}], stream=True)]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [json.loads(call.function.arguments) for call in calls] == [{"a": 7, "operator": "+", "b": 8}]
    assert not any(chunk.delta.content for chunk in chunks) and chunks[-1].finish_reason == "tool_calls"
    chunks = list(ask([{"role": "user", "content": "你有哪些工具？"}], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "我可以查询天气，也可以做加减乘除。"
