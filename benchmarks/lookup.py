"""Prompt lookup beside plain decoding: tokens/s where an answer repeats its prompt, and where it does not.

Random weights write no text, so the answer is given: a logits processor makes it come, whatever the network says. Each
step is computed in full all the same, with as many tokens as it would have with a model that writes this answer. `edit`
is a source file of this repository with a name replaced, `summary` every third sentence of a page, `other` a page that
has nothing to do with the prompt.
"""

import re
import statistics

import torch
from common import ROOT, TINY, in_turns, load_tokenizer, machine, model_arguments, random_model, record
from transformers import LogitsProcessor, LogitsProcessorList


def arguments(parser):
    model_arguments(parser)
    parser.add_argument("--bits", type=int, default=4, choices=[0, 4, 8])
    parser.add_argument("--head", action="store_true", help="int8 embedding and output layer, too")
    parser.add_argument("--tokenizer", help="folder with tokenizer.model (default: the tiny checkpoint)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens of prompt, and of answer")
    parser.add_argument("--rounds", type=int, default=3)


def texts():
    """{kind: (prompt, answer)}."""
    code = (ROOT / "quantization_format.py").read_text(encoding="utf-8")[400:]
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    sentences = re.findall(r"[A-Z][^.|\n]{30,}\.", page)
    return {
        "edit": (code, code.replace("weight", "matrix")),
        "summary": (" ".join(sentences), " ".join(sentences[::3])),
        "other": ((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), page),
    }


class Script(LogitsProcessor):
    """Makes the token at each place after the prompt that of `ids`."""

    def __init__(self, ids, begin):
        self.ids, self.begin = ids, begin

    def __call__(self, input_ids, scores):
        scores[:, self.ids[input_ids.shape[1] - self.begin]] = torch.finfo(scores.dtype).max
        return scores


def run(args):
    model = random_model(args.shape, getattr(torch, args.dtype), args.device, args.layers)
    model.quantize(args.bits, **({"embedding": True, "output_layer": True} if args.head else {}))
    tokenizer = load_tokenizer(args.tokenizer or TINY)
    limits = machine(getattr(torch, args.dtype), args.device)
    steps, works = [], {}
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: steps.append(output.shape[1]))

    def work(prompt, answer, **lookup):
        script = LogitsProcessorList([Script(answer, prompt.shape[1])])
        settings = {"do_sample": False, "max_new_tokens": len(answer), "eos_token_id": None}

        def generate():
            steps.clear()
            model.generate(
                prompt, logits_processor=script, attention_mask=torch.ones_like(prompt), **settings, **lookup
            )

        return generate

    for kind, pair in texts().items():
        prompt, answer = (tokenizer.encode(text, add_special_tokens=False)[: args.tokens] for text in pair)
        prompt = torch.tensor([prompt], device=model.device)
        works[kind, "prompt"] = work(prompt, answer[:1])
        works[kind, "plain"] = work(prompt, answer)
        works[kind, "lookup"] = work(prompt, answer, prompt_lookup_num_tokens=10)
    rows = []
    times = in_turns(works, args.rounds, args.device)
    for kind in texts():
        works[kind, "lookup"]()
        prompt, plain, lookup = (times[kind, name] for name in ("prompt", "plain", "lookup"))
        speedups = [(b - a) / (c - a) for a, b, c in zip(prompt, plain, lookup)]
        rate = (args.tokens - 1) / statistics.median(b - a for a, b in zip(prompt, plain))
        rows.append({"text": kind, "plain_tokens_s": round(rate, 2), "speedup": round(statistics.median(speedups), 2)})
        rows[-1].update(steps=len(steps), fed=sum(steps[1:]))
    record("lookup", args, limits, rows=rows)
