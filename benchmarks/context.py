"""int4 at the 6.2B shapes as the context grows, with this package's attention on a CPU and with torch's, in turns.

Decoding runs all layers, on caches of random keys and values. A prompt's pass runs --prefill-layers of them without the
output layer, and its time is scaled to all layers: the blocks are alike, and the rest of a pass is below 1%.
"""

import statistics
from functools import partial

import torch
from common import (
    cache_bytes,
    filled_cache,
    machine,
    milliseconds,
    random_ids,
    random_model,
    ratio,
    record,
    seconds,
    take_turns,
    weight_bytes,
)


def arguments(parser):
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8, 16])
    parser.add_argument("--small-head", action="store_true", help="the embedding and the output layer in int8 too")
    parser.add_argument("--dtype", default="float16", help="of the activations and the cache")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--prefill-layers", type=int, default=4)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32, 512, 4096, 8192, 32000])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--rounds", type=int, default=7, help="of decoding; a prompt has two")


def build(args, layers):
    options = {"embedding": True, "output_layer": True} if args.small_head else {}
    settings = {"quantization_bit": args.bits, "quantization_options": options} if args.bits < 16 else {}
    return random_model("6b", getattr(torch, args.dtype), layers=layers, **settings)


def timer(work, own):
    """Seconds of `work` with the package's attention, or with torch's."""
    from chatglm2 import attention_chatglm

    def time():
        supports = attention_chatglm.computes_attention
        if not own:
            attention_chatglm.computes_attention = lambda *_: False
        try:
            return seconds(work)
        finally:
            attention_chatglm.computes_attention = supports

    return time


@torch.inference_mode()
def step(model, cache):
    model(torch.tensor([[5]]), cache=cache, use_cache=True)


@torch.inference_mode()
def prompt(model, ids):
    model.transformer(ids, use_cache=True)


def run(args):
    limits = machine(getattr(torch, args.dtype))
    model, works = build(args, args.layers), {}
    with torch.inference_mode():
        for context in args.contexts:
            work = partial(step, model, filled_cache(model, context))
            works.update({(context, name): timer(work, name == "ours") for name in ("ours", "torch")})
    times, decode = take_turns(works, args.rounds), []
    for context in args.contexts:
        own = {name: times[context, name] for name in ("ours", "torch")}
        first = times[512, "ours"] if 512 in args.contexts else times[args.contexts[0], "ours"]
        limit = (weight_bytes(model) + cache_bytes(model, context)) / limits["memory_gb_per_second"] / 1e6
        row = {"context": context, "ours_ms": milliseconds(own["ours"]), "torch_ms": milliseconds(own["torch"])}
        row.update(ratio=ratio(own, other="torch"), limit_ms=round(limit, 2))
        row["speed"] = round(statistics.median(a / b for a, b in zip(first, own["ours"])), 3)  # relative to 512 tokens
        decode.append(row)
        print(row, flush=True)
    del works, model
    model, prefill = build(args, args.prefill_layers), []
    for length in args.lengths:
        work = partial(prompt, model, random_ids(model, length))
        own = take_turns({name: timer(work, name == "ours") for name in ("ours", "torch")}, 2, warmup=length <= 512)
        scaled = {name: statistics.median(record) * args.layers / args.prefill_layers for name, record in own.items()}
        row = {"length": length, **{f"{name}_tokens_per_second": round(length / s, 2) for name, s in scaled.items()}}
        row["ratio"] = ratio(own, other="torch")
        prefill.append(row)
        print(row, flush=True)
    record("context", args, limits, decode=decode, prefill=prefill)
