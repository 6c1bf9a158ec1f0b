"""Write the tables of the READMEs and of docs/, and the pictures, from results/*.jsonl.

A table stands between two comments, `<!-- NAME: made by ... -->` and `<!-- end of NAME -->`, and shows the newest run
of each kind. Running it again changes nothing. The pictures need matplotlib.
"""

import json
import re
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ORIGINAL = "dequantize, then multiply"  # what the released code does
NOT_YET = "not measured yet"  # what a cell says until results/ holds the run
CHINESE = {
    "you have": "你的机器",
    "call": "调用",
    "weights, GB": "权重，GB",
    "peak, GB": "峰值内存，GB",
    "load": "加载",
    "GPU, 16 GB": "GPU，16 GB",
    "GPU, 6 GB": "GPU，6 GB",
    "CPU, faster": "CPU，更快",
    "CPU, not quantized": "CPU，不量化",
    "int4 files, CPU": "已是 int4 的文件，CPU",
    "x: relative to llama.cpp in the same run": "x：同一次运行中与 llama.cpp 之比",
    NOT_YET: "尚未测量",
    "6.2B, on a CPU": "6.2B，CPU",
    "this package": "本项目",
    "beside it": "对比对象",
    "ratio": "比值",
    "decode": "解码",
    "prefill of 512 tokens": "预填充 512 个 token",
    "decode, context of": "解码，上下文",
    "{cores} cores of {device} with {instructions}, {speeds} GB/s": "{device} 的 {cores} 个核心（{instructions}），{speeds} GB/s",  # noqa: E501
    "{low} to {high}": "{low}～{high}",
    "{card}: {dynamic}; {static} compiled": "{card}：{dynamic}；编译后 {static}",
}


PROCESSORS = ("GPU", "AVX512-VNNI", "AVX2", "other")  # each has tables of its own


def instructions(record):
    """Which of PROCESSORS a run was made on; runs that do not name one had AVX512-VNNI."""
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


CARD = "NVIDIA H200"  # the GPU whose figures the pages show


def newest_on_card(stage):
    """{what: its last line without an error} of a stage of `python benchmarks gpu`, each with its run's machine.

    A run's first line is the machine; the lines behind it are its own.
    """
    path, machine, lines = RESULTS / "gpu.jsonl", {}, {}
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else []):
        if line["stage"] == "env":
            machine = line
        elif line["stage"] == stage and machine.get("device") == CARD and "error" not in line:
            lines[line["what"]] = {**line, "machine": machine}
    return lines


def machines(records, say):
    """The machines of some runs in words: "2 cores of an AMD EPYC with AVX512-VNNI, 31 to 35 GB/s; torch ..."."""
    speeds = {}  # (device, instructions, threads, torch, transformers) -> GB/s of each run
    for record in records:
        m = record["machine"]
        versions = f"torch {m['torch'].partition('+')[0]}, transformers {m['transformers']}"
        speeds.setdefault((m["device"], instructions(record), m["threads"], versions), []).append(
            m["memory_gb_per_second"]
        )
    notes = []
    for (device, kind, threads, versions), values in speeds.items():
        low, high = round(min(values)), round(max(values))
        span = f"{low:,}" if low == high else say("{low} to {high}").format(low=f"{low:,}", high=f"{high:,}")
        if kind == "GPU":
            words = f"{device}, {span} GB/s"
        else:
            sentence = say("{cores} cores of {device} with {instructions}, {speeds} GB/s")
            if sentence.startswith("{cores}"):  # English
                device = f"{'an' if device[0] in 'AEIO' else 'a'} {device}"
            words = sentence.format(cores=threads, device=device, instructions=kind, speeds=span)
            words = words.replace("1 cores", "1 core", 1) if threads == 1 else words
        notes.append(f"{words}; {versions}")
    return "; ".join(notes)


def markdown(header, rows, say):
    """A table."""
    lines = [[say(cell) for cell in header], ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def table(header, rows, records, benchmark, say):
    """A table and, below it, the machines it was measured on; empty if there are no figures."""
    if not records:
        return ""
    return f"{markdown(header, rows, say)}\n\n{machines(records, say)}. `python benchmarks {benchmark}`"


def kind(record):
    """Shape, dtype and settings of a run."""
    settings = record["settings"]
    words = [settings.get("shape", "6b"), settings["dtype"]]
    words += [f"{settings['layers']} layers"] if settings.get("layers") else []
    return ", ".join(words + (["compiled"] if settings.get("compiled") else []))


def rows_of(records, *columns):
    """These columns of the rows of all runs."""
    return [[row[key] for key in columns] for record in records for row in record["rows"]]


def rows_by_kind(records, *columns):
    """As `rows_of`, with the settings of its run in front of each row."""
    return [[kind(record), *row] for record in records for row in rows_of([record], *columns)]


def decode(say, processor):
    """Times, and the share of each that the time at the shortest context and the added bytes explain."""
    records = newest(processor, "decode", "shape", "compiled", "dtype", "device")
    for record in records:
        first = record["rows"][0]
        for row in record["rows"]:
            predicted = first["ours_ms"] + row["limit_ms"] - first["limit_ms"]
            row["explained"] = f"{predicted / row['ours_ms']:.0%}"
    rows = rows_by_kind(records, "context", "ours_ms", "glm_ms", "ratio", "limit_ms", "explained")
    header = [
        "",
        "context",
        "ours, ms",
        "GlmForCausalLM",
        "GlmForCausalLM / ours",
        "limit, ms",
        "explained by bytes read",
    ]
    return table(header, rows, records, "decode", say)


def prefill(say, processor):
    records = newest(processor, "prefill", "shape", "dtype", "device")
    rows = rows_by_kind(records, "length", "ours_ms", "glm_ms", "ratio", "share")
    rows = [[*row, f"{share:.0%}"] for *row, share in rows]
    header = ["", "prompt", "ours, ms", "GlmForCausalLM", "GlmForCausalLM / ours", "share of the matmul rate"]
    return table(header, rows, records, "prefill", say)


def throughput(say, processor):
    records = newest(processor, "throughput", "shape", "dtype", "device")
    since = ("continuous", "glm_continuous", "continuous_ratio")  # older runs lack them
    for row in (row for record in records for row in record["rows"]):
        row.update({key: row.get(key, "") for key in since})
    rows = rows_by_kind(records, "batch", "ours", "glm", "ratio", *since)
    header = ["", "batch", "ours, tokens/s", "GlmForCausalLM", "ratio"]
    header += ["ours, continuous", "GlmForCausalLM", "ratio"]
    return table(header, rows, records, "throughput", say)


def memory(say, processor):
    records = newest(processor, "memory", "shape", "dtype", "device")
    rows = rows_by_kind(records, "length", "ours_mb", "chunked_mb", "glm_mb", "cache_mb")
    header = ["", "prompt", "ours, MB", "ours in chunks, MB", "GlmForCausalLM, MB", "of which cache, MB"]
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
    header = ["weights", "layers", "a step, ms", "matrix products and attention, ms", "overhead"]
    return table(header, rows, records, "overhead", say)


def linear(say, processor):
    records, rows = newest(processor, "linear", "rows", "columns", "threads"), []
    for record in records:
        shares = {}
        for row in record["rows"]:
            for who in ("ours", "torch"):
                if f"{who}_bandwidth" in row:
                    key = row["weights"], row["inputs"], "the C kernel" if who == "ours" else "torch"
                    shares.setdefault(key, []).append(f"{row[f'{who}_bandwidth']:.0%}")
        rows += [[*key, *cells] for key, cells in shares.items()]
    tokens = [f"{n} tokens" if n > 1 else "1 token" for n in (records[0]["settings"]["tokens"] if records else ())]
    return table(["weights", "inputs", "", *tokens], rows, records, "linear", say)


def verify(say, processor):
    records, rows = newest(processor, "verify", "bits", "layers", "dtype"), []
    for record in records:
        for head in (False, True):
            costs = [row for row in record["rows"] if row["int8_head"] == head]
            name = with_head(f"int{record['settings']['bits']}", {"small_head": head}, say)
            rows.append([name, f"{costs[0]['ms']} ms", *(f"{row['cost']}x" for row in costs[1:])])
    tokens = [f"{n} tokens" for n in (records[0]["settings"]["tokens"][1:] if records else ())]
    return table(["weights", "1 token", *tokens], rows, records, "verify", say)


def weights(run, dtype=None):
    """int4, int8, or the dtype."""
    return f"int{run['bits']}" if run["bits"] < 16 else dtype or run["dtype"]


def with_head(name, settings, say):
    """`name`, and whether the embedding and the output layer are in int8 too."""
    return f"{name}, {say('with int8 embedding and output layer')}" if settings["small_head"] else name


SPECIAL = ("small_head", "group_size")  # what makes a run of the quantized benchmark other than plain
KERNELS = {"cpu": "the C kernel", "stock": "torch's own operators", "triton": "Triton", "cpm": "CUDA C"}


def quantized_runs(processor):
    """The newest whole runs of the quantized benchmark, plain ones first; without those of emulated instructions."""
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
    return made and f"{made} ({say('tokens/s; x: relative to llama.cpp')})"


def errors(say, processor):
    records = [r for r in quantized_runs(processor) if "error" in r["runs"][0] and is_plain(r)]
    seen = {}
    for record in records:
        for run in record["runs"]:
            seen[run["bits"], run["backend"]] = [*run["error"].values(), f"{run['share_of_memory_bandwidth']:.0%}"]
            header = ["weights", "backend", *run["error"], "share of the bandwidth"]
    rows = [[f"int{bits}", backend, *cells] for (bits, backend), cells in sorted(seen.items())]
    return table(header, rows, records, "quantized", say) if rows else ""


def context(say, processor):
    """Each kind's decoding and prompts; the speed at a context relative to that at 512 tokens."""
    records = newest(processor, "context", "bits", "small_head", "dtype", "layers")
    rows = []
    for record in records:
        name = with_head(weights(record["settings"]), record["settings"], say)
        for row in record["decode"]:
            cells = [row["ours_ms"], row["torch_ms"], f"{row['ratio']}x", f"{row['speed']:.0%}"]
            rows.append([name, f"token after {row['context']:,}, ms", *cells])
        for row in record["prefill"]:
            speeds = [row["ours_tokens_per_second"], row["torch_tokens_per_second"]]
            share = f"{speeds[0] / record['prefill'][0]['ours_tokens_per_second']:.0%}"
            rows.append([name, f"prompt of {row['length']:,}, tokens/s", *speeds, f"{row['ratio']}x", share])
    header = ["weights", "", "this package's attention", "torch's", "faster", "speed relative to 512"]
    return table(header, rows, records, "context", say)


def loading(say, processor):
    records = newest(processor, "loading")
    rows = rows_of(records, "bits", "peak_gb", "peak_with_a_forward_gb", "model_gb")
    rows = [[f"int{bits}" if bits else "float16", *row] for bits, *row in rows]
    header = ["weights", "peak while loading, GB", "with a forward pass, GB", "model, GB"]
    return table(header, rows, records, "loading", say)


def footprint(say, processor):
    records = newest(processor, "footprint", "bits", "small_head", "device")
    rows = []
    for record in records:
        name = with_head(weights(record["settings"]), record["settings"], say)
        rows.append([name, record["model_gb"], record["prompt_gb"], record["answer_gb"]])
    header = ["weights", "model, GB", "peak, prompt of 2,048", "peak, token at 8,192"]
    return table(header, rows, records, "footprint", say)


def quality(say, processor):
    records = newest(processor, "quality")
    rows = rows_of(records, "weights", "cross_entropy", "divergence", "answers")
    return table(["weights", "cross entropy", "divergence", "answers"], rows, records, "quality", say)


def starting(say, processor):
    """The newest run's medians, of this version and of the one before it."""
    records, rows = newest(processor, "start")[:1], []
    for row in starts(records):
        name = f"float16 folder, to int{row['quantize']}" if row["quantize"] else f"{row['folder']} folder"
        version = "" if row["version"] == "after" else ", before"
        rows.append([name + version, *(row[key] for key in STARTED)])
    header = ["", "first sign, s", "prompt, s", "first token, s", "second, s", "longest silence, s", "peak, GB"]
    ratios = [f"{ratio:g} times ({key[5:]})" for r in records for key, ratio in r["relative_to_read"].items()]
    ratios = f" Quantizing while loading takes {', '.join(ratios)} as long as reading the files." if ratios else ""
    return table(header, rows, records, "start", say) + ratios


STARTED = ("sign", "prompt", "first_token", "second_token", "silence", "peak_gb")


def starts(records):
    """The starts of these runs, one a kind: the median of its rounds."""
    kinds = {}
    for record in records:
        for row in record["rows"]:
            kinds.setdefault((row["folder"], row["quantize"], row["version"]), []).append(row)
    return [{**group[0], **{key: median(row[key] for row in group) for key in STARTED}} for group in kinds.values()]


# `python benchmarks gpu`, whose lines are not those of the other benchmarks


def gpu_decode(say, processor):
    """A decode step as the host launches it, the GPU's part of it, and `generate` compiled with a static cache."""
    if processor != "GPU":
        return ""
    steps, compiled, rows = newest_on_card("graph"), newest_on_card("generate"), []
    used = [line for what, line in compiled.items() if what.endswith(COMPILED)]
    for what, step in steps.items():
        for contender, name in (("ours", what), ("glm", f"GlmForCausalLM, {what}")):
            if f"{contender} 512" in step:
                near, far = step[f"{contender} 512"], step[f"{contender} 8192"]
                times = [f"{row['eager_ms']:.1f}" for row in (near, far)]
                times += [f"{row['graph_ms']:.2f}" for row in (near, far)]
                answer = compiled.get(what + COMPILED) if contender == "ours" else None
                shares = [f"{row['read']:.0%}" for row in (near, far)]
                rows.append([name, *times, *shares, f"{answer['ms_a_token']:.2f}" if answer else ""])
    header = ["weights", "eager, 512", "8,192", "GPU alone, 512", "8,192", "share of the bandwidth, 512", "8,192"]
    header += ["compiled, static cache"]
    return table(header, rows, [*steps.values(), *used], "gpu --only graph,generate", say)


def gpu_prefill(say, processor):
    if processor != "GPU":
        return ""
    lines, rows, lengths = newest_on_card("prefill"), [], (512, 2048, 8192)
    for what, line in lines.items():
        for contender, name in (("ours", what), ("glm", f"GlmForCausalLM, {what}")):
            if f"{contender} 512" in line:
                speeds = [f"{1000 * length / line[f'{contender} {length}']['ms']:,.0f}" for length in lengths]
                peak = line["32768_gb_above_model"] if contender == "ours" else ""
                rows.append([name, *speeds, f"{line[f'{contender} 8192']['share']:.0%}", peak])
    header = ["weights", *(f"{length:,} tokens" for length in lengths), "share of the matmul rate, 8,192"]
    header += ["peak above the model, 32,768 tokens, GB"]
    return table(header, rows, list(lines.values()), "gpu --only prefill", say)


def gpu_memory(say, processor):
    if processor != "GPU":
        return ""
    lines, keys = newest_on_card("memory"), ("model_gb", "prompt_2048_gb", "token_8192_gb")
    rows = [[what, *(line[key] for key in keys)] for what, line in lines.items()]
    header = ["weights", "model, GB", "peak, prompt of 2,048", "peak, token at 8,192"]
    return table(header, rows, list(lines.values()), "gpu --only memory", say)


COMPILED = ", static, compiled"  # the stage `generate` calls it so


def answers_on_card(kind):
    """(tokens/s of `generate` with a dynamic cache, and compiled with a static one, the lines they are from)."""
    lines = newest_on_card("generate")
    used = [lines[kind + way] for way in (", dynamic", COMPILED)]
    return (*(1000 / line["ms_a_token"] for line in used), used)


# The README's two tables


def whole_run(processor, bits, small_head=False):
    """(record, its run) of the quantized benchmark at these bits, plain or with int8 embedding and output layer."""
    for record in quantized_runs(processor):
        settings = record["settings"]
        for run in record["runs"]:
            if (run["bits"], run["backend"]) == (bits, "auto") and settings["small_head"] == small_head:
                if not settings.get("group_size"):
                    return record, run
    return None, None


def start(say, processor):
    """What to call on which machine, and what it takes: cells are filled as soon as results/ holds their runs."""
    if processor != PROCESSORS[0]:  # one table for all machines
        return ""
    loaded = newest(HEADLINE, "loading")[:1]
    seconds = {row["bits"]: f"{row['seconds']} s" for record in loaded for row in record["rows"]}
    files = newest(HEADLINE, "start")[:1]
    started = [row for row in starts(files) if (row["folder"], row["version"]) == ("int4", "after")]
    rows, records = [], [*loaded, *files]
    for name, call, kind, bits, small_head, source in START:
        size = f"{whole_run(HEADLINE, bits, small_head)[1]['model_gb']:.2f}"
        if kind == "GPU":
            held = newest_on_card("memory").get(source)
            dynamic, static, used = answers_on_card(source)
            records += [*used, *([held] if held else [])]
            peak = f"{held['prompt_2048_gb']:.2f}" if held else say(NOT_YET)
            tokens = say("{card}: {dynamic}; {static} compiled").format(
                card=CARD.split()[-1], dynamic=f"{dynamic:.0f}", static=f"{static:.0f}"
            )
            rows.append([say(name), f"`{call}`", size, peak, tokens, say(NOT_YET)])
            continue
        record, run = whole_run(kind, bits, small_head)
        footprints = [
            record
            for record in newest(kind, "footprint", "bits", "small_head", "device")
            if (record["settings"]["bits"], record["settings"]["small_head"]) == (bits, small_head)
        ]
        records += ([record] if record else []) + footprints[:1]
        cells = [size, footprints[0]["prompt_gb"] if footprints else say(NOT_YET), say(NOT_YET)]
        if run:
            speed = run["tokens_per_second"]["decode"]
            times = speed["ratios"].get("llama.cpp")
            cells[-1] = f"{speed['ours']:.3g}" + (f" ({times:g}x)" if times else "")
        time = seconds[bits] if source == "results" else say(NOT_YET)
        if source == "start" and started:
            cells[1], time = f"{started[0]['peak_gb']:.2f}", f"{started[0]['prompt']:.0f} s"
        rows.append([say(name), f"`{call}`", *cells, time])
    header = ["you have", "call", "weights, GB", "peak, GB", "tokens/s", "load"]
    note = say("x: relative to llama.cpp in the same run")
    return f"{markdown(header, rows, say)}\n\n{machines(records, say)} ({note})"


HEADLINE = "AVX512-VNNI"  # the one of PROCESSORS whose figures the README shows
LOAD, INT4 = "from_pretrained(...)", "from_pretrained(..., quantization_config=int4)"
# machine, call, whose figures, bits, int8 embedding and output layer, where the seconds to load are from (on a GPU: the
# kind of `python benchmarks gpu` that stands for it)
START = (
    ("GPU, 16 GB", f"{LOAD}.half().cuda()", "GPU", 16, False, "bfloat16"),
    ("GPU, 6 GB", f"{INT4}.half().cuda()", "GPU", 4, False, "int4"),
    ("CPU", f"{INT4}.half()", HEADLINE, 4, False, "results"),
    ("CPU, faster", f"{INT4}.half().quantize(4, embedding=True, output_layer=True)", HEADLINE, 4, True, None),
    ("CPU, not quantized", f"{LOAD}.bfloat16()", HEADLINE, 16, False, None),
    ("int4 files, CPU", f"{LOAD}.half()", HEADLINE, 4, False, "start"),
    ("Mac", f'{LOAD}.half().to("mps")', "other", 16, False, None),
)


def beside(processor=HEADLINE):
    """(rows of the README's table of speeds, the runs they are from): tokens/s beside llama.cpp and GlmForCausalLM."""
    rows, records = [], []
    for bits in (4, 8):
        record, run = whole_run(processor, bits)
        for task, name in (("decode", "decode"), ("prefill 512", "prefill of 512 tokens")):
            speed = run["tokens_per_second"][task]
            rows.append(
                (f"int{bits}", name, "", speed["ours"], "llama.cpp", speed["llama.cpp"], speed["ratios"]["llama.cpp"])
            )
        records.append(record)
    record = next(r for r in newest(processor, "decode", "shape", "dtype") if r["settings"]["shape"] == "6b")
    for row in record["rows"]:
        ours, glm = 1000 / row["ours_ms"], 1000 / row["glm_ms"]
        name = "decode, context of"
        rows.append(
            (record["settings"]["dtype"], name, f"{row['context']:,}", ours, "GlmForCausalLM", glm, row["ratio"])
        )
    return rows, [*records, record]


def speed(say, processor):
    if processor != PROCESSORS[0]:  # one table
        return ""
    rows, records = beside()
    rows = [
        [
            f"{held} {' '.join(filter(None, (say(task), number)))}",
            f"{ours:.3g}",
            f"{name} {other:.3g}",
            f"{times:.2f}x",
        ]
        for held, task, number, ours, name, other, times in rows
    ]
    header = ["6.2B, on a CPU", "this package", "beside it", "ratio"]
    return f"{markdown(header, rows, say)}\n\n{machines(records, say)}"


def headline():
    """The figures that the READMEs' first screens claim, with their units."""
    rows, _ = beside()
    loaded = {row["bits"]: row["peak_gb"] for row in newest(HEADLINE, "loading")[0]["rows"]}
    far = next(r for r in newest(HEADLINE, "decode", "shape", "dtype") if r["settings"]["shape"] == "6b")["rows"][-1]
    gpu, compiled = newest_on_card("graph")["bfloat16"], answers_on_card("int4")[1]
    return [
        f"{compiled:.0f} tokens/s",
        *(f"{gpu[f'{name} 512']['eager_ms']:.1f} ms" for name in ("ours", "glm")),
        f"{rows[0][3]:.3g} tokens/s",  # int4, decode
        f" {rows[1][-1]:.1f} ",  # int4, prefill, times llama.cpp's speed
        f"{loaded[4]:g} GB",
        f"{far['context']:,} ",
        f"{far['ours_ms'] / 1000:.2f} s",
        f"{far['glm_ms'] / 1000:.2f} s",
    ]


MAKERS = (
    decode,
    prefill,
    throughput,
    memory,
    training,
    overhead,
    linear,
    verify,
    quantized,
    errors,
    context,
    loading,
    footprint,
    starting,
    quality,
    gpu_decode,
    gpu_prefill,
    gpu_memory,
    start,
    speed,
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


def pictures():
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
        bars = {
            "dequantize, multiply": speed["dequantize"],
            "llama.cpp, Q4_0": speed["llama.cpp"],
            "this package, int4": speed["ours"],
        }
        shown = axes.barh(list(bars), list(bars.values()), color=[OTHER, OTHER, OURS], height=0.7)
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
    record = next(r for r in newest(HEADLINE, "decode", "shape", "dtype") if r["settings"]["shape"] == "6b")
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
    colors = [OTHER if name in ("llama.cpp", ORIGINAL, "F.linear") else OURS for *_, name in keys]
    figure, panes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    for axes, task in zip(panes, ("decode", "prefill 512")):
        shown = axes.barh(labels, [bars[key][task] for key in keys], color=colors)
        axes.bar_label(shown, fmt="%.3g", padding=2, fontsize="small")
        axes.set(xlabel=f"{task}, tokens a second")
        axes.margins(x=0.15)
    figure.savefig(RESULTS / "quantized.svg", metadata=NOTHING)
    plt.close(figure)


def arguments(parser):
    """No figures."""


def pages():
    """{page: its text with the newest tables}."""
    texts = {}
    for name in ("README.md", "README_zh.md", "docs/performance.md", "docs/quantization.md"):
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
