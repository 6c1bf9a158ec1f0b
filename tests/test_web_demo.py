"""demos/web_demo.py in a real browser. `python tests/test_web_demo.py` writes the pictures of both demos in docs/."""

import html
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY3, until
from web_helpers import DIALOGUES, SPAIN, SUN, Chat, chromium, command, has_ended

pytestmark = pytest.mark.tools


# Talking


def test_a_conversation(server, open_chat):
    """The answer grows on the page, then is the dialogue's; so is the second turn's; a reload begins anew."""
    chat = open_chat(server)
    chat.page.evaluate(
        """() => { window.seen = [];
        new MutationObserver(() => {
            const text = document.querySelector('.message.bot:not(.pending)')?.innerText;
            if (text && text !== window.seen.at(-1)) window.seen.push(text);
        }).observe(document.body, {subtree: true, childList: true, characterData: true}); }"""
    )
    chat.ask(SUN[0][0])
    chat.shows(SUN[0])
    seen = chat.page.evaluate("window.seen")
    assert len(seen) > 3 and all(SUN[0][1].startswith(text) for text in seen)
    chat.ask(SUN[1][0])
    chat.shows(*SUN[:2])
    chat.page.reload()
    chat.box.wait_for()
    chat.shows()
    chat.ask(SPAIN[0][0])
    chat.shows(SPAIN[0])


def test_errors_are_shown_and_the_conversation_stays(server, open_chat):
    """An empty message and one that is too long say so; what was said before stays, and can be gone on with."""
    chat = open_chat(server)
    toast = chat.page.locator(".toast-body")
    chat.ask(SUN[0][0])
    chat.shows(SUN[0])
    chat.ask("  ")
    toast.get_by_text("Type a message first").wait_for()
    chat.shows(SUN[0])
    too_long = "sun " * 1100
    chat.ask(too_long)
    toast.get_by_text("exceed seq_length=1024").wait_for()
    chat.wait_until_ready()
    assert chat.texts("bot") == [SUN[0][1]] and "Traceback" not in chat.page.locator("body").inner_text()
    chat.page.get_by_label("Edit", exact=True).last.click()
    chat.page.locator(".edit-textarea").fill(SUN[1][0])
    chat.press("Submit")
    chat.shows(*SUN[:2])


def test_formulas_are_rendered_and_html_is_escaped(server, open_chat):
    """The four kinds of LaTeX delimiters; Markdown; a script and an onerror that do nothing."""
    chat = open_chat(server)
    chat.ask(r"\(a\) $b$ $$c$$ \[d\] **e** <script>window.run = 1</script><img src=x onerror='window.run = 2'>")
    message = chat.page.locator(".message.user")
    message.locator("strong", has_text="e").wait_for()
    chat.wait_until_ready()
    assert message.locator(".katex").count() == 4 and message.locator(".katex-display").count() == 2
    assert chat.page.evaluate("window.run") is None and message.locator("script, [onerror]").count() == 0


@pytest.mark.parametrize("language, label", [("en-US", "Settings"), ("zh-CN", "参数")])
def test_labels_follow_the_browser_language(server, open_chat, language, label):
    """English and Chinese labels. No request leaves the server: the page works with no network."""
    chat = open_chat(server, language)
    chat.page.locator(".label-wrap", has_text=label).wait_for()
    chat.wait_until_connected()
    assert all(url.startswith((server, "data:", "blob:")) for url in chat.requests), chat.requests


# What reaches the model, and when it stops


def test_retry_edit_and_clear(serve, open_chat):
    """A second try asks the same; an edited question drops what came after it; clear forgets all."""
    served = serve(endless=False, seconds=0)
    chat = open_chat(served.url)
    asked = []

    def shows(*turns):
        asked.append((turns[-1][0], [tuple(turn) for turn in turns[:-1]]))
        chat.wait_until(lambda: len(served.calls) == len(asked), "not asked")
        chat.shows(*turns)

    chat.ask(SUN[0][0])
    shows(SUN[0])
    chat.ask(SUN[1][0])
    shows(*SUN[:2])
    chat.press("Retry")
    shows(*SUN[:2])
    chat.press("Edit")
    chat.page.locator(".edit-textarea").fill(SPAIN[0][0])
    chat.press("Submit")
    shows(SPAIN[0])
    chat.ask(SPAIN[1][0])
    shows(*SPAIN[:2])
    chat.press("Clear")
    chat.shows()
    chat.ask(SUN[0][0])
    shows(SUN[0])
    assert [(query, history) for query, history, _ in served.calls] == asked


def test_stop_ends_generation(serve, open_chat):
    """Stop ends the model's work and frees its place. What was said stays, and is the next question's history."""
    served = serve()
    chat, other = open_chat(served.url), open_chat(served.url)
    question = "def f():\n    return 1"
    chat.ask(question)
    chat.wait_until(lambda: "".join(chat.texts("bot")), "no answer")
    other.ask(SUN[0][0])
    other.page.get_by_text("queue: 1/1").first.wait_for()
    chat.stop()
    chat.wait_until_ready()
    [said] = chat.texts("bot")
    other.wait_until(lambda: "".join(other.texts("bot")), "the place was not freed")
    other.stop()
    other.wait_until_ready()
    assert has_ended(served) and chat.texts("bot") == [said]
    chat.ask("more")
    chat.wait_until(lambda: all(chat.texts("bot")[1:] or [""]), "no second answer")
    chat.stop()
    query, history, _ = served.calls[-1]
    assert query == "more" and [asked for asked, _ in history] == [question] and said in history[0][1]
    chat.wait_until_ready()
    chat.press("Retry")
    chat.wait_until(lambda: len(served.calls) == 4, "not asked again after a stop")
    assert served.calls[-1][0] == "more"


def test_stop_while_waiting(serve, open_chat):
    """A question that is stopped in the queue is never answered, and does not come up as history."""
    served = serve()
    chat, other = open_chat(served.url), open_chat(served.url)
    chat.ask("hello")
    chat.wait_until(lambda: served.calls, "not asked")
    other.ask("never mind")
    other.page.get_by_text("queue: 1/1").first.wait_for()
    other.stop()
    other.wait_until_ready()
    chat.stop()
    other.ask("hello")
    other.wait_until(lambda: len(served.calls) == 2, "not asked")
    assert served.calls[1][:2] == ("hello", [])


@pytest.mark.parametrize("how", ["clear", "close"])
def test_leaving_ends_generation(serve, open_chat, how):
    """Clear and a closed page end the model's work, too."""
    served = serve()
    chat = open_chat(served.url)
    chat.ask("hello")
    chat.wait_until(lambda: "".join(chat.texts("bot")), "no answer")
    {"clear": lambda: chat.press("Clear"), "close": chat.page.close}[how]()
    until(lambda: has_ended(served), "the model goes on")
    assert len(served.steps) < 200  # of the 512 that the answer was allowed
    if how == "clear":
        chat.shows()


def test_clear_over_a_slow_connection(serve, open_chat):
    """What the model says until it hears of Clear brings nothing back; the next question begins a conversation."""
    served = serve()
    chat, held = open_chat(served.url), []
    chat.page.route("**/cancel", lambda route: held.append(route), times=1)
    chat.ask("hello")
    chat.wait_until(lambda: "".join(chat.texts("bot")), "no answer")
    chat.press("Clear")
    chat.wait_until(lambda: held, "nothing was cancelled")
    steps = len(served.steps)
    chat.wait_until(lambda: len(served.steps) > steps + 5, "the model does not go on")
    held[0].continue_()
    chat.shows()
    chat.ask("more")
    chat.wait_until(lambda: "".join(chat.texts("bot")), "no second answer")
    chat.stop()
    chat.wait_until_ready()
    assert chat.texts("user") == ["more"] and len(chat.texts("bot")) == 1
    assert [(query, history) for query, history, _ in served.calls] == [("hello", []), ("more", [])]


def test_settings_reach_the_model(serve, open_chat):
    """The three sliders and the system prompt."""
    served = serve(endless=False, seconds=0)
    chat = open_chat(served.url)
    chat.open_settings()
    values = {"Temperature": "0.5", "Top-p": "0.6", "Max new tokens": "7"}
    chat.set({**values, "System prompt": " 请简短回答。\n"})
    sliders = chat.page.locator("input[type=range]")
    chat.wait_until(
        lambda: [slider.input_value() for slider in sliders.all()] == [*values.values()], "the sliders do not follow"
    )
    chat.ask("hello")
    chat.wait_until(lambda: served.calls and chat.texts("bot"), "no answer")
    chat.wait_until_ready()
    chat.set({"Temperature": "0"})
    chat.ask("hello")
    chat.wait_until(lambda: len(served.calls) == 2, "not asked")
    sampled, greedy = (settings for _, _, settings in served.calls)
    assert sampled == {"temperature": 0.5, "top_p": 0.6, "max_new_tokens": 7, "system": "请简短回答。"}
    assert greedy == {**sampled, "temperature": 0}


def test_a_turn_encodes_only_itself(serve, open_chat):
    """Each page has a cache of its own: told by the page, gone with Clear and with the page."""
    served = serve(endless=False, seconds=0)
    chat, other = open_chat(served.url), open_chat(served.url, "zh-CN")

    def encoded():
        text = chat.page.locator("#status").inner_text()
        return int(re.fullmatch(r"First token after .* s, then .* tokens/s. Context: .*, (\d+) encoded .*", text)[1])

    chat.ask(SUN[0][0])
    chat.shows(SUN[0])
    other.ask(SPAIN[0][0])
    other.shows(SPAIN[0])
    text = other.page.locator("#status").inner_text()
    assert re.fullmatch(r"首个 token 用时 .* 秒，之后每秒 .* 个。上下文 .* / 1,024 token，本轮新编码 \d+ 个。", text)
    chat.ask(SUN[1][0])
    chat.shows(*SUN[:2])
    question = "\n\n" + served.sessions.tokenizer.build_round(2, SUN[1][0])
    assert encoded() == len(served.sessions.tokenizer.encode(question, add_special_tokens=False)) - 1
    chat.press("Retry")
    chat.wait_until(lambda: len(served.calls) == 4, "not asked")
    chat.shows(*SUN[:2])
    assert encoded() == 1  # the last of the same prompt
    assert len(served.sessions.idle) == 2
    chat.press("Clear")
    until(lambda: len(served.sessions.idle) == 1, "Clear keeps the cache")
    chat.wait_until(lambda: not chat.page.locator("#status").inner_text(), "Clear keeps the figures")
    other.page.close()
    until(lambda: not served.sessions.idle, "a closed page keeps its cache")


def test_examples(server, open_chat):
    """One click asks a question that the tiny checkpoint knows."""
    chat = open_chat(server)
    chat.page.get_by_text("讲个笑话").click()
    chat.shows(DIALOGUES["讲个笑话"][0])


def test_export_and_import(serve, open_chat, tmp_path):
    """What one page writes, system prompt included, another reads, and goes on with. A broken file is an error."""
    served = serve(endless=False, seconds=0)
    chat, other = open_chat(served.url), open_chat(served.url)
    for page in (chat, other):
        page.open_settings()
    chat.set({"System prompt": "  请简短回答。"})
    question = "def f():\n    return '<b>😀</b>'"
    chat.ask(question)
    chat.wait_until(lambda: "".join(chat.texts("bot")), "no answer")
    chat.wait_until_ready()
    [answer] = chat.texts("bot")
    with chat.page.expect_download() as download:
        chat.page.get_by_text("Export").click()
    file = tmp_path / "chat.json"
    download.value.save_as(file)
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [(m["role"], m["content"]) for m in messages] == [
        ("system", "  请简短回答。"),
        ("user", question),
        ("assistant", answer),
    ]

    def read():
        with other.page.expect_file_chooser() as chooser:
            other.page.get_by_text("Import").click()
        chooser.value.set_files(file)

    read()
    other.wait_until(lambda: other.texts("bot") == [answer], "not imported")
    other.ask("more")
    other.wait_until(lambda: len(served.calls) == 2, "not asked")
    query, history, settings = served.calls[1]
    assert (query, history, settings["system"]) == ("more", [(question, answer)], "请简短回答。")
    other.wait_until_ready()
    file.write_text('{"messages": [{"role": "tool", "content": "x"}]}')
    read()
    other.page.locator(".toast-body").get_by_text("messages[0]: the role 'tool'").wait_for()
    assert other.texts("bot")[0] == answer


@pytest.mark.parametrize("concurrency", [1, 2])
def test_users_do_not_mix(serve, concurrency):
    """Two clients at once: with one place in turns, with two side by side; each gets its own answers."""
    client = pytest.importorskip("gradio_client")
    served = serve("--concurrency", str(concurrency), endless=False, seconds=0.02)
    dialogues = [SUN[:2], SPAIN[:2]]
    clients = [client.Client(served.url, verbose=False) for _ in dialogues]
    histories = [[], []]
    for turn in range(2):
        for history, dialogue in zip(histories, dialogues):
            history.append({"role": "user", "content": [{"type": "text", "text": dialogue[turn][0]}]})
        jobs = [c.submit(h, 0, 0.8, 100, "", api_name="/chat") for c, h in zip(clients, histories)]
        histories = [job.result(timeout=30)[0] for job in jobs]
    answers = [[m["content"][0]["text"] for m in history if m["role"] == "assistant"] for history in histories]
    assert answers == [[answer for _, answer in dialogue] for dialogue in dialogues]
    switches = sum(a != b for a, b in zip(served.steps, served.steps[1:]))
    assert switches == 3 if concurrency == 1 else switches > 6


def test_tools(open_chat):
    """A ChatGLM3's call of a tool is shown; the next message is what the tool returned, and is exported as that."""
    with command("--model", str(TINY3), "--tools", str(TINY3 / "tools.json")) as url:
        chat = open_chat(url)
        for text, answer in (
            ("12 乘以 34 等于多少？", "tool_call(a=12, operator='*', b=34)"),
            ("408", "12 乘以 34 等于 408。"),
        ):
            chat.ask(text)
            chat.wait_until(lambda answer=answer: any(answer in shown for shown in chat.texts("bot")), f"no {answer}")
            chat.wait_until_ready()
        chat.open_settings()
        with chat.page.expect_download() as download:
            chat.page.get_by_text("Export").click()
        messages = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "observation", "assistant"]
    assert messages[0]["tools"] == json.loads((TINY3 / "tools.json").read_text(encoding="utf-8"))
    assert messages[2]["metadata"] == "calculate" and messages[3]["content"] == "408"


def test_half_a_surrogate_pair_is_refused(tiny_model, tokenizer):
    """JavaScript's strings may hold one. The page could not be sent back with it, and would wait for ever."""
    import gradio
    import web_demo
    from sessions import Sessions

    page = web_demo.build(Sessions(tiny_model, tokenizer), web_demo.parse_arguments([]))
    ask, edit = (next(f.fn for f in page.fns.values() if f.name == name) for name in ("ask", "edit"))
    for call in (lambda: ask("你好\ud800", []), lambda: edit([], SimpleNamespace(index=0, value="你好\ud800"))):
        with pytest.raises(gradio.Error) as refused:
            call()
        assert "the message cannot be encoded in UTF-8: character 2 is '\\ud800'" in refused.value.message


def test_zero_users_are_rejected(serve, capsys):
    """--concurrency 0 would leave every question in the queue."""
    with pytest.raises(SystemExit):
        serve("--concurrency", "0")
    assert "--concurrency 0 would never answer" in capsys.readouterr().err


def take_picture_of_the_page(path):
    """A dialogue in both languages under Chinese labels, the settings open."""
    turns = DIALOGUES["what does 半途而废 mean"]
    with command() as url, chromium() as browser:
        chat = Chat(browser, url, "zh-CN")
        chat.page.set_viewport_size({"width": 1000, "height": 960})
        for i, (query, _) in enumerate(turns, start=1):
            chat.ask(query)
            chat.shows(*turns[:i])
        chat.open_settings()
        chat.page.wait_for_timeout(500)  # the settings unfold
        chat.page.screenshot(path=path)


def take_picture_of_the_terminal(path):
    """What a pseudo terminal shows of two dialogues and the commands."""
    from terminal_helpers import Terminal

    shown = "$ python demos/cli_demo.py --temperature 0 --stats\n"
    program = [sys.executable, str(ROOT / "demos" / "cli_demo.py"), "--temperature", "0", "--stats", "--device", "cpu"]
    with Terminal(program, {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"}) as terminal:
        terminal.read_until("\n")  # importing
        for typed in ("你好", "clear", SUN[0][0], SUN[1][0], "/help", "/quit"):
            shown += terminal.read_until("> ") + "> "
            terminal.type_in(typed + "\n")
        shown += "/quit"
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1000, "height": 200})
        style = "margin: 0; padding: 16px; background: #0d1117; color: #e6edf3; font: 14px/1.45 monospace"
        shown = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]|[^\n]*\r(?!\n)|\r", "", shown).replace(f"{ROOT}{os.sep}", "")
        text = html.escape(shown)
        page.set_content(f"<body style='margin: 0'><pre style='{style}; white-space: pre-wrap'>{text}</pre>")
        page.screenshot(path=path, full_page=True)


if __name__ == "__main__":
    take_picture_of_the_page(ROOT / "docs" / "web_demo.png")
    take_picture_of_the_terminal(ROOT / "docs" / "cli_demo.png")
