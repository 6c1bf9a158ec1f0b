"""Float linear layers with few tokens: the C code and torch's product, as shares of the memory bandwidth.

The weight is the output layer of 6.2B, on the pages that torch allocates.
"""

from functools import partial

import torch
from common import in_turns, machine, milliseconds, ratio, record


def arguments(parser):
    parser.add_argument("--rows", type=int, default=65024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=9)


@torch.no_grad()
def run(args):
    from chatglm2.inference_cpu import c_linear

    rows = []
    limits = machine(torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        weight = torch.randn(args.columns).to(dtype).repeat(args.rows, 1)
        works = {}
        for tokens in args.tokens:
            x = torch.randn(tokens, args.columns).to(dtype)
            works["ours", tokens] = partial(c_linear, x, weight, None)
            works["torch", tokens] = partial(torch.nn.functional.linear, x, weight)
        times = in_turns(works, args.rounds)
        for tokens in args.tokens:
            ours, other = times["ours", tokens], times["torch", tokens]
            row = {"dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
            for name, record_of in (("ours", ours), ("torch", other)):
                rate = weight.nbytes / milliseconds(record_of) / 1e6
                row[f"{name}_ms"] = milliseconds(record_of)
                row[f"{name}_bandwidth"] = round(rate / limits["memory_gb_per_second"], 2)
            rows.append({**row, "ratio": ratio({"ours": ours, "glm": other})})
    record("linear", args, limits, rows=rows)
