"""What runs the same network beside this package: llama.cpp and ik_llama.cpp, each in a process of its own."""

import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

NAMES = {"llama": "llama.cpp", "ik": "ik_llama.cpp"}  # option -> name


def arguments(parser):
    parser.add_argument("--llama", help="a Python with llama-cpp-python and gguf")
    parser.add_argument("--ik", help="a Python with ik-llama-cpp-python and gguf")


class Timer:
    """A process that times on request: for a line on its standard input it answers with the seconds.

    Attributes:
        first: the line that it begins with, when it is ready.

    Raises:
        RuntimeError: the process ended before its answer.
    """

    def __init__(self, command, errors=subprocess.DEVNULL):
        self.command, pipe = [*map(str, command)], subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=errors, text=True)
        self.first = self._answer()

    def _answer(self):
        line = self.process.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} ended: run it by hand to see why")
        return line

    def ask(self, *words):
        print(*words, file=self.process.stdin, flush=True)
        return float(self._answer())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Peer(Timer):
    """A process that holds the network in Q4_0 or Q8_0 and times it on request.

    Args:
        name: one of NAMES' values.
        python: the interpreter that has the library.
        bits: 4 or 8.
        layers: of the network.
        room: tokens that its cache holds.
    """

    def __init__(self, name, python, bits, layers, room):
        script = Path(__file__).with_name("peer_timer.py")
        kind = {4: "q4_0", 8: "q8_0"}[bits]
        super().__init__([python, script, name, kind, layers, torch.get_num_threads(), room])

    def decode(self, tokens, context):
        """Seconds of this many tokens, one at a time, after `context` (a multiple of 32)."""
        return self.ask("decode", tokens, context)

    def prefill(self, tokens):
        """Seconds of a prompt."""
        return self.ask("prefill", tokens)


@contextmanager
def started(args, bits, layers, room):
    """{name: Peer} of those whose option is given; there are none for float weights."""
    with ExitStack() as stack:
        peers = {}
        for option, name in NAMES.items():
            if getattr(args, option) and bits < 16:
                peers[name] = Peer(name, getattr(args, option), bits, layers, room)
                stack.callback(peers[name].close)
        yield peers


def versions(args, peers):
    """Put the versions in place of the paths in `args`, so that a recorded line says what ran."""
    for option, name in NAMES.items():
        setattr(args, option, peers[name].first if name in peers else None)
