"""Train the carried checkpoints: a small ChatGLM2 and a small ChatGLM3 that memorize their `dialogues.jsonl`.

    python examples/tiny/train.py            # this folder: about 10 minutes on two cores, seeded
    python examples/tiny/train.py tiny3      # ../tiny3, with this folder's tokenizer: about 4 minutes

It trains a SentencePiece BPE with byte fallback on the dialogues, then a ChatGLM2 of 3.5 million parameters with
transformers' Trainer, and checks that greedy decoding gives every answer, also in int8 and int4. In half of the steps
a weight is rounded to int4, with a straight-through gradient (Bengio et al., 2013, arXiv:1308.3432), so that the
answers survive quantization. The ChatGLM3 has 1.2 million parameters and dialogues with system messages and tools.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.utils import parametrize
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "lib"))
from bpe import train_bpe

FOLDER = Path(__file__).resolve().parent
TINY3 = FOLDER.parent / "tiny3"
REPOSITORY = FOLDER.parent.parent
SHAPE = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 640,
    "num_attention_heads": 8,
    "kv_channels": 32,
    "multi_query_group_num": 2,
    "seq_length": 1024,
}
SHAPE3 = {**SHAPE, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4, "seq_length": 8192}


def read_dialogues():
    """The rounds of every dialogue: a list of lists of (query, answer)."""
    with open(FOLDER / "dialogues.jsonl", encoding="utf-8") as f:
        return [[tuple(turn) for turn in json.loads(line)["turns"]] for line in f]


def train_tokenizer(dialogues, vocab_size):
    """Write tokenizer.model and the file beside it, and return the tokenizer."""
    prompt = "[Round 1]\n\n问：答：[Round 2]\n\n[Round 3]\n\n"
    lines = [line for rounds in dialogues for turn in rounds for text in turn for line in text.split("\n")]
    model = train_bpe([*lines, *prompt.split("\n")], vocab_size, character_coverage=0.995)
    (FOLDER / "tokenizer.model").write_bytes(model)
    shutil.copy(REPOSITORY / "tokenizer_config.json", FOLDER)
    return AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)


def examples(dialogues, tokenizer):
    """One example per round: the chat prompt, then the answer and </s>, which alone have labels."""
    seen, rows = set(), []
    for rounds in dialogues:
        for i, (query, answer) in enumerate(rounds):
            prompt = tokenizer.build_prompt(query, rounds[:i])
            if prompt in seen:
                continue
            seen.add(prompt)
            prompt_ids = tokenizer(prompt)["input_ids"]
            ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
            if ids[: len(prompt_ids)] != prompt_ids:
                raise ValueError(f"the tokenizer merges prompt and answer: {prompt[-8:] + answer[:8]!r}")
            rows.append({"input_ids": ids, "labels": [-100] * len(prompt_ids) + ids[len(prompt_ids) :]})
    return rows


def read_messages():
    """The messages of every dialogue of the ChatGLM3."""
    with open(TINY3 / "dialogues.jsonl", encoding="utf-8") as f:
        return [json.loads(line)["messages"] for line in f]


def message_examples(dialogues, tokenizer):
    """One example per dialogue; labels on every answer and on the token that ends it."""
    rows = []
    for messages in dialogues:
        row = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        labels = [i if learned else -100 for i, learned in zip(row["input_ids"], row["assistant_masks"])]
        rows.append({"input_ids": row["input_ids"], "labels": labels})
    return rows


class RandomlyRounded(torch.nn.Module):
    """While training, a weight rounded to int4 with probability one half; the gradient is passed to the weight."""

    def forward(self, weight):
        if not self.training or random.random() < 0.5:
            return weight
        scale = weight.detach().abs().amax(dim=1, keepdim=True) / 7
        return weight + (torch.round(weight.detach() / scale) * scale - weight.detach())


def block_linears(model):
    return [layer for layer in model.transformer.encoder.modules() if isinstance(layer, torch.nn.Linear)]


def train(model, tokenizer, rows, epochs, seed, batch_size):
    for layer in block_linears(model):
        parametrize.register_parametrization(layer, "weight", RandomlyRounded())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            train_sampling_strategy="group_by_length",
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=30,
            weight_decay=0.02,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            seed=seed,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()
    for layer in block_linears(model):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def wrong_answers(model, tokenizer, dialogues, batch_size=64):
    """(prompt, answer, given) of every round where greedy decoding gives another answer."""
    rounds = [(rounds[:i], *turn) for rounds in dialogues for i, turn in enumerate(rounds)]
    wrong = []
    for start in range(0, len(rounds), batch_size):
        batch = rounds[start : start + batch_size]
        prompts = [tokenizer.build_prompt(query, history) for history, query, _ in batch]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=160)[:, inputs["input_ids"].shape[1] :]
        given = [model.process_response(text) for text in tokenizer.batch_decode(ids)]
        wrong += [(p, answer, g) for p, (_, _, answer), g in zip(prompts, batch, given) if g != answer]
    return wrong


def wrong_messages(model, tokenizer, dialogues):
    """(query, answers, given) of every message that greedy chat answers with other messages."""
    wrong = []
    for messages in dialogues:
        for i, message in enumerate(messages):
            if message["role"] in ("user", "observation"):
                end = next((j for j in range(i + 1, len(messages)) if messages[j]["role"] != "assistant"), None)
                options = {"role": message["role"], "do_sample": False, "max_new_tokens": 160}
                _, history = model.chat(tokenizer, message["content"], messages[:i], **options)
                if history != messages[:end]:
                    wrong.append((message["content"], messages[i + 1 : end], history[i + 1 :]))
    return wrong


def make_tiny(args):
    """(folder, dialogues, tokenizer, examples, configuration, a function of wrong answers)."""
    dialogues = read_dialogues()
    tokenizer = train_tokenizer(dialogues, args.vocab_size)
    return FOLDER, dialogues, tokenizer, examples(dialogues, tokenizer), SHAPE, wrong_answers


def make_tiny3(args):
    dialogues, tokenizer = read_messages(), AutoTokenizer.from_pretrained(TINY3, trust_remote_code=True)
    shape = {**SHAPE3, "model_family": "chatglm3", "rope_ratio_type": "base", "eos_token_id": tokenizer.stop_ids()}
    return TINY3, dialogues, tokenizer, message_examples(dialogues, tokenizer), shape, wrong_messages


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="tiny", choices=["tiny", "tiny3"])
    parser.add_argument("--epochs", type=int, help="default: 50, or 60 for tiny3")
    parser.add_argument("--vocab-size", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)

    make, epochs, batch_size = {"tiny": (make_tiny, 50, 16), "tiny3": (make_tiny3, 60, 4)}[args.checkpoint]
    target, dialogues, tokenizer, rows, shape, find_wrong = make(args)
    padded = -len(tokenizer) % 64 + len(tokenizer)
    config = AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True, padded_vocab_size=padded, **shape)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(dialogues)} dialogues, {len(rows)} examples, {len(tokenizer)} tokens, {size / 1e6:.2f}M parameters")

    train(model, tokenizer, rows, args.epochs or epochs, args.seed, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        model.config.use_cache = model.generation_config.use_cache = True  # the Trainer disables it
        model.half().save_pretrained(folder)
        for name in ("model.safetensors", "config.json", "generation_config.json"):
            shutil.copy(Path(folder) / name, target)

    for bits in (0, 8, 4):
        model = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True, dtype=torch.float32)
        wrong = find_wrong(model.quantize(bits).eval(), tokenizer, dialogues)
        print(f"{f'int{bits}' if bits else 'float'}: {len(wrong)} rounds are not answered as in the data")
        for prompt, answer, given in wrong[:5]:
            print(f"    {prompt!r}: {given!r}, not {answer!r}")


if __name__ == "__main__":
    main()
