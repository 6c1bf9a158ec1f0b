"""demos/line_input.py in a real terminal: typed and pasted lines become messages, with readline and prompt_toolkit."""

import importlib.util
import json
import os
import stat
import sys

import line_input
import pytest
from conftest import ROOT

pytest.importorskip("termios", reason="a terminal needs a POSIX system")
from terminal_helpers import Terminal  # noqa: E402

SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT / "demos")!r})
from line_input import LineInput
read = LineInput(["/help", "/history", "/quit"])
while True:
    print("message:", repr(read()), flush=True)
"""
READY = "\x1b[?2004h"  # both turn bracketed paste on when they wait for a line


@pytest.fixture(params=["readline", "prompt_toolkit"])
def terminal(request, tmp_path):
    """A factory of terminals that print each message, with a home of their own."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    if request.param == "readline":
        (tmp_path / "prompt_toolkit.py").write_text("raise ImportError('hidden')")
    environment = {**os.environ, "HOME": str(tmp_path), "TERM": "xterm", "PYTHONPATH": str(tmp_path)}
    environment.update({"PYTHONIOENCODING": "utf-8", "LC_ALL": "C.UTF-8", "PROMPT_TOOLKIT_NO_CPR": "1"})

    def start():
        return Terminal([sys.executable, "-c", SCRIPT], environment)

    return start


def message(terminal, *typed):
    """Type each text when a line is awaited; the message that it becomes."""
    for text in typed:
        terminal.read_until(READY)
        terminal.type_in(text)
    terminal.read_until("message: '")
    return terminal.read_until("'\r\n")


def paste(text):
    return f"\x1b[200~{text}\x1b[201~"


def test_lines_pastes_and_blocks_are_messages(terminal):
    """A line; lines pasted together; lines between quotes, also after a command; a paste that only begins with them."""
    with terminal() as t:
        assert message(t, "你好 \r") == "你好"
        assert message(t, paste("def f():\n    return 1") + "\r") == r"def f():\n    return 1"
        assert message(t, '"""\r', "一\r", "  二\r", '三"""\r') == r"一\n  二\n三"
        assert message(t, '/system """be\r', 'brief"""\r') == r"/system be\nbrief"
        assert message(t, '"""' + paste("a\nb") + '"""\r') == r"a\nb"
        assert message(t, paste('"""Docs."""\nx = 1') + "\r") == r'"""Docs."""\nx = 1'
        t.read_until(READY)
        t.type_in("/q\t")
        t.read_until("/quit")
        t.type_in("\r")
        t.read_until("message: '/quit'")
        t.read_until(READY)
        t.type_in("\x04")
        t.read_until("EOFError")


def test_history_outlives_the_program(terminal, tmp_path):
    """The arrow up brings the last message of the last session, its lines together; nobody else may read the file."""
    with terminal() as t:
        message(t, paste("一\n二") + "\r")
    with terminal() as t:
        assert message(t, "\x1b[A\r") == r"一\n二"
        assert message(t, "好\r") == "好"
    path = tmp_path / line_input.HISTORY_FILE.name
    assert [json.loads(line) for line in path.read_text().splitlines()] == ["一\n二", "一\n二", "好"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_unusable_history_is_said_once(tmp_path, monkeypatch, capsys):
    """A history that cannot be read is left alone; messages are read all the same."""
    path = tmp_path / "history"
    path.write_text("not JSON\n")
    monkeypatch.setattr(line_input, "HISTORY_FILE", path)
    monkeypatch.setattr(line_input, "line_reader", lambda history, commands: lambda prompt: "你好")
    read = line_input.LineInput([])
    assert [read(), read()] == ["你好", "你好"] and path.read_text() == "not JSON\n"
    assert capsys.readouterr().out.count("The line history is not kept") == 1
