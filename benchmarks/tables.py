"""Write the READMEs' tables, and the pictures, from the newest lines of benchmarks/results/*.jsonl.

python benchmarks/tables.py       (the pictures need matplotlib; running it again changes nothing)
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WORDS = {
    "README.md": {
        "context": "context",
        "ours": "ms a token",
        "glm": "GlmForCausalLM, ms a token",
        "ratio": "times ours",
        "peak_gb": "peak of resident memory while loading, GB",
        "peak_with_a_forward_gb": "and with a forward pass, GB",
        "model_gb": "the model, GB",
        "threads": "threads",
        "weights": "weights",
        "backend": "computed by",
        "auto": "the C kernel",
        "stock": "torch's own operators",
        "llama": "times llama.cpp",
        "original": "dequantize, then matmul",
        "share": "Linear layers with one token read at {share:.0%} of the memory bandwidth measured beside it.",
    },
    "README_zh.md": {
        "context": "上下文",
        "ours": "每 token 毫秒",
        "glm": "GlmForCausalLM，每 token 毫秒",
        "ratio": "是本项目的几倍",
        "peak_gb": "加载时常驻内存峰值，GB",
        "peak_with_a_forward_gb": "再做一次前向，GB",
        "model_gb": "模型大小，GB",
        "threads": "线程",
        "weights": "权重",
        "backend": "由谁计算",
        "auto": "C 内核",
        "stock": "torch 自带算子",
        "llama": "是 llama.cpp 的几倍",
        "original": "先反量化再相乘",
        "share": "单 token 时线性层的读取速度是同时测得内存带宽的 {share:.0%}。",
    },
}


def newest(name, key=lambda record: None):
    """The last record of results/NAME.jsonl for each value of `key`."""
    path = RESULTS / f"{name}.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return {key(record): record for record in records}


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(record, words):
    device, threads = record.get("device") or record["cpu"], f"{record['threads']} {words['threads']}"
    return f"{device}, {threads}, torch {record['torch']}, transformers {record['transformers']}."


def decode_table(words):
    """Time a token against the context."""
    records = newest("decode", lambda record: record["dtype"])
    rows = [
        [dtype, row["context"], row["ours_ms"], row["glm_ms"], row["ratio"]]
        for dtype, record in sorted(records.items(), reverse=True)
        for row in record["rows"]
    ]
    if not rows:
        return ""
    header = ["dtype", *(words[key] for key in ("context", "ours", "glm", "ratio"))]
    return f"{table(header, rows)}\n\n{machine(next(iter(records.values())), words)} `benchmarks/decode.py`"


def quantized_table(words):
    """Tokens a second at the 6.2B shapes."""
    record = newest("quantized").get(None)
    if record is None:
        return ""
    tasks = ["decode", "prefill 32", "prefill 512"]
    rows, notes = [], []
    for run in record["runs"]:
        name = f"int{run['bits']}" if run["bits"] < 16 else "bfloat16"
        backend = words[run["backend"]] if run["bits"] < 16 else "F.linear"
        cells = []
        for task in tasks:
            speeds = run["tokens_per_second"][task]
            cells.append(f"{speeds['ours']:g}" + (f" ({speeds['ratio']:g}x)" if "ratio" in speeds else ""))
        rows.append([name, backend, *cells])
        if "share_of_memory_bandwidth" in run:
            notes.append(f"{name}: {words['share'].format(share=run['share_of_memory_bandwidth'])}")
        original = [run["tokens_per_second"][task].get("dequantize, then matmul") for task in tasks]
        if all(original):
            rows.append([name, words["original"], *(f"{speed:g}" for speed in original)])
    caption = f"tokens/s (x: {words['llama']}). {machine(record, words)} `benchmarks/quantized.py`"
    return "\n\n".join([table([words["weights"], words["backend"], *tasks], rows), *notes, caption])


def loading_table(words):
    """Peak memory of quantizing a float16 checkpoint of the 6.2B shapes while it loads."""
    records = newest("loading", lambda record: record["bits"])
    if not records:
        return ""
    columns = ["peak_gb", "peak_with_a_forward_gb", "model_gb"]
    rows = [[f"int{bits}", *(record[key] for key in columns)] for bits, record in sorted(records.items())]
    record = next(iter(records.values()))
    caption = f"torch {record['torch']}, transformers {record['transformers']}. `benchmarks/loading.py`"
    return f"{table([words['weights'], *(words[key] for key in columns)], rows)}\n\n{caption}"


def matrix_table(words):
    path = ROOT / "tests" / "matrix.md"
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def picture():
    """Time a token against the context, as an image beside the results."""
    records = newest("decode", lambda record: record["dtype"])
    if not records:
        return
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "chatglm2"  # the same picture has the same bytes
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for dtype, record in sorted(records.items()):
        contexts = [row["context"] for row in record["rows"]]
        for key, name, style in (("ours_ms", "this package", "-o"), ("glm_ms", "GlmForCausalLM", "--s")):
            axes.plot(contexts, [row[key] for row in record["rows"]], style, label=f"{name}, {dtype}")
    axes.set(xlabel="context, tokens", ylabel="ms a token", xscale="log", ylim=(0, None))
    axes.legend(fontsize="small")
    figure.savefig(RESULTS / "decode.svg", metadata={"Date": None})


def arguments(parser):
    """There are none."""


def run(args):
    makers = {"decode": decode_table, "quantized": quantized_table, "loading": loading_table, "matrix": matrix_table}
    for name, words in WORDS.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        for key, make in makers.items():
            begin, end = f"<!-- {key}: made by benchmarks/tables.py -->", f"<!-- end of {key} -->"
            made = make(words)
            body = f"{begin}\n{made}\n{end}" if made else f"{begin}\n{end}"
            text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: body, text, flags=re.DOTALL)  # noqa: B023
        path.write_text(text, encoding="utf-8")
    picture()
