"""The pictures of the READMEs and of docs/, from results/*.jsonl; they need matplotlib. `tables` draws them."""

from tables import (
    HEADLINE,
    KERNELS,
    ORIGINAL,
    PEERS,
    PROCESSORS,
    RESULTS,
    decode_6b,
    is_plain,
    newest,
    quantized_runs,
    weights,
    whole_run,
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
INK, OURS, OTHER = "#7d8590", "#2f81f7", "#9a8c98"  # readable on a light page and on a dark one
LOOK = {
    "svg.hashsalt": "chatglm2",  # the same picture has the same bytes
    "svg.fonttype": "none",  # text stays text
    "font.family": "sans-serif",
    "savefig.transparent": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    **{key: INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")},
}


def draw():
    """results/decode.svg, prefill.svg, memory.svg: the newest runs of the small shape; and those of the shapes of 6B.

    Each shows the first of PROCESSORS that has such runs.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(LOOK)
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
    int4_picture(plt)
    context_picture(plt)


def int4_picture(plt):
    """results/int4.svg: int4 on a CPU beside llama.cpp and the original's method, for the README's first screen."""
    _, run = whole_run(HEADLINE, 4)
    figure, panes = plt.subplots(1, 2, figsize=(9, 1.9), layout="constrained", sharey=True)
    for axes, task, title in zip(panes, ("decode", "prefill 512"), ("decode", "prefill of 512 tokens")):
        speed = run["tokens_per_second"][task]
        bars = {"dequantize, multiply": speed["dequantize"]}
        bars.update({f"{name}, Q4_0": speed[name] for name in PEERS if name in speed})
        bars["this package, int4"] = speed["ours"]
        colors = [OTHER] * (len(bars) - 1) + [OURS]
        shown = axes.barh(list(bars), list(bars.values()), color=colors, height=0.7)
        axes.bar_label(shown, fmt="%.3g", padding=3, color=INK)
        axes.set_title(f"{title}, tokens/s", fontsize="medium")
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.margins(x=0.12)
    figure.savefig(RESULTS / "int4.svg", metadata=NOTHING)
    plt.close(figure)


def context_picture(plt):
    """results/context.svg: seconds a token of the 6.2B shapes at the contexts that were measured."""
    record = decode_6b()
    rows = record["rows"]
    figure, axes = plt.subplots(figsize=(9, 2.3), layout="constrained")
    for shift, (key, name, color) in enumerate(
        (("ours_ms", "this package", OURS), ("glm_ms", "GlmForCausalLM", OTHER)), start=-1
    ):
        places = [-i - 0.4 * shift - 0.2 for i in range(len(rows))]
        shown = axes.barh(places, [row[key] / 1000 for row in rows], height=0.36, color=color, label=name)
        axes.bar_label(shown, fmt="%.2f s", padding=3, color=INK)
    axes.set_yticks([-i for i in range(len(rows))], [f"{row['context']:,} tokens" for row in rows])
    axes.set_title(f"time per token against the context, {record['settings']['dtype']}", fontsize="medium")
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.legend(loc="center right")
    axes.margins(x=0.12)
    figure.savefig(RESULTS / "context.svg", metadata=NOTHING)
    plt.close(figure)


def quantized_picture(plt):
    """results/quantized.svg: tokens a second of the 6.2B shapes, by what computed them."""
    bars = {}  # (bits, weights, name) -> {task: tokens a second}
    records = next(filter(None, map(quantized_runs, PROCESSORS)), [])
    day = max((record["date"] for record in records), default="")[:10]  # speeds of one day: the machine drifts
    for record in (r for r in records if is_plain(r) and r["date"].startswith(day)):
        for run in record["runs"]:
            kernel = KERNELS.get(run["kernel"], run["kernel"])
            names = {"ours": kernel, "dequantize": ORIGINAL, **{name: name for name in PEERS}}
            for task, speed in run["tokens_per_second"].items():
                for key in names.keys() & speed.keys():
                    place = run["bits"], weights(run, record["settings"]["dtype"]), names[key]
                    bars.setdefault(place, {}).setdefault(task, speed[key])
    if not bars:
        return
    keys = sorted(bars, key=lambda key: (-key[0], bars[key]["prefill 512"]))
    labels = [f"{held}: {name}" for _, held, name in keys]
    colors = [OTHER if name in (*PEERS, ORIGINAL, "F.linear") else OURS for *_, name in keys]
    figure, panes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    for axes, task in zip(panes, ("decode", "prefill 512")):
        shown = axes.barh(labels, [bars[key][task] for key in keys], color=colors)
        axes.bar_label(shown, fmt="%.3g", padding=2, fontsize="small")
        axes.set(xlabel=f"{task}, tokens a second")
        axes.margins(x=0.15)
    figure.savefig(RESULTS / "quantized.svg", metadata=NOTHING)
    plt.close(figure)
