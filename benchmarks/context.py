"""int4 at the 6.2B shapes as the context grows: this package's attention on a CPU, torch's, and other libraries.

Decoding runs all layers, on caches of random keys and values. A prompt's pass runs --prefill-layers of them without the
output layer, and its time is scaled to all layers: the blocks are alike, and the rest of a pass is below 1%. llama.cpp
and ik_llama.cpp (Q4_0, Q8_0, the same number of threads) run in processes of their own if --llama and --ik name a
Python that has them. Their last layer has no MLP for the tokens whose logits nobody asked for, so their prompts run
through one layer and through --prefill-layers more, and the difference is scaled.
"""

import statistics
from functools import partial

import peers
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

TOKENS = 4  # decoded in each turn
PEERS_CONTEXT = 8192  # beyond, the other libraries are not timed


def arguments(parser):
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8, 16])
    parser.add_argument("--small-head", action="store_true", help="the embedding and the output layer in int8 too")
    parser.add_argument("--dtype", default="float16", help="of the activations and the cache")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--prefill-layers", type=int, default=1)
    parser.add_argument("--contexts", type=int, nargs="*", default=[32, 512, 4096, 8192, 32000], help="of decoding")
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 2048, 8192], help="of prompts")
    parser.add_argument("--no-torch", action="store_true", help="without torch's attention")
    parser.add_argument("--rounds", type=int, default=7, help="of decoding and of prompts of 512; longer ones have two")
    peers.arguments(parser)


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
def steps(model, cache):
    for _ in range(TOKENS):
        model(torch.tensor([[5]]), cache=cache, use_cache=True)


@torch.inference_mode()
def prompt(model, ids):
    model.transformer(ids, use_cache=True)


def time_decoding(args, limits, others):
    """Milliseconds per token at each context, all contexts in each round."""
    model, timers, rows = build(args, args.layers), {}, []
    for context in args.contexts:
        with torch.inference_mode():
            work = partial(steps, model, filled_cache(model, context))
        timers.update({(context, name): timer(work, name == "ours") for name in own(args)})
        if context <= PEERS_CONTEXT:
            timers.update({(context, name): partial(peer.decode, TOKENS, context) for name, peer in others.items()})
    times = take_turns(timers, args.rounds)
    base = times[512 if 512 in args.contexts else args.contexts[0], "ours"]
    for context in args.contexts:
        spent = {name: [s / TOKENS for s in rounds] for (at, name), rounds in times.items() if at == context}
        limit = (weight_bytes(model) + cache_bytes(model, context)) / limits["memory_gb_per_second"] / 1e6
        row = {"context": context, "ms": {name: milliseconds(rounds) for name, rounds in spent.items()}}
        row.update(ratios=ratios(spent), limit_ms=round(limit, 2))
        # relative to 512 tokens
        row["speed"] = round(statistics.median(a / b for a, b in zip(base, times[context, "ours"])), 3)
        rows.append(row)
        print(row, flush=True)
    return rows


def time_prompts(args, firsts, others):
    """Tokens per second of prompts through all layers; `firsts` are peers of one layer."""
    model, rows = build(args, args.prefill_layers), []

    def scaled(time):
        return lambda: time() * args.layers / args.prefill_layers

    def scaled_peer(name, length):
        first = firsts[name].prefill(length)
        return first + (others[name].prefill(length) - first) * (args.layers - 1) / args.prefill_layers

    for length in args.lengths:
        work = partial(prompt, model, random_ids(model, length))
        timers = {name: scaled(timer(work, name == "ours")) for name in own(args)}
        timers.update({name: partial(scaled_peer, name, length) for name in others})
        short = length <= 512  # of a few seconds
        times = take_turns(timers, args.rounds if short else 2, warmup=short)
        speeds = {name: round(length / statistics.median(spent), 2) for name, spent in times.items()}
        rows.append({"length": length, "tokens_per_second": speeds, "ratios": ratios(times)})
        print(rows[-1], flush=True)
    return rows


def own(args):
    return ("ours",) if args.no_torch else ("ours", "torch")


def ratios(times):
    """{name: how many times as fast as it this package is}."""
    return {name: ratio(times, other=name) for name in times if name != "ours"}


def run(args):
    limits, seen, results = machine(getattr(torch, args.dtype)), {}, {}
    if args.contexts:
        room = max([context for context in args.contexts if context <= PEERS_CONTEXT], default=0) + 512
        with peers.started(args, args.bits, args.layers, room) as others:
            seen.update(others)
            results["decode"] = time_decoding(args, limits, others)
    if args.lengths:
        room = max(args.lengths) + 512
        with (
            peers.started(args, args.bits, 1, room) as firsts,
            peers.started(args, args.bits, 1 + args.prefill_layers, room) as others,
        ):
            seen.update(others)
            results["prefill"] = time_prompts(args, firsts, others)
    peers.versions(args, seen)
    record("context", args, limits, **results)
