"""INT8, INT4 and bfloat16 on the CPU at the 6.2B shapes, beside llama.cpp and the original's way.

    python benchmarks/quantized.py [--bits 4 8 16] [--layers 28] [--rounds 3] [--group-size 128] [--small-head]
                                   [--llama PYTHON]   a Python that has llama-cpp-python and gguf

Contenders take turns within each round, and the ratio is the median over the rounds: absolute figures drift. Prints a
table, and adds one JSON line a run to results/quantized.jsonl.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
package = importlib.util.module_from_spec(importlib.util.spec_from_loader("chatglm2", loader=None, is_package=True))
package.__path__ = [str(ROOT)]
sys.modules["chatglm2"] = package

import torch  # noqa: E402
import transformers  # noqa: E402
from chatglm2 import quantization, quantization_cpu  # noqa: E402
from chatglm2.configuration_chatglm import ChatGLMConfig  # noqa: E402
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration  # noqa: E402

TASKS = (("decode", 8), ("prefill", 32), ("prefill", 512))
SHAPES = ((4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696))


def random_model(bits, layers, group_size, small_head):
    """The 6.2B network, its values made from one block of random numbers, without a float copy."""
    dtype = torch.float16 if bits < 16 else torch.bfloat16
    config = ChatGLMConfig(
        num_layers=layers, quantization_bit=bits if bits < 16 else 0, torch_dtype=str(dtype).removeprefix("torch.")
    )
    if bits < 16:
        options = {"group_size": group_size, "embedding": small_head, "output_layer": small_head}
        config.quantization_options = {key: value for key, value in options.items() if value}
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config).to(dtype)
    model.to_empty(device="cpu")
    some = torch.randn(1 << 20) * 0.02
    integers = torch.randint(-128, 128, (1 << 20,), dtype=torch.int8)
    for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
        flat = tensor.data.view(-1)
        if name.endswith("weight_scale"):
            flat.fill_(0.06 / (127 if bits == 8 else 7))
        elif "norm" in name:
            flat.fill_(1)
        else:
            source = (integers if tensor.dtype == torch.int8 else some).to(tensor.dtype)
            for i in range(0, flat.numel(), len(source)):
                part = flat[i : i + len(source)]
                part.copy_(source[: len(part)])
    return model.eval()


@torch.inference_mode()
def time_ours(model, what, count):
    """Seconds a token."""
    ids = torch.arange(100, 100 + (32 if what == "decode" else count))[None]
    begin = time.perf_counter()
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    if what == "decode":
        begin = time.perf_counter()
        for _ in range(count):
            cache = model(ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
    return (time.perf_counter() - begin) / count


def time_original(bits, what, count, layers, group_size):
    """Dequantize, then matmul: the linear layers of one block, times the number of blocks."""
    total, tokens = 0.0, 1 if what == "decode" else count
    for out, columns in SHAPES:
        weight = torch.randint(-128, 128, (out, columns * bits // 8), dtype=torch.int8)
        scale = torch.rand((out,) if group_size is None else (out, columns // group_size), dtype=torch.bfloat16)
        x = torch.randn(tokens, columns, dtype=torch.bfloat16)
        begin = time.perf_counter()
        quantization.reference_linear(x, weight, scale, None, bits)
        total += time.perf_counter() - begin
    return total * layers / tokens


class Llama:
    def __init__(self, python, kind, layers, threads):
        script = Path(__file__).with_name("against_llama_cpp.py")
        self.process = subprocess.Popen(
            [python, script, kind, str(layers), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{python} {script} did not start: run it by hand to see why")

    def time(self, what, count):
        print(what, count, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def memory_bandwidth():
    """Bytes a second that all threads read from 1 GiB on 2 MiB pages: the roof of decoding."""
    block = quantization_cpu._on_large_pages(1 << 30).view(torch.int64).fill_(1)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - begin)
    return block.numel() * 8 / min(seconds)


@torch.inference_mode()
def linear_bandwidth(model):
    """Bytes of weights a second with one token, in the quantized layers alone."""
    layers = [m for m in model.modules() if isinstance(m, quantization.QuantizedLinear)]
    inputs = {m.in_features: torch.randn(1, m.in_features, dtype=torch.float16) for m in layers}
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        for layer in layers:
            layer(inputs[layer.in_features])
        seconds.append(time.perf_counter() - begin)
    return sum(layer.weight.numel() for layer in layers) / min(seconds)


def errors(bits, backend, group_size):
    """Relative to float32 with the same weights: Gaussian inputs, and 8 channels of them 30 times the size."""
    torch.manual_seed(0)
    weight, scale = quantization.quantize_weight(torch.randn(512, 4096), bits, group_size)
    result = {}
    for name, size in (("gaussian", 1), ("outliers", 30)):
        for tokens in (1, 64):
            x = torch.randn(tokens, 4096)
            x[:, torch.randperm(4096)[:8]] *= size
            x = x.bfloat16()
            want = quantization.reference_linear(x.float(), weight, scale, None, bits)
            got = quantization.family(quantization.choose(backend, x.device))[0](x, weight, scale, None, bits)
            result[f"{name}, {tokens} tokens"] = round(((got.float() - want).norm() / want.norm()).item(), 5)
    return result


def run(bits, backend, arguments):
    model = random_model(bits, arguments.layers, arguments.group_size, arguments.small_head)
    for layer in model.modules():
        if isinstance(layer, quantization.QuantizedLinear):
            layer.backend = backend
    time_ours(model, "prefill", 4)  # lays out the weights
    llama = None
    if arguments.llama and bits < 16:
        kind = {4: "q4_0", 8: "q8_0"}[bits]
        llama = Llama(arguments.llama, kind, arguments.layers, torch.get_num_threads())
    result = {
        "bits": bits,
        "backend": backend,
        "bytes": sum(p.nbytes for p in model.parameters()),
        "tokens_per_second": {},
    }
    if bits < 16:
        result["error"] = errors(bits, backend, arguments.group_size)
    for what, count in TASKS:
        times = {"ours": [], "llama.cpp": []}
        for _ in range(arguments.rounds):
            times["ours"].append(time_ours(model, what, count))
            if llama:
                times["llama.cpp"].append(llama.time(what, count))
        row = {name: round(1 / statistics.median(values), 3) for name, values in times.items() if values}
        if llama:
            ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["llama.cpp"])]
            row["ratio"] = round(statistics.median(ratios), 2)
        if bits < 16 and backend == "auto":
            row["dequantize, then matmul"] = round(
                1 / time_original(bits, what, count, arguments.layers, arguments.group_size), 3
            )
        name = "decode" if what == "decode" else f"prefill {count}"
        result["tokens_per_second"][name] = row
        print(
            f"{bits:2} bits, {backend:6} {name:12}",
            "  ".join(f"{key} {value}" for key, value in row.items()),
            flush=True,
        )
    if bits < 16 and backend == "auto":
        pairs = [(linear_bandwidth(model), memory_bandwidth()) for _ in range(arguments.rounds)]
        result["linear_gb_per_second"], result["memory_gb_per_second"] = (round(max(p) / 1e9, 1) for p in zip(*pairs))
        share = statistics.median(linear / memory for linear, memory in pairs)
        result["share_of_memory_bandwidth"] = round(share, 3)
        print(
            f"{bits:2} bits, linear layers, one token: {result['linear_gb_per_second']} GB/s, {share:.0%} of memory's"
        )
    if llama:
        llama.close()
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8, 16], choices=[4, 8, 16])
    parser.add_argument("--backends", nargs="+", default=["auto", "stock"], help="stock: as without a compiler")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--small-head", action="store_true", help="the embedding and the output layer in int8 too")
    parser.add_argument("--llama", help="a Python with llama-cpp-python and gguf")
    arguments = parser.parse_args()
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{key: getattr(arguments, key) for key in ("layers", "rounds", "group_size", "small_head")},
        "runs": [],
    }
    for bits in arguments.bits:
        for backend in arguments.backends if bits < 16 else ["auto"]:
            record["runs"].append(run(bits, backend, arguments))
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    with open(results / "quantized.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
