"""Steps of a few tokens against steps of one at the 6.2B shapes: what it costs to verify a draft.

All follow the same context. With int4 weights, and with an int8 output layer and embedding, too.
"""

import statistics

import torch
from common import CACHE, filled_cache, in_turns, machine, milliseconds, quantization, random_model, record


def arguments(parser):
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=9)


def step(model, cache, tokens):
    """A step of so many tokens, which leaves the cache as it was; and all their logits."""
    ids = torch.full((1, tokens), 5)

    @torch.no_grad()
    def work():
        model(input_ids=ids, use_cache=True, **{CACHE: cache})
        cache.crop(-tokens)

    return work


def run(args):
    dtype = getattr(torch, args.dtype)
    model = random_model("6b", dtype, layers=args.layers, quantization_bit=args.bits)
    limits, rows = machine(dtype), []
    cache = filled_cache(model, args.context)
    for head in (False, True):
        if head:
            quantization.quantize(model, args.bits, embedding=True, output_layer=True)
        times = in_turns({tokens: step(model, cache, tokens) for tokens in args.tokens}, args.rounds, warmup=2)
        first = times[args.tokens[0]]
        for tokens in args.tokens:
            cost = statistics.median(b / a for a, b in zip(first, times[tokens]))
            rows.append(
                {"int8_head": head, "tokens": tokens, "ms": milliseconds(times[tokens]), "cost": round(cost, 2)}
            )
    record("verify", args, limits, rows=rows)
