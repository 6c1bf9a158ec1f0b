"""What the benchmarks share: random models, timing in turns, the machine's limits, one JSON line per run."""

import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache, GlmForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from chatglm2 import (  # noqa: F401
    attention_chatglm,
    attention_triton,
    c_library,
    inference_triton,
    modeling_chatglm,
    quantization,
    quantization_cpu,
    quantization_format,
)
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm2.transformers_compat import CACHE, grow_in_place  # noqa: F401
from checkpoints import ROOT, TINY, load_tokenizer  # noqa: F401
from glm import glm_config, glm_state_dict

RESULTS = ROOT / "benchmarks" / "results"
SHAPES = {  # "small" has the proportions of the tiny checkpoint; "6b" is the released shape
    "small": {
        "num_layers": 8,
        "hidden_size": 1024,
        "ffn_hidden_size": 2560,
        "num_attention_heads": 32,
        "kv_channels": 32,
        "multi_query_group_num": 2,
        "padded_vocab_size": 1664,
    },
    "6b": {},
}


def model_arguments(parser):
    """The options of a benchmark of one float model."""
    parser.add_argument("--shape", default="small", choices=["small", "6b"])
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)


# ---- models ---------------------------------------------------------------------------------------------------------


def random_model(shape="small", dtype=torch.float32, device="cpu", layers=None, **settings):
    """The network in `shape`. One block of random numbers fills all weights, so 12.5 GB take seconds.

    With `quantization_bit`, the int8 or int4 layers hold random integers.
    """
    config = ChatGLMConfig(**{**SHAPES[shape], "seq_length": 1 << 17, **settings})
    config.num_layers = config.num_hidden_layers = layers or config.num_layers
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config).to(dtype)
    model.to_empty(device=device)
    fill = random_filler(config.quantization_bit)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        fill(name, tensor.data)
    return model.eval()


def random_filler(bits=0):
    """fill(name, tensor) -> the tensor with random values of the usual size; a norm has ones."""
    generator = torch.Generator().manual_seed(0)
    floats = torch.randn(1 << 20, generator=generator) * 0.02
    integers = torch.randint(-128, 128, (1 << 20,), dtype=torch.int8, generator=generator)

    def fill(name, tensor):
        flat = tensor.view(-1)
        if name.endswith("weight_scale"):
            flat.fill_(0.02 / (127 if bits == 8 else 7))
        elif "norm" in name:
            flat.fill_(1)
        else:
            source = (integers if tensor.dtype == torch.int8 else floats).to(tensor.device, tensor.dtype)
            for i in range(0, flat.numel(), len(source)):
                part = flat[i : i + len(source)]
                part.copy_(source[: len(part)])
        return tensor

    return fill


def glm_of(model):
    """transformers' own GlmForCausalLM on the tensors of `model`; nothing is copied."""
    config = glm_config(model.config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        glm = GlmForCausalLM(config)
    glm.load_state_dict(glm_state_dict(model), assign=True)
    glm.model.rotary_emb = type(glm.model.rotary_emb)(config).to(model.device)
    return glm.eval()


def contenders(model, names=("ours", "glm")):
    """{name: model}: this package's, and transformers' on the same tensors."""
    return {name: model if name == "ours" else glm_of(model) for name in names}


def filled_cache(model, context, cache=None):
    """A cache of `context` random tokens, by default of the kind that the model itself makes."""
    if cache is None:
        cache = DynamicCache()
        if isinstance(model, ChatGLMForConditionalGeneration):
            grow_in_place(cache)
    config, device = model.config, model.device
    generator = torch.Generator(device).manual_seed(0)
    size = (1, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(size, generator=generator, device=device).to(model.dtype) for _ in range(2))
        cache.update(key, value, layer)
    return cache


def random_ids(model, length):
    """A prompt, int [1, length]."""
    return torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)


def weight_bytes(model):
    """Bytes of weights read per token: all but the embedding."""
    embedding = {id(p) for p in model.get_input_embeddings().parameters()}
    return sum(p.nbytes for p in model.parameters() if id(p) not in embedding)


def cache_bytes(model, tokens):
    """Bytes of the keys and values of this many tokens."""
    config = model.config
    return 2 * config.num_layers * config.num_key_value_heads * config.kv_channels * tokens * model.dtype.itemsize


# ---- time and memory ------------------------------------------------------------------------------------------------


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work, device="cpu"):
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def take_turns(timers, rounds, warmup=1):
    """{name: seconds of each round}. All run in every round, so that drift of the machine affects all.

    The order is reversed in every second round, so that none always follows the same one.
    """
    times, order = {name: [] for name in timers}, list(timers)
    for _ in range(rounds + warmup):
        for name in order:
            times[name].append(timers[name]())
        order.reverse()
    return {name: record[warmup:] for name, record in times.items()}


def in_turns(works, rounds, device="cpu", warmup=1):
    """`take_turns` with functions that are timed as a whole."""
    return take_turns({name: partial(seconds, work, device) for name, work in works.items()}, rounds, warmup)


def ratio(times, base="ours", other="glm"):
    """The median over the rounds of other / base: the speedup of `base`."""
    return round(statistics.median(b / a for a, b in zip(times[base], times[other])), 2)


def milliseconds(record):
    return round(1000 * statistics.median(record), 2)


def peak_bytes(work, device="cpu"):
    """Peak memory of `work` in bytes, above what was in use: allocated on the GPU, or resident on a CPU."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    c = ctypes.CDLL(None)
    c.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD: a tensor of 1 MiB gets its own pages, which are freed with it
    c.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, files = resident_bytes("VmRSS"), resident_bytes("RssFile")
    work()
    returned = max(resident_bytes("RssFile") - files, 0)  # pages of libraries that were evicted before
    return resident_bytes("VmHWM") - before - returned


def resident_bytes(key):
    """The process's resident memory now (VmRSS) or at its peak (VmHWM); Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {key}")


# ---- the machine ----------------------------------------------------------------------------------------------------


def memory_bandwidth(device="cpu"):
    """Bytes/s: read from 1 GiB by all threads of a CPU, or read and written by a copy on a GPU."""
    if torch.device(device).type == "cuda":
        block = torch.empty(1 << 30, dtype=torch.int8, device=device)
        target = torch.empty_like(block)
        return 2 * block.nbytes / min(seconds(lambda: target.copy_(block), device) for _ in range(9))
    block = quantization_cpu._on_large_pages(1 << 30).view(torch.int64).fill_(1)
    return block.nbytes / min(seconds(block.sum) for _ in range(5))


def matmul_rate(dtype, device="cpu"):
    """Operations/s of a square matrix product: side 2,048 on a CPU, 8,192 on a GPU."""
    side = 8192 if torch.device(device).type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b.t(), device) for _ in range(5))


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def instructions(device="cpu"):
    """What the choice of kernels depends on: "AVX512-VNNI", "AVX2", "GPU" or "other"."""
    if torch.device(device).type != "cpu":
        return "GPU"
    known = [kind for kind, _ in c_library.instructions()]
    return {"avx512": "AVX512-VNNI", "avx2": "AVX2"}[known[0]] if known else "other"


def machine(dtype, device="cpu"):
    """The hardware, the versions, and the speed of the machine at this moment."""
    gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else processor(),
        "instructions": instructions(device),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "memory_gb_per_second": round(memory_bandwidth(device) / 1e9, 1),
        "matmul_gflop_per_second": round(matmul_rate(dtype, device) / 1e9),
    }


def record(benchmark, args, machine, **result):
    """Print the run as one JSON line and append it to results/BENCHMARK.jsonl."""
    settings = {
        key: value for key, value in vars(args).items() if key not in ("run", "benchmark") and value is not None
    }
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    line = json.dumps({"benchmark": benchmark, "date": date, "settings": settings, "machine": machine, **result})
    print(line)
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{benchmark}.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
