"""Write the tables of the READMEs and of docs/ from results/*.jsonl, and the pictures by pictures.py.

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
    "x: relative to llama.cpp and to ik_llama.cpp in the same run": "x：同一次运行中与 llama.cpp、ik_llama.cpp 之比",
    "int8 head": "int8 输出层",
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


def runs_of(processor, benchmark):
    """The runs in results/BENCHMARK.jsonl on this kind of machine, oldest first."""
    path = RESULTS / f"{benchmark}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if instructions(record) == processor]


def newest(processor, benchmark, *settings, having=None):
    """The last run for each combination of these settings, in the order of their values.

    With `having`, only the runs that have such results.
    """
    runs = {}
    for record in runs_of(processor, benchmark):
        if having is None or record.get(having):
            runs[tuple(str(record["settings"].get(key) or "") for key in settings)] = record
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
    records = newest(processor, "overhead", "bits", "small_head", "device")
    rows = [
        [
            with_head(weights(r["settings"]), r["settings"], say),
            r["step_ms"],
            r["bare_ms"],
            f"{r['overhead']:.1%}",
            timed(r, {"modules_ms": r.get("modules_ratio")}, "modules_ms"),
        ]
        for r in records
    ]
    header = ["weights", "a step, ms", "matrix products and attention, ms", "overhead", "by modules, ms"]
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
            name = with_head(weights(record["settings"]), {**record["settings"], "small_head": head}, say)
            rows.append([name, f"{costs[0]['ms']} ms", *(f"{row['cost']}x" for row in costs[1:])])
    tokens = [f"{n} tokens" for n in (records[0]["settings"]["tokens"][1:] if records else ())]
    return table(["weights", "1 token", *tokens], rows, records, "verify", say)


def weights(run, dtype=None):
    """int4, int8, or the dtype."""
    return f"int{run['bits']}" if run["bits"] < 16 else dtype or run["dtype"]


def with_head(name, settings, say):
    """`name`, and whether the embedding and the output layer are in int8 too, and other activations than float16."""
    dtype = settings.get("dtype", "float16")
    parts = [name, say("with int8 embedding and output layer") if settings.get("small_head") else ""]
    return ", ".join(filter(None, [*parts, "" if dtype in ("float16", name) else dtype]))


SPECIAL = ("small_head", "group_size")  # what makes a run of the quantized benchmark other than plain
KERNELS = {"cpu": "the C kernel", "stock": "torch's own operators", "triton": "Triton", "cpm": "CUDA C"}


def quantized_runs(processor):
    """The newest whole run of each kind, a record each, plain ones first; without those of emulated instructions."""
    kinds = {}
    for record in runs_of(processor, "quantized"):
        settings = record["settings"]
        if settings["layers"] == 28 and not settings.get("instructions"):
            for run in record["runs"]:
                special = tuple(settings.get(key) or 0 for key in SPECIAL)
                kinds[special, run["bits"], run["backend"], settings["dtype"]] = {**record, "runs": [run]}
    return [kinds[key] for key in sorted(kinds)]


def is_plain(record):
    return not any(map(record["settings"].get, SPECIAL))


PEERS = ("llama.cpp", "ik_llama.cpp")
TASKS = {  # of the quantized benchmark -> the column's name
    "decode": "decode",
    "decode 4096": "after 4,096",
    "decode 8192": "after 8,192",
    "prefill 32": "prefill 32",
    "prefill 512": "prefill 512",
}


def relative(ratios):
    """ " (1.2x, 1.1x)": how many times as fast as each of PEERS that was timed; empty if none was."""
    times = [f"{ratios[name]:g}x" for name in PEERS if name in ratios]
    return f" ({', '.join(times)})" if times else ""


def quantized(say, processor):
    records, rows = quantized_runs(processor), []
    for record in records:
        for run in record["runs"]:
            name = with_head(weights(run, record["settings"]["dtype"]), record["settings"], say)
            if record["settings"].get("group_size"):
                name += f", {say('in groups of')} {record['settings']['group_size']}"
            by = KERNELS.get(run["kernel"], run["kernel"])
            speeds = [run["tokens_per_second"].get(task) for task in TASKS]  # older runs lack two
            rows.append([name, say(by), *(f"{s['ours']:.3g}{relative(s['ratios'])}" if s else "" for s in speeds)])
            if is_plain(record) and any(s and "dequantize" in s for s in speeds):
                cells = [f"{s['dequantize']:.2g}" if s and "dequantize" in s else "" for s in speeds]
                rows.append([name, say(ORIGINAL), *cells])
    made = table(["weights", "computed by", *TASKS.values()], rows, records, "quantized", say)
    note = "tokens/s; x: relative to llama.cpp and, where two are given, to ik_llama.cpp"
    return made and f"{made} ({say(note)}){peers(records, say)}"


def peers(records, say):
    """The versions and settings of the other libraries that these runs were timed beside."""
    told = dict.fromkeys(r["settings"].get(option) for r in records for option in ("llama", "ik"))
    told = [text for text in told if text and text != "llama.cpp"]  # older runs name no version
    return f". {say('Beside')}: {'; '.join(told)}" if told else ""


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
    settings = ("bits", "small_head", "dtype", "layers")
    decoding = newest(processor, "context", *settings, having="decode")
    prompts = newest(processor, "context", *settings, having="prefill")
    rows, others = [], ("torch", *PEERS)
    for record in decoding:
        name = with_head(weights(record["settings"]), record["settings"], say)
        name += f", {record['settings']['layers']} layers" if record["settings"]["layers"] != 28 else ""
        for row in record["decode"]:
            cells = [timed(row["ms"], row["ratios"], other) for other in others]
            rows.append([name, f"token after {row['context']:,}, ms", row["ms"]["ours"], f"{row['speed']:.0%}", *cells])
    for record in prompts:
        name = with_head(weights(record["settings"]), record["settings"], say)
        for row in record["prefill"]:
            speeds = row["tokens_per_second"]
            share = f"{speeds['ours'] / record['prefill'][0]['tokens_per_second']['ours']:.0%}"
            cells = [timed(speeds, row["ratios"], other) for other in others]
            rows.append([name, f"prompt of {row['length']:,}, tokens/s", speeds["ours"], share, *cells])
    header = ["weights", "", "this package", "speed relative to 512", "with torch's attention", *PEERS]
    records = [*decoding, *prompts]
    made = table(header, rows, records, "context", say)
    return made and f"{made}{peers(records, say)}"


def timed(figures, ratios, name):
    """A contender's figure, and how many times as fast as it this package is; empty if it was not timed."""
    return f"{figures[name]} ({ratios[name]}x)" if name in figures else ""


def against_vllm(say, processor):
    """Tokens/s of each task, with the most layers that were timed."""
    records = newest(processor, "against_vllm", "bits", "layers")
    most = max((record["settings"]["layers"] for record in records), default=0)
    records = [record for record in records if record["settings"]["layers"] == most]
    tasks = {"decode": "one sequence", "batch": "eight sequences", "prefill": "prompt of 512"}
    rows = []
    for record in records:
        for row in record["rows"]:
            cells = [row["ours"], timed(row, {"vllm": row["ratio"]}, "vllm")]
            rows.append([f"{weights(record['settings'])}, {most} layers", say(tasks[row["task"]]), *cells])
    return table(["weights", "tokens/s", "this package", "vLLM"], rows, records, "against_vllm", say)


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


def perplexity(say, processor):
    """A row for each kind of quantization, with the figures of the models measured on the most tokens side by side."""
    records = newest(processor, "perplexity", "model")[::-1]
    most = max((record["settings"]["tokens"] for record in records), default=0)
    records = [record for record in records if record["settings"]["tokens"] == most]
    rows = {}
    for record in records:
        plain, ours = ({row["weights"]: row for row in record["rows"]}[name] for name in ("int4", "float"))
        for row in record["rows"]:
            shares = []
            for figure in ("perplexity", "divergence"):
                lost, all_of_it = row[figure] - ours[figure], plain[figure] - ours[figure]
                shares.append(f"{100 * (1 - lost / all_of_it):.0f}%" if row["weights"] not in ("float", "int4") else "")
            cells = [f"{row['perplexity']:.2f}", f"{row['divergence']:.5f}", f"{100 * row['agreement']:.1f}%", *shares]
            rows.setdefault(row["weights"], []).append(cells)
    lines = [[name, *(", ".join(filter(None, cells)) for cells in zip(*models))] for name, models in rows.items()]
    header = ["weights", "perplexity", "divergence", "agreement", "perplexity regained", "divergence regained"]
    return table(header, lines, records, "perplexity", say)


def starting(say, processor):
    """The newest run's medians, of this version and of the one before it."""
    records, rows = newest(processor, "start")[:1], []
    for row in starts(records):
        name = f"float16 folder, to int{row['quantize']}" if row["quantize"] else f"{row['folder']} folder"
        version = "" if row["version"] == "after" else ", before"
        rows.append([name + version, *(f"{row[key]:.2f}" for key in STARTED)])
    header = ["", "first sign, s", "prompt, s", "first token, s", "second, s", "longest silence, s", "peak, GB"]
    ratios = [f"{ratio:g} times ({key[5:]})" for r in records for key, ratio in r["relative_to_read"].items()]
    shown = table(header, rows, records, "start", say)
    if ratios:
        shown += f"\n\nQuantizing while loading takes {', '.join(ratios)} as long as copying the files to memory."
    return shown


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
    started = {(row["folder"], row["quantize"]): row for row in starts(files) if row["version"] == "after"}
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
            cells[-1] = f"{speed['ours']:.3g}{relative(speed['ratios'])}"
        time = seconds[bits] if source == "results" else say(NOT_YET)
        if source in started:
            time = f"{started[source]['prompt']:.0f} s"
        rows.append([say(name), f"`{call}`", *cells, time])
    header = ["you have", "call", "weights, GB", "peak, GB", "tokens/s", "load"]
    note = say("x: relative to llama.cpp and to ik_llama.cpp in the same run")
    return f"{markdown(header, rows, say)}\n\n{machines(records, say)} ({note})"


HEADLINE = "AVX512-VNNI"  # the one of PROCESSORS whose figures the README shows
LOAD, INT4 = "from_pretrained(...)", "from_pretrained(..., quantization_config=int4)"
# machine, call, whose figures, bits, int8 embedding and output layer, where the seconds to load are from: `loading`'s
# "results", or the folder and bits of a start (on a GPU: the kind of `python benchmarks gpu` that stands for it)
START = (
    ("GPU, 16 GB", f"{LOAD}.half().cuda()", "GPU", 16, False, "bfloat16"),
    ("GPU, 6 GB", f"{INT4}.half().cuda()", "GPU", 4, False, "int4"),
    ("CPU", f"{INT4}.half()", HEADLINE, 4, False, "results"),
    ("CPU, faster", f"{INT4}.half().quantize(4, embedding=True, output_layer=True)", HEADLINE, 4, True, ("float16", 4)),
    ("CPU, not quantized", f"{LOAD}.bfloat16()", HEADLINE, 16, False, None),
    ("int4 files, CPU", f"{LOAD}.half()", HEADLINE, 4, False, ("int4", 0)),
    ("Mac", f'{LOAD}.half().to("mps")', "other", 16, False, None),
)


BESIDE = (  # rows of the README's table of speeds: bits, int8 embedding and output layer, task, its name, its context
    (4, False, "decode", "decode", ""),
    (4, True, "decode", "decode", ""),
    (4, True, "decode 8192", "decode, context of", "8,192"),
    (4, False, "prefill 512", "prefill of 512 tokens", ""),
    (8, False, "decode", "decode", ""),
)


def decode_6b(processor=HEADLINE):
    """The newest run of the decode benchmark at the shapes of 6B."""
    return next(r for r in newest(processor, "decode", "shape", "dtype") if r["settings"]["shape"] == "6b")


def speed(say, processor):
    """tokens/s beside llama.cpp, ik_llama.cpp and GlmForCausalLM."""
    if processor != PROCESSORS[0]:  # one table
        return ""
    rows, records = [], []
    for bits, small_head, task, name, number in BESIDE:
        record, run = whole_run(HEADLINE, bits, small_head)
        figures = run["tokens_per_second"].get(task)
        if figures:  # older runs lack some
            held = f"int{bits}" + (f" ({say('int8 head')})" if small_head else "")
            others = [other for other in PEERS if other in figures]
            times = [f"{figures['ratios'][other]:.2f}x" for other in others]
            others = [f"{other} {figures[other]:.3g}" for other in others]
            task = " ".join(filter(None, (say(name), number)))
            rows.append([f"{held} {task}", f"{figures['ours']:.3g}", ", ".join(others), ", ".join(times)])
            records.append(record)
    record = decode_6b()
    row = record["rows"][-1]
    name = f"{record['settings']['dtype']} {say('decode, context of')} {row['context']:,}"
    other = f"GlmForCausalLM {1000 / row['glm_ms']:.3g}"
    rows.append([name, f"{1000 / row['ours_ms']:.3g}", other, f"{row['ratio']:.2f}x"])
    header = ["6.2B, on a CPU", "this package", "beside it", "ratio"]
    return f"{markdown(header, rows, say)}\n\n{machines([*records, record], say)}"


def headline():
    """The figures that the READMEs' first screens claim, with their units."""
    plain, faster = (whole_run(HEADLINE, 4, small_head)[1]["tokens_per_second"] for small_head in (False, True))
    loaded = {row["bits"]: row["peak_gb"] for row in newest(HEADLINE, "loading")[0]["rows"]}
    far = decode_6b()["rows"][-1]
    gpu, compiled = newest_on_card("graph")["bfloat16"], answers_on_card("int4")[1]
    return [
        f"{compiled:.0f} tokens/s",
        *(f"{gpu[f'{name} 512']['eager_ms']:.1f} ms" for name in ("ours", "glm")),
        f"{plain['decode']['ours']:.3g} tokens/s",
        f"{faster['decode']['ours']:.3g} tokens/s",
        *(f"{speeds['decode']['ratios'][other]:g} " for speeds in (plain, faster) for other in PEERS),
        f"{plain['prefill 512']['ratios']['llama.cpp']:.1f} ",
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
    against_vllm,
    loading,
    footprint,
    starting,
    quality,
    perplexity,
    gpu_decode,
    gpu_prefill,
    gpu_memory,
    start,
    speed,
)


def arguments(parser):
    """No figures."""


def pages():
    """{page: its text with the newest tables}."""
    texts = {}
    for name in ("README.md", "README_zh.md", "docs/performance.md", "docs/quantization.md", "docs/serving.md"):
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
    import pictures

    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    pictures.draw()
