"""The part of a decode step at the 6.2B shapes that is neither matrix product nor attention.

Matrix products and attention of one step are timed separately, on a step's inputs, in turns with the whole step. The
rest is overhead: norms, rotary embedding, activation, cache, Python.
"""

import statistics

import torch
from common import filled_cache, in_turns, machine, milliseconds, quantization, random_model, record
from decode import step
from torch import nn


def arguments(parser):
    parser.add_argument("--bits", type=int, default=16, choices=[4, 8, 16])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--context", type=int, default=512)


def bare_work(model, cache):
    """The step's matrix products and its attention, and nothing else."""
    from chatglm2.attention_chatglm import choose_attention

    config, device = model.config, model.device
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    inputs = {
        layer.in_features: torch.randn(1, 1, layer.in_features, device=device).to(model.dtype) for layer in linears
    }
    query = torch.randn(1, config.num_attention_heads, 1, config.kv_channels, device=device).to(model.dtype)

    with torch.no_grad():
        attend = choose_attention(config, query, None)
    kernel = quantization.family(quantization.choose("auto", device))

    @torch.no_grad()
    def work():
        for layer in linears:
            x = inputs[layer.in_features]
            if isinstance(layer, quantization.QuantizedLinear):
                multiply = kernel.layout.linear if layer._weights.layout else kernel.linear
                multiply(x[0], layer.weight, layer.weight_scale, layer.bias, layer.bits)
            else:
                layer(x)
        for held in cache.layers:
            attend(None, query, held.keys, held.values, None, scaling=config.kv_channels**-0.5)

    return work


def run(args):
    dtype = getattr(torch, args.dtype)
    model = random_model("6b", dtype, args.device, args.layers, quantization_bit=args.bits if args.bits < 16 else 0)
    limits = machine(dtype, args.device)
    cache = filled_cache(model, args.context)
    works = {"step": step(model, cache), "bare": bare_work(model, cache)}
    times = in_turns(works, args.rounds, args.device, warmup=2)
    result = {"step_ms": milliseconds(times["step"]), "bare_ms": milliseconds(times["bare"])}
    share = statistics.median(bare / step for bare, step in zip(times["bare"], times["step"]))
    record("overhead", args, limits, **result, overhead=round(1 - share, 3))
