"""int4 or int8 at the 6.2B shapes: tokens/s of this package and of vLLM, on the same random weights.

vLLM runs the export of export/to_glm.py in a process of its own, with the Python of the environment that `make vllm`
makes, and takes turns with this package. "batch" is eight sequences at once, the sum of their tokens.
"""

import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import ROOT, machine, random_model, ratio, record, seconds, take_turns

sys.path.insert(0, str(ROOT / "export"))
from compressed_weights import choose_format
from peers import Timer
from to_glm import write_model
from vllm_timer import CONTEXT, SEQUENCES

TASKS = {"decode": 8, "batch": 8, "prefill": 512}  # tokens


def arguments(parser):
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8])
    parser.add_argument("--dtype", default="bfloat16", help="of the activations, and of what is not quantized")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", default=ROOT / "build" / "vllm" / "bin" / "python", type=Path)


@torch.inference_mode()
def feed(model, tokens, sequences=1, cache=None):
    """Pass so many tokens of each sequence, and return the cache."""
    ids = torch.arange(100, 100 + tokens)[None].expand(sequences, -1)
    return model(ids, cache=cache, use_cache=True, logits_to_keep=1).cache


def time_ours(model, task):
    """Seconds of a task."""
    if task == "prefill":
        return seconds(partial(feed, model, TASKS[task]))
    sequences = SEQUENCES if task == "batch" else 1
    cache = feed(model, CONTEXT, sequences)
    return seconds(lambda: [feed(model, 1, sequences, cache) for _ in range(TASKS[task])])


def run(args):
    dtype = getattr(torch, args.dtype)
    limits = machine(dtype)
    model = random_model("6b", dtype, layers=args.layers, quantization_bit=args.bits)
    rows = []
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log.txt", "w+", encoding="utf-8") as log:
        write_model(model, Path(folder), choose_format(model.config))
        script = Path(__file__).with_name("vllm_timer.py")
        try:
            vllm = Timer([args.python, script, folder, torch.get_num_threads()], log)
        except RuntimeError as error:
            log.seek(0)
            raise RuntimeError(f"vLLM did not start: {log.read()[-2000:]}") from error
        for task, tokens in TASKS.items():
            timers = {"ours": partial(time_ours, model, task), "vllm": partial(vllm.ask, task, tokens)}
            times = take_turns(timers, min(args.rounds, 2) if task == "prefill" else args.rounds)
            total = tokens * (SEQUENCES if task == "batch" else 1)
            row = {"task": task, **{name: round(total / statistics.median(t), 2) for name, t in times.items()}}
            rows.append({**row, "ratio": ratio(times, other="vllm")})
            print(rows[-1], flush=True)
        vllm.close()
    args.python = None
    record("against_vllm", args, limits, rows=rows)
