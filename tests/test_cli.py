"""cli_demo.py as a person runs it: piped, and in a terminal."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, TINY

HELLO = "你好！我是一个很小的 ChatGLM2 演示模型，很高兴和你聊天。"
COMMAND = [sys.executable, str(ROOT / "cli_demo.py"), "--device", "cpu", "--temperature", "0"]
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


def test_a_folder_that_is_none_is_named():
    """A wrong --model ends with one line."""
    done = run("", "--model", "/nowhere")
    assert done.returncode == 1 and done.stderr.decode().startswith("/nowhere is no folder")


def test_what_is_wrong_with_a_folder_is_one_message(tmp_path):
    """A truncated tokenizer.model: its name and the cure, and no traceback."""
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((TINY / name).read_text())
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes()[:500])
    done = run("", "--model", str(tmp_path))
    error = done.stderr.decode()
    assert done.returncode == 1 and "(500 bytes) is not a SentencePiece model" in error and "Traceback" not in error


def test_a_terminal_session(tmp_path):
    """In a terminal: rounds, `clear`, `stop`, and Ctrl-C, which ends an answer and not the program."""
    pty = pytest.importorskip("pty", reason="a terminal needs a POSIX system")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(COMMAND[0], COMMAND, {**ENVIRONMENT, "TERM": "dumb"})
    shown = b""

    def read_until(text):
        nonlocal shown
        end = time.time() + 60
        while text.encode() not in shown:
            assert time.time() < end, shown.decode(errors="replace")
            shown += os.read(terminal, 4096)
        shown = shown.split(text.encode(), 1)[1]

    try:
        read_until("> ")
        os.write(terminal, "你好\n".encode())
        read_until("很高兴和你聊天。")
        read_until("> ")
        os.write(terminal, "clear\n讲个笑话\n".encode())
        read_until("闹钟")
        os.write(terminal, b"\x03")
        read_until("> ")
        os.write(terminal, "clear\n你好\n".encode())
        read_until("很高兴和你聊天。")
        read_until("> ")
        os.write(terminal, b"stop\n")
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        os.close(terminal)
