"""What quantizing costs a model on real text: perplexity, KL divergence from the float weights, agreement.

    python benchmarks perplexity --model chatglm2-6b --text held_back.txt --calibration samples.jsonl

`divergence` is in nats per token. `agreement` is the share of tokens before which the most likely next one is that of
the float weights. `documentation_model` trains models to measure, and writes such files beside them.
"""

import math
import time
from pathlib import Path

import torch
from common import load_tokenizer, machine, record

SCHEMES = {  # name -> the options of quantize()
    "float": {"bits": 0},
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4, scale searched": {"bits": 4, "scale": "mse"},
    "int4, groups of 128": {"bits": 4, "group_size": 128},
    "int4, groups of 32": {"bits": 4, "group_size": 32},
    "int4, calibrated": {"bits": 4, "calibration": True},
    "int4, groups of 32, calibrated": {"bits": 4, "group_size": 32, "calibration": True},
}
LENGTH = 256  # tokens of a row


def arguments(parser):
    parser.add_argument("--model", type=Path, required=True, help="folder of float weights")
    parser.add_argument("--text", type=Path, required=True, help="text to measure on, documents between blank lines")
    parser.add_argument("--calibration", type=Path, required=True, help="other text, or conversations (.jsonl)")
    parser.add_argument("--samples", type=int, default=128, help="for calibration (default: 128)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text (default: 8192)")
    parser.add_argument("--only", nargs="+", choices=SCHEMES, help="these schemes alone")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)


def rows_of(tokenizer, path, count):
    """The first tokens of the file, int [N, LENGTH]."""
    ids = []
    for text in path.read_text(encoding="utf-8").split("\n\n"):
        ids += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        if len(ids) >= count:
            break
    rows = min(len(ids), count) // LENGTH
    if not rows:
        raise SystemExit(f"{path} has {len(ids)} tokens: give at least {LENGTH}")
    return torch.tensor(ids[: rows * LENGTH]).view(rows, LENGTH)


@torch.inference_mode()
def log_probabilities(model, rows):
    """Of the tokens after each one but the last: yields (rows [8, LENGTH], [8, LENGTH - 1, V])."""
    for part in rows.split(8):
        yield part, model(part.to(model.device)).logits[:, :-1].float().log_softmax(-1).cpu()


def measure(model, rows, want):
    """{figure: value} of a model, and its log-probabilities; `want` are those of the float weights."""
    got = [scores for _, scores in log_probabilities(model, rows)] if want is None else None
    entropy = divergence = agreement = 0.0
    parts = zip(rows.split(8), got) if want is None else log_probabilities(model, rows)
    for i, (part, scores) in enumerate(parts):
        reference = scores if want is None else want[i]
        entropy -= scores.gather(2, part[:, 1:, None]).sum().item()
        divergence += (reference.exp() * (reference - scores)).sum().item()
        agreement += (reference.argmax(-1) == scores.argmax(-1)).sum().item()
    count = rows[:, 1:].numel()
    return {
        "perplexity": round(math.exp(entropy / count), 4),
        "divergence": round(divergence / count, 6),
        "agreement": round(agreement / count, 4),
    }, got


def run(args):
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
    from samples import read_samples

    tokenizer, dtype = load_tokenizer(args.model), getattr(torch, args.dtype)
    rows, want, results = rows_of(tokenizer, args.text, args.tokens), None, []
    samples = read_samples(args.calibration, tokenizer, args.samples)
    for name in dict.fromkeys(["float", *(args.only or SCHEMES)]):
        options = dict(SCHEMES[name])
        if options.get("calibration"):
            options.update(calibration=samples, tokenizer=tokenizer)
        model = ChatGLMForConditionalGeneration.from_pretrained(args.model).to(args.device, dtype).eval()
        begin = time.process_time()
        model.quantize(**options)
        spent = time.process_time() - begin
        figures, got = measure(model, rows, want)
        want = want or got
        results.append({"weights": name, **figures, "quantize_seconds": round(spent, 1)})
        print(results[-1], flush=True)
    record("perplexity", args, machine(torch.float32, args.device), rows=results)
