"""From the command to the first prompt: a sign of life at every step, what the weights are held in, --save, make."""

import gc
import json
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest
from checkpoints import held_in
from conftest import ROOT, TINY
from options import chat_parser, check_save
from quantization_helpers import needs_compiled
from starting import importing

DEMO = str(ROOT / "demos" / "cli_demo.py")
HELLO = "你好！我是一个很小的 ChatGLM2 演示模型，很高兴和你聊天。"


def in_a_terminal(command, environment):
    """All that a command shows in a terminal of 100 columns, without input."""
    fcntl = pytest.importorskip("fcntl", reason="a terminal needs a POSIX system")
    import termios

    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=end, stderr=end, env=environment) as process:
        os.close(end)
        shown = b""
        try:
            while part := os.read(terminal, 4096):
                shown += part
        except OSError:  # the other end is closed
            pass
        assert process.wait(timeout=60) == 0, shown.decode()
    os.close(terminal)
    return shown.decode()


def test_every_step_shows_itself_and_the_int4_files_are_kept(tmp_path):
    """Imports, weights, the compiler, saving; and the saved folder, which has its code, gives the same answer."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, DEMO, "--device", "cpu", "--temperature", "0"]
    shown = in_a_terminal([*command, "--quantize", "4", "--save", str(tmp_path / "int4")], environment)
    steps = ["Importing torch", "Compiling C kernels" if compiles() else "", "Saving 0.0 GB to"]
    assert re.search(".*".join(steps), shown, flags=re.S), shown
    config = json.loads((tmp_path / "int4" / "config.json").read_text())
    assert config["quantization_options"] == {"embedding": True, "output_layer": True}  # int8, on a CPU
    assert config["quantization_bit"] == 4 and not (tmp_path / "int4.partial").exists()
    assert (tmp_path / "int4" / "modeling_chatglm.py").exists()
    command += ["--model", str(tmp_path / "int4")]
    done = subprocess.run(command, input="你好\n".encode(), capture_output=True, env=environment, timeout=120)
    assert done.stdout.decode() == f"{HELLO}\n" and done.stderr == b""


def compiles():
    return not needs_compiled.args[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--save", "new"], "--save new keeps quantized weights: give --quantize"),
        (["--save", "new", "--quantize", "4", "--checkpoint", "lora"], "no --checkpoint"),
        (["--save", str(TINY), "--quantize", "4"], "exists: give a new folder"),
        (["--save", str(TINY / "config.json"), "--quantize", "4"], "exists: give a new folder"),
    ],
)
def test_save_is_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_save(chat_parser("").parse_args(options))


@needs_compiled
def test_the_banner_says_what_the_weights_are_held_in(make_model):
    assert held_in(make_model()) == "float32"
    assert re.fullmatch(r"int4 \(AVX\S+ kernels\), float16 elsewhere", held_in(make_model().half().quantize(4)))
    mixed = make_model().bfloat16().quantize(4, output_layer=True, backend="stock")
    assert held_in(mixed) == "int4 (torch's own operators), int8 (torch's own operators), bfloat16 elsewhere"


def test_importing_collects_no_garbage_until_it_ends():
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("target", ["chat", "web", "test"])
def test_make_takes_torch_for_a_cpu_first(target, tmp_path):
    """With CPU=1 it is installed before what requires torch; without, pip chooses. Both say how much it is."""
    options = [f"VENV={tmp_path / 'venv'}", f"PYTHON={sys.executable}"]
    for_cpu, default = (
        subprocess.run(
            ["make", "-n", target, *options, *cpu], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for cpu in (["CPU=1"], [])
    )
    index = "--index-url https://download.pytorch.org/whl/cpu"
    assert for_cpu.index("1.1 GB") < for_cpu.index(index) < for_cpu.index("-r requirements.txt")
    assert index not in default and "several GB of CUDA" in default
