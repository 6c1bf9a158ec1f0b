"""Milliseconds per token as the context grows, compared with transformers' GlmForCausalLM on the same tensors.

The caches are filled with random keys and values; then all decode in turns, one token per context and round. The limit
is the time to read a token's bytes at the memory bandwidth: the weights, and the context's keys and values.
"""

import statistics

import torch
from common import (
    CACHE,
    cache_bytes,
    contenders,
    filled_cache,
    in_turns,
    machine,
    milliseconds,
    model_arguments,
    random_model,
    ratio,
    record,
    weight_bytes,
)
from transformers import StaticCache


def arguments(parser):
    model_arguments(parser)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192, 32768])
    parser.add_argument("--compiled", action="store_true", help="static caches and torch.compile, for both")


def step(model, cache):
    """Work that decodes one more token; `model` may be compiled."""
    token = torch.tensor([[5]], device=model.device)

    @torch.no_grad()
    def work():
        model(input_ids=token, use_cache=True, **{CACHE: cache})

    return work


def run(args):
    dtype = getattr(torch, args.dtype)
    model = random_model(args.shape, dtype, args.device, args.layers)
    limits = machine(dtype, args.device)
    works = {}
    for name, contender in contenders(model).items():
        called = contender
        if args.compiled:
            mode = "reduce-overhead" if torch.device(args.device).type == "cuda" else None
            called = torch.compile(contender, fullgraph=True, mode=mode)
        for context in args.contexts:
            cache = None
            if args.compiled:
                cache = StaticCache(config=contender.config, max_cache_len=context + args.rounds + 8)
            works[context, name] = step(called, filled_cache(contender, context, cache=cache))
    times = in_turns(works, args.rounds, args.device, warmup=3)
    rows = []
    for context in args.contexts:
        ours, glm = times[context, "ours"], times[context, "glm"]
        limit = (weight_bytes(model) + cache_bytes(model, context)) / limits["memory_gb_per_second"] / 1e6
        rows.append(
            {
                "context": context,
                "ours_ms": milliseconds(ours),
                "glm_ms": milliseconds(glm),
                "ratio": ratio({"ours": ours, "glm": glm}),
                "limit_ms": round(limit, 2),
            }
        )
    first, last = times[args.contexts[0], "ours"], times[args.contexts[-1], "ours"]
    growth = round(statistics.median(b / a for a, b in zip(first, last)), 2)
    record("decode", args, limits, growth=growth, rows=rows)
