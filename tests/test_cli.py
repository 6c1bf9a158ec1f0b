"""demos/cli_demo.py as a person runs it: piped, and in a terminal."""

import os
import select
import signal
import subprocess
import sys
import time

import cli_demo
import pytest
from conftest import ROOT, TINY

HELLO = "你好！我是一个很小的 ChatGLM2 演示模型，很高兴和你聊天。"
COMMAND = [sys.executable, str(ROOT / "demos" / "cli_demo.py"), "--device", "cpu", "--temperature", "0"]
ENVIRONMENT = {**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run(text, *arguments):
    return subprocess.run(
        [*COMMAND, *arguments], input=text.encode(), capture_output=True, env=ENVIRONMENT, timeout=120, cwd="/"
    )


def test_piped_lines_are_answered():
    """echo 你好 | cli_demo.py prints the answer and ends; `clear` begins anew, `stop` ends; UTF-8 in any locale."""
    done = run("你好\nclear\n\n你好\nstop\n你好\n")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f"{HELLO}\n{HELLO}\n"


@pytest.mark.parametrize("options", [["--quantize", "4"], ["--dtype", "float32", "--quantize", "8"]])
def test_options(options):
    """Quantized, or in another dtype: the same answer."""
    assert run("你好\n", *options).stdout.decode() == f"{HELLO}\n"


def test_missing_folder_is_named():
    """A wrong --model ends with one line."""
    done = run("", "--model", "/nowhere")
    assert done.returncode == 1 and done.stderr.decode().startswith("/nowhere on cpu: /nowhere is not a directory")


def test_invalid_folder_is_one_message(tmp_path):
    """A truncated tokenizer.model: its name and the cure, and no traceback."""
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((TINY / name).read_text())
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes()[:500])
    done = run("", "--model", str(tmp_path))
    error = done.stderr.decode()
    assert done.returncode == 1 and "(500 bytes) is not a SentencePiece model" in error and "Traceback" not in error


IN_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # standard input becomes what Ctrl-C is typed into
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_terminal_session():
    """In a terminal: rounds, `clear`, `stop`, and Ctrl-C, which ends an answer and not the program."""
    pytest.importorskip("termios", reason="a terminal needs a POSIX system")
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", IN_A_TERMINAL, *COMMAND],
        stdin=end,
        stdout=end,
        stderr=end,
        env={**ENVIRONMENT, "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(end)
    shown = b""

    def type_in(text):
        os.write(terminal, text.encode())

    def read_until(text):
        nonlocal shown
        deadline = time.monotonic() + 60
        while text.encode() not in shown:
            ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} does not come: {shown.decode(errors='replace')}"
            shown += os.read(terminal, 4096)
        shown = shown.split(text.encode(), 1)[1]

    try:
        read_until("> ")
        type_in("你好\n")
        read_until("很高兴和你聊天。")
        read_until("> ")
        type_in("clear\n讲个笑话\n")
        read_until("闹钟")
        type_in("\x03")
        read_until("`stop` quits")
        read_until("> ")
        type_in("clear\n你好\n")
        read_until("很高兴和你聊天。")
        read_until("> ")
        type_in("stop\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_an_interrupt_at_the_prompt_drops_the_line(capsys):
    """Ctrl-C while a line is typed, or just as an answer ends: the conversation goes on, up to `stop`."""
    asked, lines = [], iter([KeyboardInterrupt, "你好", KeyboardInterrupt, "stop", "再见"])

    def read_line():
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    class Conversation:
        def answer(self, query):
            asked.append(query)
            yield "你好！"

    cli_demo.talk(Conversation(), read_line, interactive=True)
    assert asked == ["你好"] and next(lines) == "再见"
    assert capsys.readouterr().out == " … (`stop` quits)\n你好！\n … (`stop` quits)\n"


@pytest.mark.skipif(os.name == "nt", reason="SIGINT to another process needs a POSIX system")
def test_an_interrupt_of_a_pipe_ends_the_program():
    """SIGINT while it reads a pipe: no more answers, no traceback, and a shell's 130."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(COMMAND, env=ENVIRONMENT, **pipes) as process:
        process.stdin.write("你好\n".encode())
        process.stdin.flush()
        assert process.stdout.readline().decode() == f"{HELLO}\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"") and process.returncode == 130
