"""Write the tables of README.md, README_zh.md and benchmarks/README.md, and the pictures, from results/*.jsonl.

A table stands between two comments, `<!-- NAME: made by ... -->` and `<!-- end of NAME -->`, and shows the newest run
of each kind. Running it again changes nothing. The pictures need matplotlib.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ORIGINAL = "dequantize, then multiply"  # what the released code does
CHINESE = {
    "context": "上下文",
    "GlmForCausalLM / ours": "GlmForCausalLM / 本项目",
    "limit, ms": "极限，毫秒",
    "explained by bytes": "可由读取字节解释",
    "ours, ms": "本项目，毫秒",
    "peak while loading, GB": "加载时峰值，GB",
    "with a prompt of 2,048": "处理 2,048 个 token 的提示",
    "with an answer at 8,192": "在 8,192 处解码",
    "and with a forward pass, GB": "再做一次前向，GB",
    "the model, GB": "模型大小，GB",
    "weights": "权重",
    "computed by": "由谁计算",
    "decode": "解码",
    "prefill 32": "预填充 32",
    "prefill 512": "预填充 512",
    "the C kernel": "C 内核",
    "torch's own operators": "torch 自带算子",
    ORIGINAL: "先反量化再相乘",
    "in groups of": "每组",
    "with int8 embedding and output layer": "词嵌入与输出层为 int8",
    "tokens/s; x: as fast as llama.cpp": "tokens/s；x：是 llama.cpp 的几倍",
    "threads": "线程",
}


PROCESSORS = ("GPU", "AVX512-VNNI", "AVX2", "other")  # each has tables of its own


def instructions(record):
    """The one of PROCESSORS that a run was made on; those that do not say so were made with AVX512-VNNI."""
    return record["machine"].get("instructions", "AVX512-VNNI")


def newest(processor, benchmark, *settings):
    """The last run of results/BENCHMARK.jsonl for each combination of these settings, in the order of their values."""
    path = RESULTS / f"{benchmark}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    runs = {}
    for record in map(json.loads, lines):
        if instructions(record) == processor:
            runs[tuple(str(record["settings"].get(key)) for key in settings)] = record
    return [runs[key] for key in sorted(runs, reverse=True)]


def table(header, rows, records, benchmark, say):
    """Markdown, with the machines that the figures are from below it; nothing where there are no figures."""
    if not records:
        return ""
    lines = [[say(cell) for cell in header], ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
    machines = {}
    for record in records:
        m = record["machine"]
        where = f"{m['device']} ({instructions(record)}), {m['threads']} {say('threads')}"
        where += f", torch {m['torch']}, transformers {m['transformers']}"
        machines.setdefault(where, []).append(f"{m['memory_gb_per_second']:g}")
    notes = [f"{where}, {', '.join(sorted(set(speeds)))} GB/s" for where, speeds in machines.items()]
    return f"{text}\n\n{'; '.join(notes)}. `python benchmarks {benchmark}`"


def kind(record):
    """Shape, dtype and how it ran."""
    settings = record["settings"]
    words = [settings.get("shape", "6b"), settings["dtype"]]
    words += [f"{settings['layers']} layers"] if settings.get("layers") else []
    return ", ".join(words + (["compiled"] if settings.get("compiled") else []))


def rows_of(records, *columns):
    """These columns of all rows of the runs."""
    return [[row[key] for key in columns] for record in records for row in record["rows"]]


def rows_by_kind(records, *columns):
    """`rows_of`, each row behind the kind of its run."""
    return [[kind(record), *row] for record in records for row in rows_of([record], *columns)]


def decode(say, processor):
    """Times, and how much of each is the first one and what reading the longer context's bytes adds to it."""
    records = newest(processor, "decode", "shape", "compiled", "dtype", "device")
    for record in records:
        first = record["rows"][0]
        for row in record["rows"]:
            predicted = first["ours_ms"] + row["limit_ms"] - first["limit_ms"]
            row["explained"] = f"{predicted / row['ours_ms']:.0%}"
    rows = rows_by_kind(records, "context", "ours_ms", "glm_ms", "ratio", "limit_ms", "explained")
    header = ["", "context", "ours, ms", "GlmForCausalLM", "GlmForCausalLM / ours", "limit, ms", "explained by bytes"]
    return table(header, rows, records, "decode", say)


def prefill(say, processor):
    records = newest(processor, "prefill", "shape", "dtype", "device")
    rows = rows_by_kind(records, "length", "ours_ms", "glm_ms", "ratio", "share")
    rows = [[*row, f"{share:.0%}"] for *row, share in rows]
    header = ["", "prompt", "ours, ms", "GlmForCausalLM", "GlmForCausalLM / ours", "of the matmul rate"]
    return table(header, rows, records, "prefill", say)


def throughput(say, processor):
    records = newest(processor, "throughput", "shape", "dtype", "device")
    since = ("continuous", "glm_continuous", "continuous_ratio")  # older runs lack them
    for row in (row for record in records for row in record["rows"]):
        row.update({key: row.get(key, "") for key in since})
    rows = rows_by_kind(records, "batch", "ours", "glm", "ratio", *since)
    header = ["", "batch", "ours, tokens/s", "GlmForCausalLM", "times as fast"]
    header += ["ours, continuous", "GlmForCausalLM", "times as fast"]
    return table(header, rows, records, "throughput", say)


def memory(say, processor):
    records = newest(processor, "memory", "shape", "dtype", "device")
    rows = rows_by_kind(records, "length", "ours_mb", "chunked_mb", "glm_mb", "cache_mb")
    header = ["", "prompt", "ours, MB", "ours in chunks, MB", "GlmForCausalLM, MB", "of it the cache, MB"]
    return table(header, rows, records, "memory", say)


def training(say, processor):
    records = [record for record in newest(processor, "memory", "shape", "dtype", "device") if record["training"]][:1]
    columns = ["ours_mb", "ours_checkpointing_mb", "glm_mb", "glm_checkpointing_mb"]
    rows = [[r["settings"]["training_length"], *(r["training"][key] for key in columns)] for r in records]
    header = ["tokens", "ours, MB", "with checkpointing", "GlmForCausalLM, MB", "with checkpointing"]
    return table(header, rows, records, "memory", say)


def overhead(say, processor):
    records = newest(processor, "overhead", "bits", "device")
    rows = [
        [weights(r["settings"]), r["settings"]["layers"], r["step_ms"], r["bare_ms"], f"{r['overhead']:.1%}"]
        for r in records
    ]
    header = ["weights", "layers", "a step, ms", "its matrix products and attention, ms", "overhead"]
    return table(header, rows, records, "overhead", say)


def weights(run, dtype=None):
    """int4, int8, or the dtype."""
    return f"int{run['bits']}" if run["bits"] < 16 else dtype or run["dtype"]


def with_head(name, settings, say):
    """`name`, and whether the embedding and the output layer are in int8 too."""
    return f"{name}, {say('with int8 embedding and output layer')}" if settings["small_head"] else name


SPECIAL = ("small_head", "group_size")  # what makes a run of the quantized benchmark other than plain
KERNELS = {"cpu": "the C kernel", "stock": "torch's own operators", "triton": "Triton", "cpm": "CUDA C"}


def quantized_runs(processor):
    """The newest whole runs of the quantized benchmark, the plain ones first; none that played another processor."""
    records = newest(processor, "quantized", "instructions", *SPECIAL, "bits", "dtype", "backends", "device")
    records = [r for r in records if r["settings"]["layers"] == 28 and not r["settings"].get("instructions")]
    return sorted(records, key=lambda r: ([bool(r["settings"].get(key)) for key in SPECIAL], r["settings"]["bits"]))


def is_plain(record):
    return not any(map(record["settings"].get, SPECIAL))


def quantized(say, processor):
    records = quantized_runs(processor)
    tasks, rows = ["decode", "prefill 32", "prefill 512"], []
    for record in records:
        for run in record["runs"]:
            name = with_head(weights(run, record["settings"]["dtype"]), record["settings"], say)
            if record["settings"].get("group_size"):
                name += f", {say('in groups of')} {record['settings']['group_size']}"
            by = KERNELS.get(run["kernel"], run["kernel"])
            cells, original = [], []
            for task in tasks:
                speed = run["tokens_per_second"][task]
                times = speed["ratios"].get("llama.cpp")
                cells.append(f"{speed['ours']:.3g}" + (f" ({times:g}x)" if times else ""))
                original += [f"{speed['dequantize']:.2g}"] if "dequantize" in speed and is_plain(record) else []
            rows.append([name, say(by), *cells])
            if original:
                rows.append([name, say(ORIGINAL), *original])
    made = table(["weights", "computed by", *tasks], rows, records, "quantized", say)
    return made and f"{made} ({say('tokens/s; x: as fast as llama.cpp')})"


def errors(say, processor):
    records = [r for r in quantized_runs(processor) if "error" in r["runs"][0] and is_plain(r)]
    seen = {}
    for record in records:
        for run in record["runs"]:
            seen[run["bits"], run["backend"]] = [*run["error"].values(), f"{run['share_of_memory_bandwidth']:.0%}"]
            header = ["weights", "backend", *run["error"], "of the memory bandwidth"]
    rows = [[f"int{bits}", backend, *cells] for (bits, backend), cells in sorted(seen.items())]
    return table(header, rows, records, "quantized", say) if rows else ""


def loading(say, processor):
    records = newest(processor, "loading")
    rows = rows_of(records, "bits", "peak_gb", "peak_with_a_forward_gb", "model_gb")
    rows = [[f"int{bits}" if bits else "float16", *row] for bits, *row in rows]
    header = ["weights", "peak while loading, GB", "and with a forward pass, GB", "the model, GB"]
    return table(header, rows, records, "loading", say)


def footprint(say, processor):
    records = newest(processor, "footprint", "bits", "small_head", "device")
    rows = []
    for record in records:
        name = with_head(weights(record["settings"]), record["settings"], say)
        rows.append([name, record["model_gb"], record["prompt_gb"], record["answer_gb"]])
    header = ["weights", "the model, GB", "with a prompt of 2,048", "with an answer at 8,192"]
    return table(header, rows, records, "footprint", say)


def quality(say, processor):
    records = newest(processor, "quality")
    rows = rows_of(records, "weights", "cross_entropy", "divergence", "answers")
    return table(["weights", "cross entropy", "divergence", "answers"], rows, records, "quality", say)


MAKERS = (
    decode,
    prefill,
    throughput,
    memory,
    training,
    overhead,
    quantized,
    errors,
    loading,
    footprint,
    quality,
)
PICTURES = {  # benchmark -> the rows' x and its name, {line: name}, the name of y
    "decode": ("context", "context, tokens", {"ours_ms": "ours", "glm_ms": "GlmForCausalLM"}, "tokens a second"),
    "prefill": ("length", "prompt, tokens", {"ours_ms": "ours", "glm_ms": "GlmForCausalLM"}, "ms to the first token"),
    "memory": (
        "length",
        "prompt, tokens",
        {"ours_mb": "ours", "chunked_mb": "ours, in chunks", "glm_mb": "GlmForCausalLM"},
        "MB above the model, at the peak",
    ),
}


NOTHING = {"Date": None, "Creator": None}  # which would change without a figure changing


def pictures():
    """results/decode.svg, prefill.svg, memory.svg: the newest runs of the small shape; and quantized.svg.

    Each shows the first of PROCESSORS that has such runs.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "chatglm2"  # the same picture has the same bytes
    import matplotlib.pyplot as plt

    for benchmark, (x, x_name, lines, y_name) in PICTURES.items():
        for processor in PROCESSORS:
            records = newest(processor, benchmark, "shape", "compiled", "dtype", "device")
            records = [r for r in records if r["settings"]["shape"] == "small" and not r["settings"].get("compiled")]
            if records:
                break
        else:
            continue
        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        for color, record in enumerate(records):
            places = [row[x] for row in record["rows"]]
            for key, style in zip(lines, ("-o", "--s", ":^")):
                values = [1000 / row[key] if benchmark == "decode" else row[key] for row in record["rows"]]
                name = f"{lines[key]}, {record['settings']['dtype']}"
                axes.plot(places, values, style, color=f"C{color}", label=name, markersize=4)
        axes.set(xlabel=x_name, ylabel=y_name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [f"{place:,}" for place in places])
        if benchmark == "decode":
            axes.set_ylim(0, None)
        else:
            axes.set_yscale("log")
        axes.legend(fontsize="small")
        figure.savefig(RESULTS / f"{benchmark}.svg", metadata=NOTHING)
        plt.close(figure)
    quantized_picture(plt)


def quantized_picture(plt):
    """results/quantized.svg: tokens a second of the 6.2B shapes, by what computed them."""
    bars = {}  # (bits, weights, name) -> {task: tokens a second}
    records = next(filter(None, map(quantized_runs, PROCESSORS)), [])
    for record in filter(is_plain, records):
        for run in record["runs"]:
            kernel = KERNELS.get(run["kernel"], run["kernel"])
            names = {"ours": kernel, "llama.cpp": "llama.cpp", "dequantize": ORIGINAL}
            for task, speed in run["tokens_per_second"].items():
                for key in names.keys() & speed.keys():
                    place = run["bits"], weights(run, record["settings"]["dtype"]), names[key]
                    bars.setdefault(place, {}).setdefault(task, speed[key])
    if not bars:
        return
    keys = sorted(bars, key=lambda key: (-key[0], bars[key]["prefill 512"]))
    labels = [f"{held}: {name}" for _, held, name in keys]
    colors = ["C7" if name in ("llama.cpp", ORIGINAL, "F.linear") else "C0" for *_, name in keys]
    figure, panes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    for axes, task in zip(panes, ("decode", "prefill 512")):
        shown = axes.barh(labels, [bars[key][task] for key in keys], color=colors)
        axes.bar_label(shown, fmt="%.3g", padding=2, fontsize="small")
        axes.set(xlabel=f"{task}, tokens a second")
        axes.margins(x=0.15)
    figure.savefig(RESULTS / "quantized.svg", metadata=NOTHING)
    plt.close(figure)


def arguments(parser):
    """There are none."""


def pages():
    """{a page: its text with the newest tables}."""
    texts = {}
    for name in ("README.md", "README_zh.md", "benchmarks/README.md"):
        path, words = ROOT / name, CHINESE if name.endswith("_zh.md") else {}
        text = path.read_text(encoding="utf-8")
        for make in MAKERS:
            key = make.__name__
            begin, end = f"<!-- {key}: made by `python benchmarks tables` -->", f"<!-- end of {key} -->"
            made = [make(lambda word: words.get(word, word), processor) for processor in PROCESSORS]  # noqa: B023
            made = "\n\n".join(filter(None, made))
            body = f"{begin}\n{made}\n{end}" if made else f"{begin}\n{end}"
            text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: body, text, flags=re.DOTALL)  # noqa: B023
        texts[path] = text
    return texts


def run(args):
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    pictures()
