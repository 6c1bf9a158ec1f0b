"""int4, int8 and half precision at the 6.2B shapes: tokens/s, compared with llama.cpp and the original's method.

Weights are random. llama.cpp (Q4_0, Q8_0, the same number of threads) runs in its own process if --llama names a Python
that has llama-cpp-python and gguf. The original dequantizes a weight, then multiplies: the linear layers of one block
are timed and scaled to all blocks, after the others, which they would slow down.
"""

import statistics
import subprocess
from functools import partial
from pathlib import Path

import torch
from common import (
    c_library,
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

TASKS = {"decode": 8, "prefill 32": 32, "prefill 512": 512}  # tokens
CONTEXT = 32  # what decoding begins with


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
    parser.add_argument("--llama", help="a Python with llama-cpp-python and gguf")


@torch.inference_mode()
def feed(model, tokens, cache=None):
    """Pass so many tokens, and return the cache."""
    ids = torch.arange(100, 100 + tokens, device=model.device)[None]
    return model(ids, cache=cache, use_cache=True, logits_to_keep=1).cache


def time_ours(model, task):
    """Seconds of a task."""
    if task != "decode":
        return seconds(partial(feed, model, TASKS[task]), model.device)
    cache = feed(model, CONTEXT)
    return seconds(lambda: [feed(model, 1, cache) for _ in range(TASKS[task])], model.device)


@torch.inference_mode()
def time_original(block, layers, task):
    """Seconds that the linear layers of a task take when each weight is dequantized first."""
    total, tokens = 0.0, 1 if task == "decode" else TASKS[task]
    for layer in block:
        x = torch.randn(tokens, layer.in_features, device=layer.weight.device).to(layer.weight_scale.dtype)
        weight = layer.state_dict()["weight"]  # in the released packing
        work = partial(quantization_format.reference_linear, x, weight, layer.weight_scale, layer.bias, layer.bits)
        total += seconds(work, x.device)
    return total * layers * TASKS[task] / tokens


class Llama:
    """llama.cpp in a process of its own."""

    def __init__(self, python, bits, layers):
        script = Path(__file__).with_name("llama_cpp_timer.py")
        command = [python, script, {4: "q4_0", 8: "q8_0"}[bits], str(layers), str(torch.get_num_threads())]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{python} {script} did not start: run it by hand to see why")

    def time(self, task):
        """Seconds of a task."""
        print(task.split()[0], TASKS[task], file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline()) * TASKS[task]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


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


def time_model(args, bits, backend):
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
    llama = Llama(args.llama, bits, args.layers) if args.llama and quantized else None
    for task, tokens in TASKS.items():
        timers = {"ours": partial(time_ours, model, task)}
        if llama:
            timers["llama.cpp"] = partial(llama.time, task)
        times = take_turns(timers, args.rounds if tokens < 512 else min(args.rounds, 2))  # these take half a minute
        if quantized and backend == "auto":
            times["dequantize"] = [time_original(layers[:4], args.layers, task) for _ in range(4)][1:]
        middle = {name: statistics.median(record) for name, record in times.items()}
        row = {name: round(tokens / middle[name], 3) for name in times}
        row["ratios"] = {"llama.cpp": ratio(times, other="llama.cpp")} if llama else {}
        if "dequantize" in times:
            row["ratios"]["dequantize"] = round(middle["dequantize"] / middle["ours"], 2)
        row["rounds"] = len(times["ours"])
        result["tokens_per_second"][task] = row
        print(f"{bits:2} bits, {backend}, {task}: {row}", flush=True)
    if quantized:
        result["error"] = errors(bits, backend, args.group_size, dtype, args.device)
        pairs = [(linear_bandwidth(layers), memory_bandwidth(args.device)) for _ in range(args.rounds + 1)][1:]
        result["linear_gb_per_second"] = round(max(linear for linear, _ in pairs) / 1e9, 1)
        share = statistics.median(linear / memory for linear, memory in pairs)
        result["share_of_memory_bandwidth"] = round(share, 3)
    if llama:
        llama.close()
    return result


def run(args):
    if args.instructions:
        c_library.instructions = lambda: [(args.instructions, c_library.FLAGS)]
    limits = machine(getattr(torch, args.dtype), args.device)
    runs = [time_model(args, bits, b) for bits in args.bits for b in (args.backends if bits < 16 else ["auto"])]
    args.llama = "llama.cpp" if args.llama else None
    record("quantized", args, limits, runs=runs)
