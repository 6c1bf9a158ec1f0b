"""What quantizing costs the tiny checkpoint: cross entropy, KL divergence from float32, and right answers.

Cross entropy and divergence of the next-token distributions are in nats per token, over the answers of all dialogues;
`answers` counts the rounds whose greedy answer is the one in the data.
"""

import sys

import torch
from common import TINY, machine, record
from torch.nn.functional import kl_div

SCHEMES = {"float32": (0, None), "int8": (8, None), "int4": (4, None), "int4, groups of 128": (4, 128),
           "int4, groups of 32": (4, 32)}  # fmt: skip


def arguments(parser):
    parser.add_argument("--threads", type=int)


@torch.inference_mode()
def log_probabilities(model, rows):
    """Of every answer token of every dialogue: [N, V], and the tokens, int [N]."""
    scores, targets = [], []
    for ids, labels in rows:
        logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        target = torch.tensor(labels[1:])
        scores.append(logits[target != -100])
        targets.append(target[target != -100])
    return torch.cat(scores), torch.cat(targets)


def run(args):
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm2.tokenization_chatglm import ChatGLMTokenizer

    sys.path.append(str(TINY))
    import train

    tokenizer, dialogues = ChatGLMTokenizer.from_pretrained(TINY), train.read_dialogues()
    examples = [(row["input_ids"], row["labels"]) for row in train.examples(dialogues, tokenizer)]
    rows, want = [], None
    for name, (bits, group_size) in SCHEMES.items():
        model = ChatGLMForConditionalGeneration.from_pretrained(TINY).float().eval()
        model.quantize(bits, **({"group_size": group_size} if group_size else {}))
        got, targets = log_probabilities(model, examples)
        want = got if want is None else want
        entropy = -got.gather(1, targets[:, None]).mean().item()
        divergence = kl_div(got, want, log_target=True, reduction="batchmean").item()
        wrong = len(train.wrong_answers(model, tokenizer, dialogues))
        rows.append(
            {
                "weights": name,
                "cross_entropy": round(entropy, 5),
                "divergence": round(divergence, 5),
                "answers": sum(map(len, dialogues)) - wrong,
            }
        )
    record("quality", args, machine(torch.float32), rows=rows)
