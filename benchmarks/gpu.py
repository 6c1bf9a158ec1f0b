"""One prepared run on a GPU: what of the package is correct there, how fast it is, and in how much memory.

    python benchmarks gpu --out gpu.jsonl --limit 200 --only "env,tests|answers|memory,profile,graph,layers"
    python benchmarks gpu --out gpu.jsonl --limit 200 --only prefill,tune,generate
    python benchmarks gpu --dry             every stage on a CPU, in tiny shapes

It is for a rented machine, where minutes count: torch for CUDA, Triton, transformers, sentencepiece, pytest,
pytest-xdist, no network. Stages run one after another, those joined by | beside each other, each in a process of its
own with a limit of time; a stage writes each line as soon as it has it, so that what is cut off is not lost. Speeds
are at the 6.2B shapes with random weights. GPU time is that of a CUDA graph, captured from the very calls and
replayed: the host has no part in it. `read` is the share of the bandwidth of a copy that the bytes reach, weights and
cache.
"""

import argparse
import contextlib
import cProfile
import functools
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import multiprocessing
import os
import pstats
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask for a GPU does not start CUDA, which a fork may not inherit
if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
from common import (  # noqa: E402
    CACHE,
    ROOT,
    attention_chatglm,
    attention_triton,
    cache_bytes,
    filled_cache,
    glm_of,
    inference_triton,
    machine,
    matmul_rate,
    memory_bandwidth,
    modeling_chatglm,
    quantization,
    random_ids,
    random_model,
    synchronize,
    weight_bytes,
)
from transformers import AutoModel, AutoTokenizer, StaticCache

LIMITS = {  # seconds of each stage, in order of worth
    "env": 30,
    "tests": 70,
    "answers": 60,
    "memory": 60,
    "profile": 45,
    "graph": 90,
    "layers": 70,
    "prefill": 60,
    "tune": 90,
    "generate": 110,
}
LAYERS = {  # out_features, in_features
    "query_key_value": (4608, 4096),
    "dense": (4096, 4096),
    "dense_h_to_4h": (27392, 4096),
    "dense_4h_to_h": (4096, 13696),
}
TINY = {
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "num_attention_heads": 4,
    "kv_channels": 32,
    "padded_vocab_size": 1024,
}
SMALL_HEAD = {"embedding": True, "output_layer": True}
KINDS = {  # dtype, bits, options of quantize
    "bfloat16": ("bfloat16", 0, {}),
    "int4": ("float16", 4, {}),
    "int4, int8 head": ("float16", 4, SMALL_HEAD),
    "int8": ("float16", 8, {}),
    "float16": ("float16", 0, {}),
    "int4, bfloat16": ("bfloat16", 4, {}),
}


def arguments(parser):
    parser.add_argument("--out", type=Path, help="the file that lines are added to; longer texts go beside it")
    parser.add_argument("--only", default="env,tests|answers|memory,profile,graph,layers,prefill,tune,generate")
    parser.add_argument("--limit", type=float, default=480, help="seconds for all stages together")
    parser.add_argument("--dry", action="store_true", help="on a CPU, in tiny shapes")
    parser.add_argument("--stage", help=argparse.SUPPRESS)


class Run:
    """What a stage is given: where it runs, how large, and where its lines go."""

    def __init__(self, args, stage):
        self.stage, self.dry, self.out = stage, args.dry, args.out
        self.device = "cpu" if args.dry else "cuda"

    def say(self, what, **result):
        """Write a line; what has no place on it is `text`, a file beside it."""
        line = json.dumps({"stage": self.stage, "what": what, **result}, ensure_ascii=False)
        print(line, flush=True)
        if self.out:
            with open(self.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def keep(self, name, text):
        """Write a longer text beside the lines."""
        if self.out:
            self.out.with_name(f"{self.stage}_{name}.txt").write_text(text, encoding="utf-8")

    def attempt(self, what, measure, *args):
        """Write the line that `measure` returns, or its error, and go on."""
        begin = time.perf_counter()
        try:
            result = measure(self, *args)
        except Exception as error:
            self.keep("error_" + "".join(c if c.isalnum() else "_" for c in what), traceback.format_exc())
            result = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        if self.device == "cuda":
            torch.cuda.empty_cache()
        self.say(what, **result, seconds=round(time.perf_counter() - begin, 1))

    def model(self, kind):
        """A random model of KINDS."""
        dtype, bits, options = KINDS[kind]
        settings = {"quantization_bit": bits, "quantization_options": options} if bits else {}
        if self.dry:  # a CPU has no fast float16
            return random_model("small", torch.float32, "cpu", 2, **settings, **TINY)
        return random_model("6b", getattr(torch, dtype), self.device, **settings)

    def bandwidth(self):
        return 1e10 if self.dry else memory_bandwidth(self.device)


def call_seconds(work, device, rounds=20, repeats=5):
    """(seconds of a call, seconds until it returns): medians over `repeats`, of `rounds` calls in a row."""
    work()
    times = []
    rounds, repeats = (1, 1) if device == "cpu" else (rounds, repeats)
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(rounds):
            work()
        queued = time.perf_counter() - begin
        synchronize(device)
        times.append(((time.perf_counter() - begin) / rounds, queued / rounds))
    return tuple(statistics.median(column) for column in zip(*times))


def captured(work, device):
    """A CUDA graph of what `work` launches, to be replayed; on a CPU `work` itself."""
    if device == "cpu":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def decode_step(model, cache):
    """Work that decodes a token; the cache grows by it."""
    token = torch.tensor([[5]], device=model.device)
    return lambda: model(input_ids=token, use_cache=True, **{CACHE: cache})


def rounded(seconds, digits=3):
    """Milliseconds."""
    return round(1e3 * seconds, digits)


# ---- stages ---------------------------------------------------------------------------------------------------------


def env(run):
    limits = machine(torch.float32 if run.dry else torch.float16, run.device) if not run.dry else {"device": "dry"}
    versions = {}
    for name in ("triton", "cpm_kernels"):
        try:
            versions[name] = getattr(importlib.import_module(name), "__version__", "there")
        except Exception as error:
            versions[name] = f"{type(error).__name__}: {str(error)[:100]}"
    if not run.dry:
        versions["bfloat16_gflop_per_second"] = round(matmul_rate(torch.bfloat16, run.device) / 1e9)
    x = torch.ones(1, 4096, device=run.device)
    versions["us_until_a_call_returns"] = round(1e6 * call_seconds(lambda: x.add_(1), run.device, 200)[1], 2)
    run.say("machine", **limits, **versions)


def tests(run):
    """The tests that want a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda_device.py"]
    command += ["-n", "8"] if not run.dry and importlib.util.find_spec("xdist") else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    run.keep("log", done.stdout + done.stderr)
    lines = done.stdout.splitlines()
    counts = [line for line in lines if " passed" in line or " failed" in line or " skipped" in line]
    failed = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
    run.say("tests/test_cuda_device.py", code=done.returncode, counts=counts[-1:], failed=failed[:30])


def answers(run):
    """The tiny checkpoint's answers, by the lines that users type, against those of float32 on a CPU."""
    folder = ROOT / "examples" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    asked = ["你好", "谢谢", "早上好", "再见", "Hello"]
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # a user's first answer compiles

    def load(**options):
        return AutoModel.from_pretrained(folder, trust_remote_code=True, **options).eval()

    def half():
        return load().float() if run.dry else load().half()

    def talk(model):
        return [model.chat(tokenizer, query, do_sample=False)[0] for query in asked]

    wanted = talk(load().float())

    def right(run, way):
        model = way()
        begin = time.perf_counter()
        model.chat(tokenizer, asked[0], do_sample=False)
        first = round(time.perf_counter() - begin, 1)
        pairs = list(zip(wanted, talk(model)))
        wrong = [answer for want, answer in pairs if answer != want]
        return {"first_answer_seconds": first, "right": len(pairs) - len(wrong), "of": len(pairs), "wrong": wrong[:1]}

    def stream(run):
        model, history, cache = half().quantize(4).to(run.device), [], None
        for query in asked[:2]:
            parts = model.stream_chat(tokenizer, query, history, cache, do_sample=False, return_past_key_values=True)
            *_, (_, history, cache) = parts
        return {"right": history[0][1] == wanted[0]}

    chatglm = {"quant_method": "chatglm", "bits": 4}
    ways = {
        "half().quantize(4).cuda()": lambda: half().quantize(4).to(run.device),
        "half().cuda()": lambda: half().to(run.device),
        "half().cuda().quantize(8)": lambda: half().to(run.device).quantize(8),
        "bfloat16().quantize(4).cuda()": lambda: load().bfloat16().quantize(4).to(run.device),
        "bfloat16().quantize(8).cuda()": lambda: load().bfloat16().quantize(8).to(run.device),
        "half().quantize(4, group_size=32).cuda()": lambda: half().quantize(4, group_size=32).to(run.device),
        "float().cuda().quantize(4)": lambda: load().float().to(run.device).quantize(4),
        "int4, int8 head": lambda: half().quantize(4, **SMALL_HEAD).to(run.device),
        "bfloat16().cuda()": lambda: load().bfloat16().to(run.device),
        "device_map, quantization_config": lambda: load(device_map=run.device, quantization_config=chatglm),
        "cpm, int4": lambda: half().to(run.device).quantize(4, backend="cpm"),
        "cpm, int8": lambda: half().to(run.device).quantize(8, backend="cpm"),
    }
    for name, way in list(ways.items())[: 2 if run.dry else None]:
        run.attempt(name, right, way)
    run.attempt("stream_chat with a cache", stream)
    if not run.dry:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def attention(run, kind):
            with sdpa_kernel(kind):
                return {"right": half().to(run.device).chat(tokenizer, asked[0], do_sample=False)[0] == wanted[0]}

        for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            run.attempt(f"torch's attention by {kind.name} alone", attention, kind)


@torch.inference_mode()
def memory(run):
    """Peak bytes: of a prompt of 2,048, and of a token after 8,191."""
    for kind in ("int4", "int4, int8 head", "int8"):
        run.attempt(kind, memory_of, kind)


def memory_of(run, kind):
    def peak(work):
        if not run.dry:
            torch.cuda.reset_peak_memory_stats()
        work()
        return round((0 if run.dry else torch.cuda.max_memory_allocated()) / 1e9, 3)

    model = run.model(kind)
    result = {"model_gb": peak(lambda: None)}
    ids = random_ids(model, 64 if run.dry else 2048)
    result["prompt_2048_gb"] = peak(lambda: model(ids, logits_to_keep=1))
    cache = filled_cache(model, 64 if run.dry else 8191)
    step = decode_step(model, cache)
    result["token_8192_gb"] = peak(step)
    result["by_a_graph_gb"] = peak(lambda: [step() for _ in range(3)])
    return result


@torch.inference_mode()
def profile(run):
    """Where a decode step's time goes: the host's, by function and by op, and the GPU's, by kernel."""
    run.attempt("forms of a linear layer, microseconds: of a call, until it returns", profile_of_linear)
    for kind in ("bfloat16", "int4"):
        run.attempt(kind, profile_of_step, kind)


def profile_of_linear(run):
    dtype = torch.float32 if run.dry else torch.bfloat16
    out, columns = (64, 64) if run.dry else LAYERS["query_key_value"]
    weight = torch.randn(out, columns, device=run.device).to(dtype)
    bias, x = torch.ones(out, device=run.device).to(dtype), torch.randn(1, columns, device=run.device).to(dtype)
    linear = torch.nn.functional.linear
    forms = {
        "linear, bias, [1, 1, in]": lambda: linear(x[None], weight, bias),
        "linear, bias, [1, in]": lambda: linear(x, weight, bias),
        "linear, [1, 1, in]": lambda: linear(x[None], weight),
        "linear, [1, in]": lambda: linear(x, weight),
        "linear + bias": lambda: linear(x, weight).add_(bias),
        "mv": lambda: torch.mv(weight, x[0]),
    }
    return {name: [round(1e6 * s, 1) for s in call_seconds(form, run.device, 50)] for name, form in forms.items()}


def profile_of_step(run, kind):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    model = run.model(kind)
    step = decode_step(model, filled_cache(model, 64 if run.dry else 512))
    for _ in range(3):
        step()
    allocated = 0 if run.dry else torch.cuda.memory_stats().get("num_device_alloc", 0)
    total, queued = call_seconds(step, run.device, 8, 3)
    result = {"step_ms": rounded(total), "until_it_returns_ms": rounded(queued)}
    if not run.dry:
        result["device_allocations"] = torch.cuda.memory_stats().get("num_device_alloc", 0) - allocated
    host = cProfile.Profile()
    host.enable()
    for _ in range(4):
        step()
    host.disable()
    text = io.StringIO()
    pstats.Stats(host, stream=text).sort_stats("tottime").print_stats(45)
    run.keep(f"{kind}_host", text.getvalue())
    with profiler(activities=[ProfilerActivity.CPU] + ([] if run.dry else [ProfilerActivity.CUDA])) as record:
        for _ in range(3):
            step()
        synchronize(run.device)
    events = record.key_averages()
    kernels = [event for event in events if getattr(event, "device_type", None) == torch.autograd.DeviceType.CUDA]
    result["kernels_ms"] = round(sum(event.self_device_time_total for event in kernels) / 3e3, 3)
    for name, held, key in (("host_us", events, "self_cpu_time_total"), ("gpu_us", kernels, "self_device_time_total")):
        slowest = sorted(held, key=lambda event: -getattr(event, key))[:16]  # noqa: B023
        result[name] = {event.key[:70]: [round(getattr(event, key) / 3), event.count // 3] for event in slowest}
    run.keep(f"{kind}_ops", events.table(sort_by="self_cpu_time_total", row_limit=60, max_name_column_width=80))
    return result


@torch.inference_mode()
def graph(run):
    """A decode step at 512 and 8,192 tokens: as users call it, by the modules, and the GPU time of these alone.

    transformers' GlmForCausalLM is beside it.
    """
    roof = run.bandwidth()
    for kind in KINDS:
        run.attempt(kind, graph_of, kind, roof)


def graph_of(run, kind, roof):
    model, result = run.model(kind), {}
    contenders = {"ours": model, **({"glm": glm_of(model)} if kind == "bfloat16" else {})}
    for (name, contender), context in itertools.product(contenders.items(), (64,) if run.dry else (512, 8192)):
        step = decode_step(contender, filled_cache(contender, context))
        contender.config.cuda_graphs = True
        total, queued = call_seconds(step, run.device, 8, 3)
        contender.config.cuda_graphs = False
        row = {"eager_ms": rounded(total), "until_it_returns_ms": rounded(queued)}
        row["modules_ms"] = rounded(call_seconds(step, run.device, 8, 3)[0])
        read = weight_bytes(model) + cache_bytes(model, context)
        result[f"{name} {context}"] = {**row, **graph_time(run, step, read / roof)}
    if kind in ("int4", "float16"):  # one graph for every token: a static cache, whose room is always read
        for room in (128,) if run.dry else (1024, 8448):
            cache = filled_cache(model, 64, StaticCache(config=model.config, max_cache_len=room))
            read = weight_bytes(model) + cache_bytes(model, room)
            result[f"static, room of {room}"] = graph_time(run, decode_step(model, cache), read / roof)
    return result


def graph_time(run, work, limit):
    """{"graph_ms": GPU time of the captured work, "read": the share of it that its bytes need}, or the error."""
    try:
        seconds, _ = call_seconds(captured(work, run.device), run.device, 10, 5)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"graph_ms": rounded(seconds), "read": round(limit / seconds, 3)}


def layer_copies(run, name, bits, backend="auto"):
    """So many layers of a shape, with values of their own, that the card's cache does not hold them."""
    out, columns = (96, 128) if run.dry else LAYERS[name]
    like = {"device": run.device, "dtype": torch.float32 if run.dry else torch.float16}
    count = 2 if run.dry else max(2, -(-(256 << 20) // (out * columns * bits // 8)))
    if bits == 16:
        return [torch.nn.Linear(columns, out, bias=False, **like) for _ in range(count)]
    make = quantization.QuantizedLinear
    layers = [make(columns, out, bits, bias=False, backend=backend, **like) for _ in range(count)]
    for layer in layers:
        layer.weight.data.random_(-128, 128)
        layer.weight_scale.data.fill_(0.06 / (127 if bits == 8 else 7))
    return layers


def layer_input(run, layers, rows):
    return torch.randn(rows, layers[0].in_features, device=run.device).to(torch.float32 if run.dry else torch.float16)


def layer_seconds(run, layers, rows):
    """GPU seconds of one layer's call with so many rows of x."""
    x = layer_input(run, layers, rows)
    replay = captured(lambda: [layer(x) for layer in layers], run.device)
    return call_seconds(replay, run.device, 2, 5)[0] / len(layers)


@torch.inference_mode()
def layers(run):
    """Each linear layer alone: GPU microseconds by rows of x, share of the copy bandwidth, TFLOP/s; and host time."""
    roof = run.bandwidth()
    run.attempt("microseconds until a call with one row returns", host_time_of_layers)
    kinds = ((16, "auto"), (4, "auto"), (8, "auto"), (4, "cpm"), (8, "cpm"))
    for name, (bits, backend) in itertools.product(LAYERS, kinds[: 3 if run.dry else None]):
        what = f"{name}, " + (f"int{bits}, {backend}" if bits < 16 else "float16")
        run.attempt(what, times_of_layer, name, bits, backend, roof)


def host_time_of_layers(run):
    result = {}
    for bits, backend in ((16, "auto"), (4, "auto"), (8, "auto"), *(() if run.dry else ((4, "cpm"),))):
        held = layer_copies(run, "dense", bits, backend)
        x, name = layer_input(run, held, 1), f"int{bits}, {backend}" if bits < 16 else "nn.Linear"
        works = {name: lambda: [layer(x) for layer in held]}  # noqa: B023
        if bits < 16:
            linear = quantization.family(quantization.choose(backend, x.device)).linear
            weights = [(layer.weight, layer.weight_scale, layer.bias, bits) for layer in held]
            works[name + ", `linear` alone"] = lambda: [linear(x, *each) for each in weights]  # noqa: B023
        for what, work in works.items():
            result[what] = round(1e6 * call_seconds(work, run.device, 3)[1] / len(held), 1)
    return result


def times_of_layer(run, name, bits, backend, roof):
    held, result = layer_copies(run, name, bits, backend), {}
    weights, read = held[0].in_features * held[0].out_features, held[0].weight.nbytes
    for rows in (1, 300) if run.dry else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048):
        if backend != "cpm" or rows in (1, 4, 16, 512):
            seconds = layer_seconds(run, held, rows)
            row = {"us": round(1e6 * seconds, 1), "read": round(read / seconds / roof, 2)}
            result[str(rows)] = {**row, "tflops": round(2 * rows * weights / seconds / 1e12, 1)}
    return result


@torch.inference_mode()
def prefill(run):
    """Whole prompts: milliseconds and the share of the rate of matrix products; the peak of a prompt of 32K."""
    rate = 1e12 if run.dry else matmul_rate(torch.float16, run.device)
    for kind in ("int4", "bfloat16", "int8"):
        run.attempt(kind, prefill_of, kind, rate)


def prefill_of(run, kind, rate):
    model, result = run.model(kind), {}
    contenders = {"ours": model, **({"glm": glm_of(model)} if kind == "bfloat16" else {})}
    blocks = model.transformer.encoder.layers.modules()
    weights = sum(m.in_features * m.out_features for m in blocks if isinstance(m, torch.nn.Linear))
    lengths = (32,) if run.dry else (64, 512, 2048, 8192)
    for (name, contender), length in itertools.product(contenders.items(), lengths):
        ids = random_ids(model, length)
        seconds, _ = call_seconds(lambda: contender(ids, logits_to_keep=1), run.device, 2, 3)  # noqa: B023
        row = {"ms": rounded(seconds, 1), "share": round(2 * weights * length / seconds / rate, 3)}
        result[f"{name} {length}"] = row
    if not run.dry:
        held, ids = torch.cuda.memory_allocated(), random_ids(model, 32768)
        torch.cuda.reset_peak_memory_stats()
        model(ids, logits_to_keep=1)
        result["32768_gb_above_model"] = round((torch.cuda.max_memory_allocated() - held) / 1e9, 2)
    return result


TILES = {  # kernel, rows that are timed: candidates beside the tile in use
    ("skinny", 1): [
        (8, 16, 64, 8, 8, 3),
        (8, 16, 64, 8, 8, 4),
        (8, 32, 32, 8, 8, 4),
        (8, 32, 64, 4, 4, 3),
        (8, 32, 64, 4, 4, 4),
        (8, 32, 128, 4, 4, 3),
        (8, 16, 128, 4, 4, 4),
        (8, 64, 64, 4, 4, 3),
    ],
    ("skinny", 16): [(16, 32, 64, 4, 4, 4), (16, 16, 64, 4, 4, 4), (16, 32, 32, 8, 8, 3), (16, 64, 64, 4, 4, 3)],
    ("tile", 64): [(64, 32, 64, 1, 4, 4), (64, 64, 32, 1, 4, 4), (64, 64, 64, 1, 4, 4), (64, 64, 128, 1, 4, 2)],
    ("tile", 256): [(64, 128, 64, 1, 4, 3), (128, 64, 64, 1, 4, 3), (128, 128, 64, 1, 8, 3), (128, 128, 32, 1, 8, 4)],
}


@torch.inference_mode()
def tune(run):
    """GPU microseconds of other ways than the kernels go: tiles, kernels and borders for each layer; attention."""
    for bits in () if run.dry else (4, 8):
        held = {name: layer_copies(run, name, bits) for name in LAYERS}
        for (kernel, rows), tiles in TILES.items():
            run.attempt(f"{kernel}, int{bits}, {rows} rows", tune_tiles, held, kernel, rows, tiles)
        run.attempt(f"other kernels, int{bits}", tune_kernels, held)
    run.attempt("small kernels", tune_small_kernels)
    steps = (1, 1024, 512), (1, 8448, 512), (1, 8448, 8192), (1, 32768, 32000), (8, 8448, 8192)
    for tokens, room, filled in ((1, 192, 140),) if run.dry else steps:
        run.attempt(f"attention, {tokens} of {filled} tokens, room of {room}", tune_attention, tokens, room, filled)


@contextlib.contextmanager
def changed(module, cached, **changes):
    """With names of a module changed, from which follows what its function `cached` remembers."""
    held = {name: getattr(module, name) for name in changes}
    vars(module).update(changes)
    cached.cache_clear()
    try:
        yield
    finally:
        vars(module).update(held)
        cached.cache_clear()


def attempt(measure, *args, **kwargs):
    """What it measures, or why it fails."""
    try:
        return measure(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"


def triton_times(run, held, rows, **changes):
    """GPU microseconds of each layer with names of quantization_triton changed, or why it fails."""
    module = sys.modules[quantization.family("triton").linear.__module__]
    with changed(module, module.plan, **changes):
        return attempt(lambda: [round(1e6 * layer_seconds(run, layers, rows), 1) for layers in held.values()])


def tune_tiles(run, held, kernel, rows, tiles):
    module = sys.modules[quantization.family("triton").linear.__module__]
    result = {"in use: " + str(tuple(module.tile_for(kernel, rows, 4096, 4))): triton_times(run, held, rows)}
    for tile in tiles:
        chosen = module.Tile(*tile)
        result[str(tile)] = triton_times(run, held, rows, tile_for=lambda *_: chosen)  # noqa: B023
    timed = {tile: sum(times) for tile, times in result.items() if isinstance(times, list)}
    return {**result, "won": min(timed, key=timed.get)}


def tune_kernels(run, held):
    result = {"matvec, 1 row": triton_times(run, held, 1, has_tensor_cores=lambda *_: False)}
    for rows in (64, 128, 256, 512):
        result[f"tile, {rows} rows"] = triton_times(run, held, rows, FUSED_ROWS=4096)
        result[f"dequantize, {rows} rows"] = triton_times(run, held, rows, FUSED_ROWS=16)
    for size in (32, 64, 128):
        result[f"dequantize, 2048 rows, pieces of {size} MB"] = triton_times(run, held, 2048, PIECE=size << 20)
    return result


def tune_small_kernels(run):
    """GPU microseconds of what stands between a block's products, by Triton and by torch: one token, a prompt."""
    dtype, result = torch.float32 if run.dry else torch.float16, {}

    def times(work):
        return round(1e6 * call_seconds(captured(work, run.device), run.device, 20)[0], 1)

    plain = {"rms_norm": torch.nn.functional.rms_norm}
    plain.update({name: inspect.unwrap(getattr(modeling_chatglm, name)) for name in ("rotate", "gated")})
    for tokens in (1, 16) if run.dry else (1, 16, 2048):
        mixed, angles = torch.randn(1, tokens, 36, 128), torch.randn(2, 1, tokens, 1, 32, device=run.device)
        inner = torch.randn(1, tokens, 2 * 13696)
        x, mixed, inner = (t.to(run.device, dtype) for t in (mixed[..., :32, :].flatten(2), mixed, inner))
        arguments = {
            "rms_norm": (x, x.shape[-1:], torch.ones_like(x[0, 0]), 1e-5),
            "rotate": (mixed[:, :, :34], *angles),
            "gated": (inner,),
        }
        for name, given in arguments.items():
            for way, work in (("triton", getattr(inference_triton, "triton_" + name)), ("torch", plain[name])):
                result[f"{name}, {tokens} tokens, {way}"] = attempt(times, functools.partial(work, *given))
    return result


def tune_attention(run, tokens, room, filled):
    """GPU microseconds of one layer's attention under a mask: by the kernels in use, in other ways, and by torch."""
    like = {"device": run.device, "dtype": torch.float16}
    query, copies = torch.randn(1, 32, tokens, 128, **like), 1 if run.dry else max(2, -(-(256 << 20) // (room * 1024)))
    layers = [torch.randn(2, 1, 2, room, 128, **like) for _ in range(copies)]
    mask = torch.arange(room) <= torch.arange(filled - tokens, filled)[:, None]
    mask, roof = mask[None, None].to(run.device), run.bandwidth()
    processors = 2 if run.dry else attention_triton.multiprocessors(query.device)

    def times(attend, **changes):
        with changed(attention_triton, attention_triton.constants, **changes):
            work = captured(lambda: [attend(query, *layer, mask, 128**-0.5) for layer in layers], run.device)
            seconds = call_seconds(work, run.device, 2, 5)[0] / copies
        return {"us": round(1e6 * seconds, 1), "read": round(filled * 1024 / seconds / roof, 2)}

    def by_triton(processors=processors, **changes):
        return times(functools.partial(attention_triton.masked_attention, processors=processors), **changes)

    by_torch = functools.partial(attention_chatglm.sdpa_attention, None)
    result = {"in use": attempt(by_triton), "torch": attempt(times, by_torch)}
    for n in (0.5, 2):
        result[f"{n:g} times the programs"] = attempt(by_triton, int(n * processors))
    for name, change in ("8 warps", {"num_warps": 8}), ("1 stage", {"num_stages": 1}), ("3 stages", {"num_stages": 3}):
        result[name] = attempt(by_triton, OPTIONS={**attention_triton.OPTIONS, **change})
    for keys in (32, 128):
        result[f"{keys} keys at a time"] = attempt(by_triton, KEYS=keys)
    return result


def generate(run):
    """`generate` as users call it: dynamic cache, static cache compiled, and compiled by CUDA graphs alone."""
    from transformers import CompileConfig

    ways = {"dynamic": {}, "dynamic, by the modules": {}, "static, compiled": {"cache_implementation": "static"}}
    settings = CompileConfig(backend="cudagraphs", mode=None)
    ways["static, CUDA graphs alone"] = {"cache_implementation": "static", "compile_config": settings}
    for kind, way in itertools.product(("int4", "bfloat16"), list(ways)[: 1 if run.dry else None]):
        run.attempt(f"{kind}, {way}", generate_times, kind, ways[way], "modules" not in way)
        torch.compiler.reset()


def generate_times(run, kind, options, by_graphs):
    model, new = run.model(kind), 4 if run.dry else 128
    model.config.cuda_graphs = by_graphs
    ids = random_ids(model, 64)
    options = {**options, "max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def answer():
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    begin = time.perf_counter()
    answer()
    first = round(time.perf_counter() - begin, 1)
    return {"first_seconds": first, "ms_a_token": rounded(call_seconds(answer, run.device, 1, 2)[0] / new)}


# ---- the run --------------------------------------------------------------------------------------------------------


def begin_stage(args, stage):
    """A process that is this one's copy, and need not import anything again; a new one where CUDA refuses a copy."""

    def work():
        os.setsid()  # what it starts ends with it
        try:
            if not args.dry:
                torch.zeros(1, device="cuda")
        except RuntimeError as error:
            Run(args, stage).say("begins anew", reason=str(error)[:200])
            os.execv(sys.executable, [sys.executable, *sys.argv, "--stage", stage])
        run_stage(args, stage)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def run_stage(args, stage):
    torch.manual_seed(0)
    globals()[stage](Run(args, stage))


def run(args):
    args.out = args.out and args.out.absolute()
    if args.stage:
        return run_stage(args, args.stage)
    patience = 10 if args.dry else 1  # a dry run proves that the stages run, however busy the CPU is
    end = time.monotonic() + args.limit * patience
    for group in args.only.split(","):
        stages = {stage: min(time.monotonic() + LIMITS[stage] * patience, end) for stage in group.split("|")}
        running = {stage: begin_stage(args, stage) for stage, until in stages.items() if until > time.monotonic() + 3}
        for stage in stages:
            if stage not in running:
                Run(args, stage).say("no time left")
        for stage, process in running.items():
            process.join(max(stages[stage] - time.monotonic(), 0))
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.join()
                Run(args, stage).say("cut off by its limit of time")
            elif process.exitcode:
                Run(args, stage).say("ended with an error", code=process.exitcode)
