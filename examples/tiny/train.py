"""Train the checkpoint of this folder: a small ChatGLM2 that memorizes `dialogues.jsonl`.

    python examples/tiny/train.py            # about 10 minutes on two cores, seeded

It trains a SentencePiece BPE with byte fallback on the dialogues, then a ChatGLM2 of 3.5 million parameters with
transformers' Trainer, and checks that greedy decoding gives every answer, also in int8 and int4. In half of the steps
a weight is rounded to int4, with a straight-through gradient (Bengio et al., 2013, arXiv:1308.3432), so that the
answers survive quantization.
"""

import argparse
import io
import json
import random
import shutil
import tempfile
from pathlib import Path

import sentencepiece
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

FOLDER = Path(__file__).resolve().parent
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


def read_dialogues():
    """The rounds of every dialogue: a list of lists of (query, answer)."""
    with open(FOLDER / "dialogues.jsonl", encoding="utf-8") as f:
        return [[tuple(turn) for turn in json.loads(line)["turns"]] for line in f]


def train_tokenizer(dialogues, vocab_size):
    """Write tokenizer.model: BPE, byte fallback, split digits, no normalization, as in the released one."""
    prompt = "[Round 1]\n\n问：答：[Round 2]\n\n[Round 3]\n\n"
    lines = [line for rounds in dialogues for turn in rounds for text in turn for line in text.split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *prompt.split("\n")]),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.995,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (FOLDER / "tokenizer.model").write_bytes(model.getvalue())
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


class RandomlyRounded(torch.nn.Module):
    """While training, a weight rounded to int4 with probability one half; the gradient is passed to the weight."""

    def forward(self, weight):
        if not self.training or random.random() < 0.5:
            return weight
        scale = weight.detach().abs().amax(dim=1, keepdim=True) / 7
        return weight + (torch.round(weight.detach() / scale) * scale - weight.detach())


def block_linears(model):
    return [layer for layer in model.transformer.encoder.modules() if isinstance(layer, torch.nn.Linear)]


def train(model, tokenizer, rows, epochs, seed):
    for layer in block_linears(model):
        parametrize.register_parametrization(layer, "weight", RandomlyRounded())
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--vocab-size", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    set_seed(args.seed)

    dialogues = read_dialogues()
    tokenizer = train_tokenizer(dialogues, args.vocab_size)
    rows = examples(dialogues, tokenizer)
    padded = -len(tokenizer) % 64 + len(tokenizer)
    config = AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True, padded_vocab_size=padded, **SHAPE)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True, dtype=torch.float32)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(dialogues)} dialogues, {len(rows)} rounds, {len(tokenizer)} tokens, {size / 1e6:.2f}M parameters")

    train(model, tokenizer, rows, args.epochs, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        model.config.use_cache = model.generation_config.use_cache = True  # the Trainer disables it
        model.half().save_pretrained(folder)
        for name in ("model.safetensors", "config.json", "generation_config.json"):
            shutil.copy(Path(folder) / name, FOLDER)

    for bits in (0, 8, 4):
        model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True, dtype=torch.float32)
        wrong = wrong_answers(model.quantize(bits).eval(), tokenizer, dialogues)
        rounds = sum(map(len, dialogues))
        print(f"{f'int{bits}' if bits else 'float'}: {rounds - len(wrong)} of {rounds} rounds answered as in the data")
        for prompt, answer, given in wrong[:5]:
            print(f"    {prompt!r}: {given!r}, not {answer!r}")


if __name__ == "__main__":
    main()
