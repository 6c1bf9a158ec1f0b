#!/usr/bin/env python3
"""Fine-tune ChatGLM2 by P-Tuning v2, LoRA, or in full, with transformers' Trainer.

    python finetune/train.py --method lora --model_name_or_path chatglm2-6b --train_file dialogues.jsonl --bf16 \\
        --output_dir output/lora
    python finetune/train.py --pre_seq_len 128 --quantization_bit 4 --model_name_or_path chatglm2-6b --bf16 \\
        --train_file train.json --prompt_column content --response_column summary --output_dir output/prefix

Every argument of transformers' TrainingArguments is one here; those of the original's scripts keep their names and
meaning. The trained weights are float32. Frozen weights are bfloat16 with --bf16, float16 with --fp16, float32
otherwise, or quantized with --quantization_bit.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional

import torch
from data import make_examples, read_rounds
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from checkpoints import TINY, include_code, load_config, load_model, load_tokenizer, read_prefix, save_prefix

LAYERS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
STATE = "trainer_state.json"  # what the Trainer writes last into a checkpoint
PARTIAL = "_partial"  # where checkpoints are written and deleted; the Trainer uploads nothing that begins with "_"
NOT_WHOLE = "is not whole: its run was killed while it was saved or deleted"
LEARNING_RATES = {"ptuning": 2e-2, "lora": 2e-4, "full": 1e-5}


def option(default, text, **kwargs):
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class ModelArguments:
    """Which weights, and which part of them is trained."""

    model_name_or_path: str = option(
        str(TINY), "folder with config.json, weights and tokenizer.model (default: the tiny checkpoint)"
    )
    method: Optional[str] = option(
        None, "default: ptuning with --pre_seq_len, else full, as in the original", choices=[*LEARNING_RATES]
    )
    quantization_bit: Optional[int] = option(None, "quantize the frozen weights to 4 or 8 bits")
    pre_seq_len: Optional[int] = option(None, "P-Tuning: tokens of the prefix (default: 128)")
    prefix_projection: bool = option(False, "P-Tuning: an MLP makes the prefix")
    ptuning_checkpoint: Optional[str] = option(None, "P-Tuning: start from the prefix in this folder")
    lora_r: int = option(8, "LoRA: rank")
    lora_alpha: int = option(32, "LoRA: the update is scaled by lora_alpha / lora_r")
    lora_dropout: float = option(0.1, "LoRA: dropout on the input of the update")
    lora_target_modules: List[str] = field(
        default_factory=lambda: LAYERS, metadata={"help": "LoRA: layers of a block (default: all four)"}
    )

    def __post_init__(self):
        prefix = self.pre_seq_len or self.ptuning_checkpoint
        self.method = self.method or ("ptuning" if prefix else "full")
        if prefix and self.method != "ptuning":
            raise ValueError(f"--method {self.method} has no prefix: leave out --pre_seq_len and --ptuning_checkpoint.")
        if self.quantization_bit not in (None, 0, 4, 8):
            raise ValueError(f"--quantization_bit {self.quantization_bit}: give 4 or 8, or leave it out.")
        if self.quantization_bit and self.method == "full":
            raise ValueError(f"--quantization_bit {self.quantization_bit}: int weights cannot be trained in full.")
        if self.method == "lora" and not importlib.util.find_spec("peft"):
            raise ValueError('--method lora needs peft: pip install -c constraints.txt ".[train]"')


@dataclass
class DataArguments:
    """Where the dialogues are; finetune/data.py describes the two forms."""

    train_file: str = option(None, "jsonl, one dialogue a line")
    validation_file: Optional[str] = option(None, "jsonl, for eval_loss (with --eval_strategy epoch, for example)")
    prompt_column: Optional[str] = option(None, "the original's form: the query's column")
    response_column: Optional[str] = option(None, "the original's form: the answer's column")
    history_column: Optional[str] = option(None, "the original's form: the column of earlier rounds")
    messages_column: str = option("messages", "the messages form: its column")
    max_source_length: int = option(1024, "longer prompts lose their beginning")
    max_target_length: int = option(1024, "longer answers lose their end")

    def __post_init__(self):
        if self.train_file is None:
            raise ValueError("--train_file is missing: give a jsonl file.")

    def read(self, path, roles=()):
        columns = (self.prompt_column, self.response_column, self.history_column, self.messages_column)
        return read_rounds(path, *columns, roles=roles)


@dataclass
class FineTuningArguments(TrainingArguments):
    """TrainingArguments with four other defaults."""

    learning_rate: Optional[float] = option(None, "default: 2e-2 for ptuning, 2e-4 for lora, 1e-5 for full")
    gradient_checkpointing: Optional[bool] = option(None, "recompute activations to save memory (default: true)")
    logging_steps: float = option(10, "steps between points of the loss curve")
    logging_nan_inf_filter: bool = option(False, "hide non-finite losses; here training stops at one")

    def __post_init__(self):
        renamed = "activation_checkpointing"  # its name in newer releases, beside the old one
        name = renamed if hasattr(TrainingArguments, renamed) else "gradient_checkpointing"
        if self.gradient_checkpointing is None and getattr(self, name) is None:
            setattr(self, name, True)
        super().__post_init__()


class WholeCheckpoints:
    """Writes a checkpoint in the folder PARTIAL and moves it out when it is complete: a killed run leaves whole ones.

    What `save_total_limit` deletes is moved in first. The next save clears what a killed one left.
    """

    writing = False

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self.writing else folder

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial))
        if self.args.should_save:
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.writing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.writing = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._move_out(folder)
        self.accelerator.wait_for_everyone()

    def _move_out(self, folder):
        (written,) = checkpoints_in(folder / PARTIAL)
        new, best = folder / written.name, self.state.best_model_checkpoint
        if best is not None and Path(best) == written:
            self.state.best_model_checkpoint = best = str(new)
            self.state.save_to_json(str(written / STATE))
        if new.exists():  # this run resumed from an older one
            new.rename(folder / PARTIAL / "replaced")
        written.rename(new)
        kept = {new} if best is None else {new, Path(best)}
        old = sorted(set(checkpoints_in(folder)) - kept, key=lambda path: path.stat().st_mtime)
        limit = self.args.save_total_limit or 0
        for path in old[: max(len(old) + len(kept) - limit, 0) if limit > 0 else 0]:
            path.rename(folder / PARTIAL / path.name)
        shutil.rmtree(folder / PARTIAL)


class PrefixTrainer(WholeCheckpoints, Trainer):
    """A Trainer whose checkpoints hold only the prefix, as the original's did."""

    def _save(self, output_dir=None, state_dict=None):
        if self.args.should_save:
            save_prefix(self.model, output_dir or self.args.output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        state, _ = read_prefix(resume_from_checkpoint)
        self.model.transformer.prefix_encoder.load_state_dict(state)


class UseCacheOnSave:
    """Saves the config with `use_cache`, which the Trainer disables while it trains."""

    def _save(self, output_dir=None, state_dict=None):
        config = self.model.config
        while_training, config.use_cache = config.use_cache, True
        super()._save(output_dir, state_dict)
        config.use_cache = while_training


class FullTrainer(UseCacheOnSave, WholeCheckpoints, Trainer):
    """A Trainer whose checkpoints are complete folders of weights."""


class LoraTrainer(WholeCheckpoints, Trainer):
    """A Trainer whose checkpoints hold the adapter."""


TRAINERS = {"ptuning": PrefixTrainer, "lora": LoraTrainer, "full": FullTrainer}


class StopAtNonFiniteLoss(TrainerCallback):
    """Stops at the first loss that is not finite, before its checkpoints replace the good ones."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "eval_loss"):
            if not math.isfinite(logs.get(name, 0)):
                raise FloatingPointError(
                    f"{name}={logs[name]} at step {state.global_step}, learning rate {args.learning_rate}: lower "
                    "--learning_rate, or use --bf16 instead of --fp16, and resume from the last good checkpoint."
                )


def examples(path, data, tokenizer, config, progress=True):
    """Rows of ids and labels; prints how many were cut."""
    rounds = data.read(path, tokenizer.conversation.roles)
    made = make_examples(tokenizer, rounds, data.max_source_length, data.max_target_length, progress)
    longest = max(range(len(made.rows)), key=lambda i: len(made.rows[i]["input_ids"]))
    length = len(made.rows[longest]["input_ids"])
    if length > config.seq_length:
        raise ValueError(
            f"{path}, line {rounds[longest].line}: {length} tokens exceed seq_length={config.seq_length}. Lower "
            "--max_source_length or --max_target_length, or shorten the dialogue."
        )
    if progress:
        print(
            f"{path}: {len(rounds)} answers, {sum(len(row['input_ids']) for row in made.rows)} tokens, the longest "
            f"example {length}; cut: {made.cut_prompts} prompts, {made.cut_answers} answers"
        )
    return made.rows


def load_for_full_training(folder, tokenizer):
    """The weights in `folder` in float32, to be trained in full and saved with their code."""
    model = load_model(folder, torch.float32)
    bits = model.config.quantization_bit
    if bits:
        raise ValueError(f"{folder} holds int{bits} weights, which cannot be trained in full: use LoRA or P-Tuning.")
    include_code(model, tokenizer)
    return model


def build_model(arguments, training, tokenizer):
    """The model. What the method trains has `requires_grad` and is float32."""
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    bits = arguments.quantization_bit or 0
    if arguments.method == "full":
        return load_for_full_training(arguments.model_name_or_path, tokenizer)
    if arguments.method == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=arguments.lora_target_modules,
        )
        return get_peft_model(load_model(arguments.model_name_or_path, dtype, bits), lora)
    if arguments.ptuning_checkpoint:
        state, prefix = read_prefix(arguments.ptuning_checkpoint)
    else:
        length = arguments.pre_seq_len or 128
        state, prefix = None, {"pre_seq_len": length, "prefix_projection": arguments.prefix_projection}
    model = load_model(arguments.model_name_or_path, dtype, bits, **prefix)
    if state:
        model.transformer.prefix_encoder.load_state_dict(state)
    model.transformer.prefix_encoder.float()
    return model


def checkpoints_in(folder):
    """The checkpoints in `folder`, newest first."""
    names = [path.name for path in Path(folder).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return [Path(folder, name) for name in sorted(names, key=lambda name: -int(name.partition("-")[2]))]


def is_whole(checkpoint):
    """Whether the Trainer has written a checkpoint to its end."""
    try:
        json.loads(Path(checkpoint, STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def check_output(training):
    """The checkpoint to resume from, or None. Two runs in one folder are refused."""
    asked, folder = training.resume_from_checkpoint, training.output_dir
    found = checkpoints_in(folder)
    if asked is None and found:
        raise ValueError(
            f"{folder} holds {found[0].name} of an earlier run: continue with --resume_from_checkpoint true, or give "
            "another --output_dir."
        )
    if asked is None or asked.lower() == "false":
        return None
    if asked.lower() != "true":
        if not Path(asked).is_dir():
            raise ValueError(f"--resume_from_checkpoint {asked} is not a directory: give a checkpoint, or true.")
        if not is_whole(asked):
            raise ValueError(f"--resume_from_checkpoint {asked} {NOT_WHOLE}. Give another checkpoint, or true.")
        return asked
    newest = next(filter(is_whole, found), None)
    if training.process_index == 0:
        for path in [*checkpoints_in(Path(folder, PARTIAL)), *found[: found.index(newest) if newest else None]]:
            print(f"skipped {path}, which {NOT_WHOLE}")
    if newest is None:
        raise ValueError(f"--resume_from_checkpoint true: {folder} holds no whole checkpoint; leave it out.")
    return str(newest)


def draw_loss(history, path):
    """Plot the losses of `history`, the Trainer's `state.log_history`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points), marker="." if len(points) < 50 else None, label=label)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.grid(alpha=0.3)
    if axes.lines:  # none if the run was shorter than logging_steps
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def begin(folder, data, training):
    """(checkpoint to resume from, tokenizer, training rows, validation rows), all checked before the model loads."""
    set_seed(training.seed)
    first = training.process_index == 0
    checkpoint = check_output(training)
    config, tokenizer = load_config(folder), load_tokenizer(folder)
    train_rows = examples(data.train_file, data, tokenizer, config, first)
    eval_rows = examples(data.validation_file, data, tokenizer, config, first) if data.validation_file else None
    return checkpoint, tokenizer, train_rows, eval_rows


def prepare(arguments, data, training):
    """(trainer, checkpoint to resume from). Options, data and folders are checked before the model loads."""
    if training.learning_rate is None:
        training.learning_rate = LEARNING_RATES[arguments.method]
    checkpoint, tokenizer, train_rows, eval_rows = begin(arguments.model_name_or_path, data, training)
    model = build_model(arguments, training, tokenizer)
    if training.process_index == 0:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{arguments.method}: {trained:,} parameters are trained")
    trainer = TRAINERS[arguments.method](
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[StopAtNonFiniteLoss()],
    )
    return trainer, checkpoint


def train(trainer, checkpoint=None):
    """Train, and write the result, trainer_state.json and loss.png into `output_dir`."""
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    if not trainer.is_world_process_zero():
        return
    if importlib.util.find_spec("matplotlib"):
        draw_loss(trainer.state.log_history, Path(trainer.args.output_dir) / "loss.png")
    else:
        print("no loss.png: matplotlib is not installed; the figures are in trainer_state.json")


ARGUMENTS = (ModelArguments, DataArguments, FineTuningArguments)


def parse(arguments, description, classes):
    """One object of each dataclass, from the command line or from `arguments`."""
    parser = HfArgumentParser(classes, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    return parser.parse_args_into_dataclasses(arguments)


def main(arguments=None):
    try:
        model, data, training = parse(arguments, __doc__, ARGUMENTS)
        trainer, checkpoint = prepare(model, data, training)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    train(trainer, checkpoint)
    if trainer.is_world_process_zero():
        options = f"--model {training.output_dir}"
        if model.method != "full":
            base = "" if model.model_name_or_path == str(TINY) else f"--model {model.model_name_or_path} "
            options = f"{base}--checkpoint {training.output_dir}"
        print(f"saved in {training.output_dir}: python demos/cli_demo.py {options}")


if __name__ == "__main__":
    main()
