"""Linear layers with few tokens: the C code as a share of the memory bandwidth, for floats beside torch's product.

The shape is the output layer's of 6.2B. Floats are read from the pages that torch allocates, int4 and int8 from those
of the layout, with inputs in half precision (which are rounded to int8) and in float32.
"""

from functools import partial

import torch
import torch.nn.functional as F
from common import in_turns, machine, milliseconds, quantization_cpu, ratio, record


def arguments(parser):
    parser.add_argument("--rows", type=int, default=65024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=9)


def float_products(args, dtype):
    """(bytes of the weight, {(name, tokens): work})."""
    from chatglm2.inference_cpu import c_linear

    weight, works = torch.randn(args.columns).to(dtype).repeat(args.rows, 1), {}
    for tokens in args.tokens:
        x = torch.randn(tokens, args.columns).to(dtype)
        works["ours", tokens] = partial(c_linear, x, weight, None)
        works["torch", tokens] = partial(F.linear, x, weight)
    return weight.nbytes, works


def quantized_products(args, dtype, bits):
    packed = torch.randint(-128, 128, (args.rows, args.columns * bits // 8), dtype=torch.int8)
    scale = torch.rand(args.rows).to(dtype)
    weight, works = quantization_cpu.to_layout(packed, bits), {}
    for tokens in args.tokens:
        x = torch.randn(tokens, args.columns).to(dtype)
        works["ours", tokens] = partial(quantization_cpu.linear, x, weight, scale, None, bits)
    return weight.nbytes, works


@torch.no_grad()
def run(args):
    limits, rows = machine(torch.float32), []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = str(dtype)[len("torch.") :]
        for weights in (name, "int8", "int4"):
            if weights == name:
                size, works = float_products(args, dtype)
            else:
                size, works = quantized_products(args, dtype, int(weights[3:]))
            times = in_turns(works, args.rounds)
            for tokens in args.tokens:
                row = {"weights": weights, "inputs": name, "tokens": tokens}
                for who in ("ours", "torch") if weights == name else ("ours",):
                    row[f"{who}_ms"] = milliseconds(times[who, tokens])
                    share = size / row[f"{who}_ms"] / 1e6 / limits["memory_gb_per_second"]
                    row[f"{who}_bandwidth"] = round(share, 2)
                if weights == name:
                    row["ratio"] = ratio({"ours": times["ours", tokens], "glm": times["torch", tokens]})
                rows.append(row)
    record("linear", args, limits, rows=rows)
