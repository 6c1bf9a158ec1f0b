"""Time a token at a growing context, beside transformers' GlmForCausalLM with the same weights.

    python benchmarks/decode.py [--dtype float32] [--device cpu] [--contexts 512 2048 8192]

The toy's shape scaled up: hidden 1024, 8 layers, random weights. The caches are filled with random keys and values of
the contexts' lengths; then both models decode in turns, a token at every context in every round, so that the machine's
drift touches all alike. One JSON line goes to benchmarks/results/.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import conftest  # noqa: E402, F401  (the repository as the package `chatglm2`)
from chatglm2.configuration_chatglm import ChatGLMConfig  # noqa: E402
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration  # noqa: E402
from test_against_glm import glm_twin  # noqa: E402

SHAPE = {
    "num_layers": 8,
    "hidden_size": 1024,
    "ffn_hidden_size": 2560,
    "num_attention_heads": 32,
    "kv_channels": 32,
    "multi_query_group_num": 2,
    "padded_vocab_size": 1664,
    "seq_length": 16384,
}


def filled_cache(model, context, seed=0):
    """A cache of `context` random tokens, in the form that the model itself would have made."""
    config, cache = model.config, DynamicCache()
    if hasattr(config, "kv_channels"):
        from chatglm2.cache_chatglm import give_room

        give_room(cache)
    generator = torch.Generator().manual_seed(seed)
    size = (1, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        key, value = (torch.randn(size, generator=generator).to(model.device, model.dtype) for _ in range(2))
        cache.update(key, value, layer)
    return cache


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def step_times(models, contexts, tokens, warmup=3):
    """Milliseconds of each step: {(context, number of the model): a list over the rounds}."""
    device = models[0].device
    token = torch.tensor([[5]], device=device)
    caches = {(context, i): filled_cache(model, context) for context in contexts for i, model in enumerate(models)}
    times = {key: [] for key in caches}
    for _ in range(tokens + warmup):
        for (context, i), cache in caches.items():
            synchronize(device)
            start = time.perf_counter()
            models[i](input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            synchronize(device)
            times[context, i].append(1000 * (time.perf_counter() - start))
    return {key: record[warmup:] for key, record in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    ours = ChatGLMForConditionalGeneration(ChatGLMConfig(**SHAPE)).eval()
    glm = glm_twin(ours)
    glm.set_attn_implementation("sdpa")
    models = [model.to(args.device, getattr(torch, args.dtype)) for model in (ours, glm)]

    times, rows = step_times(models, args.contexts, args.tokens), []
    for context in args.contexts:
        ours_ms, glm_ms = (statistics.median(times[context, i]) for i in (0, 1))
        ratio = statistics.median(theirs / ours for ours, theirs in zip(times[context, 0], times[context, 1]))
        rows.append(
            {"context": context, "ours_ms": round(ours_ms, 2), "glm_ms": round(glm_ms, 2), "ratio": round(ratio, 2)}
        )
        print(f"context {context:6d}: {ours_ms:7.2f} ms a token, GlmForCausalLM {glm_ms:7.2f}, {ratio:.2f} times that")
    first, last = times[args.contexts[0], 0], times[args.contexts[-1], 0]
    growth = statistics.median(b / a for a, b in zip(first, last))
    print(f"a token at {rows[-1]['context']} costs {growth:.2f} times one at {rows[0]['context']}")
    result = {
        "benchmark": "decode",
        "shape": SHAPE,
        "dtype": args.dtype,
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else cpu_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
        "growth": round(growth, 3),
    }
    with open(Path(__file__).parent / "results" / "decode.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(result) + "\n")


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
