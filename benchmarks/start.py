"""Seconds from the command to the prompt, the first and the second token of demos/cli_demo.py, and its peak memory.

Each start is a fresh process in a terminal, with a warm file cache (one start is not counted, which leaves libraries
and compiled kernels there) and random weights of the 6.2B shapes: an int4 folder as it is, and a float16 folder
quantized while it loads. `silence` is the longest wait, up to the first token, in
which nothing is shown. --before takes turns with an earlier checkout (git worktree). `read` is the time in which a
process reads the float16 files and copies every byte to memory, `touch` that in which it maps them and adds all bytes
up; both are the best of the rounds, as is `load`, from_pretrained without imports. Linux only; 17 GB of disk.
"""

import fcntl
import json
import os
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import torch
from common import ROOT, TINY, machine, record
from loading import write_checkpoint

QUESTION = "你好\n"
CONTROL = re.compile(rb"\x1b\[[?\d;]*[a-zA-Z]|[\r\n]")


def arguments(parser):
    parser.add_argument("--before", type=Path, help="another checkout, to start in turns with this one")
    parser.add_argument("--bits", type=int, nargs="*", default=[4], choices=[4, 8], help="to quantize float16 to")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "chatglm2_start"))
    parser.add_argument("--threads", type=int)


def checkpoint(parent, bits):
    """The folder of weights, written once."""
    folder = parent / (f"int{bits}" if bits else "float16")
    if not (folder / "config.json").exists():
        write_checkpoint(folder, bits)
        for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(TINY / name, folder)
    return folder


def warm(folder):
    """Read the files, so that the file cache has them."""
    buffer = bytearray(1 << 24)
    for path in folder.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def start(checkout, folder, bits, threads):
    """Seconds and gigabytes of one start, from the command to the second token."""
    command = [sys.executable, str(checkout / "demos" / "cli_demo.py"), "--model", str(folder), "--device", "cpu"]
    command += ["--temperature", "0", "--max-new-tokens", "8", *(["--quantize", str(bits)] if bits else [])]
    environment = {**os.environ, "TERM": "dumb", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": str(threads)}
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    warm(folder)
    begin = time.perf_counter()
    with subprocess.Popen(command, stdin=end, stdout=end, stderr=end, env=environment) as process:
        os.close(end)
        try:
            times, shown = [begin], b""

            def show():
                nonlocal shown
                ready, _, _ = select.select([terminal], [], [], 600)
                assert ready, f"nothing is shown for 10 minutes after {shown.decode(errors='replace')}"
                shown += os.read(terminal, 1 << 16)
                times.append(time.perf_counter())

            while not shown.endswith(b"> "):
                show()
            prompt = times[-1]
            os.write(terminal, QUESTION.encode())
            asked, tokens, text = len(shown), [], b""
            while len(tokens) < 2:
                show()
                answer = CONTROL.sub(b"", shown[asked:].partition(b"\n")[2])  # behind the echo of the question
                if answer != text:
                    tokens, text = [*tokens, times[-1]], answer
            waits = [later - earlier for earlier, later in zip(times, times[1:-1])]
            peak = resident(process.pid)
        finally:
            process.kill()
            os.close(terminal)
    marks = {"sign": times[1], "prompt": prompt, "first_token": tokens[0], "second_token": tokens[1]}
    seconds = {name: round(moment - begin, 2) for name, moment in marks.items()}
    return {**seconds, "silence": round(max(waits), 2), "peak_gb": round(peak / 1e9, 2)}


def resident(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def read(folder, copy):
    """Seconds in which a process reads every byte of a folder's weights."""
    from safetensors.torch import load_file

    begin = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        for tensor in load_file(path).values():
            tensor.clone() if copy else tensor.view(torch.uint8).view(-1).view(torch.int64).sum()
    return time.perf_counter() - begin


def in_a_process(*task):
    output = subprocess.run([sys.executable, __file__, *map(str, task)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def run(args):
    limits, threads = machine(torch.float16), torch.get_num_threads()
    checkouts = {"after": ROOT, **({"before": args.before.resolve()} if args.before else {})}
    rows = []
    for checkout in checkouts.values():
        start(checkout, checkpoint(args.folder, 4), 0, threads)
    for stored, bits in [(4, 0), *((0, bits) for bits in args.bits)]:
        folder = checkpoint(args.folder, stored)
        for _ in range(args.rounds):
            for name, checkout in checkouts.items():
                found = start(checkout, folder, bits, threads)
                rows.append({"version": name, "folder": folder.name, "quantize": bits, **found})
                print(rows[-1], file=sys.stderr)
    tasks = {"read": ("read", 1), "touch": ("read", 0), **{f"load_int{bits}": ("load", bits) for bits in args.bits}}
    times = {name: [] for name in tasks} if args.bits else {}
    for _ in range(args.rounds):
        for name in times:
            warm(folder)
            times[name].append(in_a_process(folder, *tasks[name]))
    best = {name: round(min(seconds), 2) for name, seconds in times.items()}
    ratios = {name: round(best[name] / best["read"], 2) for name in best if name.startswith("load")}
    args.folder = args.before = None
    record("start", args, limits, rows=rows, seconds=best, relative_to_read=ratios)


if __name__ == "__main__":  # a process that reads or loads
    folder, task, option = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if task == "read":
        print(json.dumps(read(folder, option)))
    else:
        from loading import load

        print(json.dumps(load(folder, option)["seconds"]))
