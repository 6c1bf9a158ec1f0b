"""int4, int8 and half precision at the 6.2B shapes: tokens/s, beside llama.cpp, ik_llama.cpp and the original's method.

Weights and caches are random. llama.cpp and ik_llama.cpp (Q4_0, Q8_0, the same number of threads) run in processes of
their own if --llama and --ik name a Python that has them. The original dequantizes a weight, then multiplies: the
linear layers of one block are timed and scaled to all blocks, after the others, which they would slow down.
"""

import statistics
from functools import partial

import peers
import torch
from common import (
    c_library,
    filled_cache,
    machine,
    memory_bandwidth,
    quantization,
    quantization_format,
    random_model,
    ratio,
    record,
    seconds,
    take_turns,
)

DECODE = {"decode": 32, "decode 4096": 4096, "decode 8192": 8192}  # the contexts at which 8 tokens are decoded
PREFILL = {"prefill 32": 32, "prefill 512": 512}  # tokens


def arguments(parser):
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 16], choices=[4, 8, 16])
    parser.add_argument("--backends", nargs="+", default=["auto"], help="stock: as on a CPU without a compiler")
    parser.add_argument("--instructions", choices=["avx2"], help="the C kernel as for a CPU without AVX512")
    parser.add_argument("--dtype", default="float16", help="of the activations, and of what is not quantized")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--group-size", type=int, help="a scale for so many inputs, not for a row")
    parser.add_argument("--small-head", action="store_true", help="the embedding and the output layer in int8 too")
    peers.arguments(parser)


@torch.inference_mode()
def feed(model, tokens, cache=None):
    ids = torch.arange(100, 100 + tokens, device=model.device)[None]
    model(ids, cache=cache, use_cache=True, logits_to_keep=1)


def timer(model, task):
    """A function that returns the seconds of a task."""
    if task in PREFILL:
        return lambda: seconds(partial(feed, model, PREFILL[task]), model.device)
    with torch.inference_mode():
        cache = filled_cache(model, DECODE[task])
    return lambda: seconds(lambda: [feed(model, 1, cache) for _ in range(8)], model.device)


def peer_timer(peer, task):
    """As `timer`, of a peer."""
    return partial(peer.prefill, PREFILL[task]) if task in PREFILL else partial(peer.decode, 8, DECODE[task])


@torch.inference_mode()
def time_original(block, layers, task):
    """Seconds that the linear layers of a task take when each weight is dequantized first."""
    total, tokens = 0.0, PREFILL.get(task, 1)
    for layer in block:
        x = torch.randn(tokens, layer.in_features, device=layer.weight.device).to(layer.weight_scale.dtype)
        weight = layer.state_dict()["weight"]  # in the released packing
        work = partial(quantization_format.reference_linear, x, weight, layer.weight_scale, layer.bias, layer.bits)
        total += seconds(work, x.device)
    return total * layers * (1 if task in PREFILL else 8)


@torch.inference_mode()
def linear_bandwidth(layers):
    """Bytes of weights a second that quantized layers read with one token."""
    first = layers[0]
    inputs = {layer.in_features: torch.randn(1, layer.in_features, device=first.weight.device) for layer in layers}
    inputs = {size: x.to(first.weight_scale.dtype) for size, x in inputs.items()}
    read = sum(layer.weight.nbytes for layer in layers)
    return read / seconds(lambda: [layer(inputs[layer.in_features]) for layer in layers], first.weight.device)


def errors(bits, backend, group_size, dtype, device):
    """Relative to float32 with the same weights: Gaussian inputs, and 8 channels of them 30 times the size."""
    torch.manual_seed(0)
    weight, scale = quantization_format.quantize_weight(torch.randn(512, 4096, device=device), bits, group_size)
    layer = quantization.QuantizedLinear(4096, 512, bits, bias=False, group_size=group_size, backend=backend)
    layer.weight, layer.weight_scale = (torch.nn.Parameter(t, requires_grad=False) for t in (weight, scale))
    result = {}
    for name, size in (("gaussian", 1), ("outliers", 30)):
        for tokens in (1, 64):
            x = torch.randn(tokens, 4096, device=device)
            x[:, torch.randperm(4096)[:8]] *= size
            x = x.to(dtype)
            want = quantization_format.reference_linear(x.float(), weight, scale, None, bits)
            result[f"{name}, {tokens} tokens"] = round(((layer(x).float() - want).norm() / want.norm()).item(), 5)
    return result


def time_model(args, bits, backend, others):
    dtype, quantized = getattr(torch, args.dtype), bits < 16
    options = {"group_size": args.group_size, "embedding": args.small_head, "output_layer": args.small_head}
    options = {key: value for key, value in options.items() if value}
    settings = {"quantization_bit": bits, "quantization_options": options} if quantized else {}
    model = random_model("6b", dtype, args.device, args.layers, **settings)
    layers = [layer for layer in model.modules() if isinstance(layer, quantization.QuantizedLinear)]
    for layer in layers:
        layer.backend = backend
    kernel = quantization.choose(backend, model.device) if quantized else "F.linear"
    size = model.get_memory_footprint(return_buffers=False)
    result = {"bits": bits, "backend": backend, "kernel": kernel, "model_gb": round(size / 1e9, 2)}
    result["tokens_per_second"] = {}
    for task in (*DECODE, *PREFILL):
        tokens = PREFILL.get(task, 8)
        timers = {"ours": timer(model, task), **{name: peer_timer(peer, task) for name, peer in others.items()}}
        times = take_turns(timers, args.rounds if tokens < 512 else min(args.rounds, 2))  # these take half a minute
        ratios = {name: ratio(times, other=name) for name in others}
        if quantized and backend == "auto" and (task == "decode" or task in PREFILL):
            times["dequantize"] = [time_original(layers[:4], args.layers, task) for _ in range(4)][1:]
            ratios["dequantize"] = round(statistics.median(times["dequantize"]) / statistics.median(times["ours"]), 2)
        row = {name: round(tokens / statistics.median(record), 3) for name, record in times.items()}
        row.update(ratios=ratios, rounds=len(times["ours"]))
        result["tokens_per_second"][task] = row
        print(f"{bits:2} bits, {backend}, {task}: {row}", flush=True)
    if quantized:
        result["error"] = errors(bits, backend, args.group_size, dtype, args.device)
        pairs = [(linear_bandwidth(layers), memory_bandwidth(args.device)) for _ in range(args.rounds + 1)][1:]
        result["linear_gb_per_second"] = round(max(linear for linear, _ in pairs) / 1e9, 1)
        share = statistics.median(linear / memory for linear, memory in pairs)
        result["share_of_memory_bandwidth"] = round(share, 3)
    return result


def run(args):
    if args.instructions:
        c_library.instructions = lambda: [(args.instructions, c_library.FLAGS)]
    limits = machine(getattr(torch, args.dtype), args.device)
    runs, seen = [], {}
    for bits in args.bits:
        with peers.started(args, bits, args.layers, max(DECODE.values()) + 512) as others:
            seen.update(others)
            runs += [time_model(args, bits, b, others) for b in (args.backends if bits < 16 else ["auto"])]
    peers.versions(args, seen)
    record("quantized", args, limits, runs=runs)
