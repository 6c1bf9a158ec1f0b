"""What of a decode step at the 6.2B shapes is neither matrix product nor attention.

The matrix products and the attention of one step are timed alone, with a step's inputs, in turns with the whole step;
the rest of the step is overhead: norms, rotations, the activation, the cache, Python.
"""

import statistics
from functools import partial

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
    from chatglm2.modeling_chatglm import sdpa_attention

    config, device = model.config, model.device
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    inputs = {
        layer.in_features: torch.randn(1, 1, layer.in_features, device=device).to(model.dtype) for layer in linears
    }
    query = torch.randn(1, config.num_attention_heads, 1, config.kv_channels, device=device).to(model.dtype)

    family = quantization.family(quantization.choose("auto", device))

    def product(layer):
        """The layer's matrix product alone, by its kernel where it is quantized."""
        x = inputs[layer.in_features]
        if not isinstance(layer, quantization.QuantizedLinear):
            return partial(layer, x)
        weights = layer.lay_out()
        kernel = family.linear if weights.layout == quantization.RELEASED else family.layout.linear
        return partial(
            kernel, x[0], *(weights.parameters[name] for name in ("weight", "weight_scale", "bias")), layer.bits
        )

    products = [product(layer) for layer in linears]

    @torch.no_grad()
    def work():
        for multiply in products:
            multiply()
        for held in cache.layers:
            sdpa_attention(None, query, held.keys, held.values, None, scaling=None)

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
