"""demos/cli_demo.py as a person runs it: piped, and in a terminal."""

import contextlib
import os
import re
import signal
import subprocess
import sys

import cli_demo
import pytest
from conftest import ROOT, TINY
from conversation import Conversation
from options import sampling

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
    assert done.returncode == 1 and done.stderr.decode().startswith("/nowhere is not a directory")


def test_invalid_folder_is_one_message(tmp_path):
    """A truncated tokenizer.model: its name and the cure, and no traceback."""
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((TINY / name).read_text())
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes()[:500])
    done = run("", "--model", str(tmp_path))
    error = done.stderr.decode()
    assert done.returncode == 1 and "(500 bytes) is not a SentencePiece model" in error and "Traceback" not in error


def test_a_terminal_session(tmp_path):
    """In a terminal: rounds, `clear`, `stop`, commands, and Ctrl-C, which ends an answer and not the program."""
    pytest.importorskip("termios", reason="a terminal needs a POSIX system")
    from terminal_helpers import Terminal

    environment = {**ENVIRONMENT, "TERM": "dumb", "HOME": str(tmp_path)}
    with Terminal([*COMMAND, "--stats"], environment) as terminal:
        for typed, shown in (
            ("你好\n", "很高兴和你聊天。"),
            ("/regenerate\n", "tokens/s; context: 41 of 1,024 tokens)"),
            ("clear\n讲个笑话\n", "闹钟"),
            ("\x03", "`stop` quits"),
            ("clear\n你好\n", "很高兴和你聊天。"),
        ):
            if typed != "\x03":
                terminal.read_until("> ")
            terminal.type_in(typed)
            terminal.read_until(shown)
        terminal.type_in("stop\n")
        assert terminal.status() == 0


@pytest.fixture
def make_chat(tiny_model, tokenizer):
    """A factory of chats with the tiny checkpoint; arguments are the command line's."""

    def make(*options):
        args = cli_demo.parse_arguments(["--temperature", "0", *options])
        conversation = Conversation(tiny_model, tokenizer, args.system, args.max_length, **sampling(args))
        return cli_demo.Chat(conversation, args)

    return make


def say(chat, capsys, *messages):
    """Send messages up to the end of the input; return what is shown. A KeyboardInterrupt is Ctrl-C."""
    waiting = iter([*messages, EOFError])

    def read_message():
        message = next(waiting)
        if isinstance(message, str):
            return message
        raise message

    chat.run(read_message)
    return capsys.readouterr().out


def test_an_interrupt_at_the_prompt_drops_the_line(make_chat, capsys):
    """Ctrl-C while a line is typed, or just as an answer ends: the conversation goes on, up to `stop`."""
    shown = say(make_chat(), capsys, KeyboardInterrupt, "你好", KeyboardInterrupt, "stop", "再见")
    assert shown == f" … (`stop` quits)\n{HELLO}\n … (`stop` quits)\n"


def test_commands(make_chat, capsys, tmp_path):
    """What each command shows and does."""
    chat, path = make_chat("--system", "请简短。"), tmp_path / "chat.json"
    every = say(chat, capsys, "/help")
    assert all(f"{command} " in every or f"{command}," in every for command in chat.commands)
    assert say(chat, capsys, "/regenerate") == "There is no message yet.\n\n"
    assert "/halp is not a command: /help" in say(chat, capsys, "/halp me")
    say(chat, capsys, "/clear", "/system -", "你好", "//quit")
    assert [query for query, _ in chat.conversation.history] == ["你好", "/quit"] and chat.running
    assert say(chat, capsys, "/history").startswith(f"> 你好\n{HELLO}\n\n> /quit\n")
    assert say(chat, capsys, "/system 一\n二") == "System prompt: 一\n二\n\n"
    assert say(chat, capsys, f"/save {path}", "/save") == f"2 rounds in {path}\n" * 2 + "\n"
    other = make_chat()
    assert say(other, capsys, f"/save {path}") == f"{path} exists: give another name.\n\n"
    assert say(other, capsys, f"/load {path}", "/history") == f"2 rounds from {path}\n" + say(chat, capsys, "/history")
    assert other.conversation.system == "一\n二" and other.conversation.history == chat.conversation.history
    path.write_text('{"messages": [{"role": "user", "content": "?"}, {"role": "robot", "content": "!"}]}')
    assert "messages[1]: the role 'robot'" in say(chat, capsys, f"/load {path}")
    assert "No such file" in say(chat, capsys, "/load /nowhere/chat.json")
    assert len(chat.conversation.history) == 2


def test_set(make_chat, capsys):
    """/set changes the arguments of the next answer, /set NAME restores them; a wrong value changes nothing."""
    chat = make_chat("--top-p", "0.5")
    assert (
        say(chat, capsys, "/set")
        == "temperature 0.0\ntop_p 0.5\nmax_new_tokens what fits\nprompt_lookup off\nstats off\n\n"
    )
    assert say(chat, capsys, "/set max_new_tokens 5", "你好") == "max_new_tokens 5\n你好！我是\n\n"
    say(chat, capsys, "/set max_new_tokens", "/set top_p=0.9", "/set temperature = 0.3")
    assert chat.conversation.settings == {"do_sample": True, "temperature": 0.3, "top_p": 0.9}
    for wrong in ("top_p 2", "temperature -1", "temperature hot", "stats maybe", "prompt_lookup 3", "size 3"):
        assert say(chat, capsys, f"/set {wrong}").startswith(f"{wrong.split()[0]}")
    assert chat.conversation.settings == {"do_sample": True, "temperature": 0.3, "top_p": 0.9}


def test_system_prompt_comes_first(make_chat, capsys, monkeypatch, tiny_model, tokenizer):
    """After /system the whole conversation is encoded again, behind it."""
    fed = []
    with contextlib.closing(hooked(tiny_model, fed)):
        chat = make_chat()
        say(chat, capsys, "你好", "/system 请简短。", "谢谢")
    wanted = tokenizer(tokenizer.build_prompt("谢谢", [("你好", HELLO)], "请简短。"))["input_ids"]
    assert wanted in fed


def hooked(model, fed):
    """Append the ids of each forward pass to `fed`, until it is closed."""
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, _: fed.append(args[0][0].tolist()))
    hook.close = hook.remove
    return hook


def test_regenerate_encodes_only_the_round(make_chat, capsys, tiny_model):
    """The same answer, and the rounds before it come from the cache; Ctrl-C before the first piece keeps the round."""
    chat, fed = make_chat(), []
    say(chat, capsys, "你好")
    answer = say(chat, capsys, "早上好")
    history = chat.conversation.history
    with contextlib.closing(hooked(tiny_model, fed)):
        assert say(chat, capsys, "/regenerate", "/regenerate") == answer[:-1] * 2 + "\n"
    prompts = [ids for ids in fed if len(ids) > 1]
    assert chat.conversation.history == history and len(prompts) == 2 and prompts[0] == prompts[1]
    assert len(prompts[0]) < 20
    chat.conversation.answer_again().close()
    with contextlib.closing(chat.conversation.answer_again()) as pieces:
        next(pieces)
    assert len(chat.conversation.history) == 2
    say(chat, capsys, "早上好" * 9999)  # too long
    assert say(chat, capsys, "/regenerate") == answer
    chat.conversation.restart(history, "")
    assert say(chat, capsys, "/regenerate") == answer


def test_oldest_rounds_are_dropped(make_chat, capsys):
    """When the context is full, the oldest rounds go, with a word; a message that never fits drops none."""
    chat = make_chat("--max-length", "200", "--max-new-tokens", "30")
    shown, number = "", 0
    while "dropped" not in shown:
        shown, number = say(chat, capsys, "你好"), number + 1
    dropped = int(re.search(r"the oldest (\d+) rounds? dropped", shown)[1])
    assert len(chat.conversation.history) == number - dropped and 0 < dropped < number
    assert chat.conversation.context <= 100
    before = chat.conversation.history
    assert "(`clear` starts a new conversation.)" in say(make_chat("--max-length", "200"), capsys, "你好" * 300)
    assert chat.conversation.history == before


@pytest.mark.parametrize(
    "options, error",
    [
        ("--top-p 2", "argument --top-p: give more than 0 and at most 1, not 2"),
        ("--temperature -1", "argument --temperature: give 0 (greedy) or more, not -1"),
        ("--temperature nan", "argument --temperature: give 0 (greedy) or more, not nan"),
        ("--device gpu", "argument --device: give auto, cpu, cuda, cuda:1 or mps, not gpu"),
        ("--max-new-tokens none", "argument --max-new-tokens: give 1 or more, not none"),
    ],
)
def test_invalid_option_is_one_line(options, error, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli_demo.parse_arguments(options.split())
    assert capsys.readouterr().err.endswith(f": {error}\n") and not capsys.readouterr().err.count("\n")


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


@pytest.mark.skipif(os.name == "nt", reason="SIGINT to another process needs a POSIX system")
def test_an_interrupt_while_loading_is_silent(tmp_path):
    """Ctrl-C while torch is imported: no traceback, and the end that a shell expects."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(COMMAND, env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}, **pipes) as process:
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == (b"", b"") and process.returncode == -signal.SIGINT


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGPIPE")
def test_a_closed_pipe_ends_the_program():
    """As `| head -1`: whoever reads the answers is gone, and that is no error."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(COMMAND, env=ENVIRONMENT, **pipes) as process:
        process.stdout.close()
        process.stdin.write("你好\n".encode())
        process.stdin.close()
        assert process.stderr.read() == b"" and process.wait(timeout=60) == -signal.SIGPIPE


def test_the_page_shows_a_real_session(make_chat, capsys, tmp_path, monkeypatch):
    """The session in docs/serving.md is what the program shows."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").split("<!-- terminal:")[1]
    shown = page.split("```text\n")[1].split("```")[0].split("\n", 1)[1]
    monkeypatch.chdir(tmp_path)
    chat = make_chat()
    for turn in shown[len("> ") :].split("\n> "):
        typed, _, answer = turn.partition("\n")
        chat.take(typed)
        assert capsys.readouterr().out.strip() == answer.strip()
    assert not chat.running
