#!/usr/bin/env python3
"""Fine-tune ChatGLM2 with TRL's SFTTrainer: dialogues through the chat template, a loss on the answers alone.

    python finetune/sft.py --model_name_or_path chatglm2-6b --train_file dialogues.jsonl --output_dir output/sft \\
        --use_peft --dtype bfloat16 --learning_rate 2e-4

Arguments are those of TRL's SFTConfig and ModelConfig, and of finetune/train.py for the data; TRL trains in bfloat16
unless told otherwise, and needs --use_cpu on a machine without a GPU. finetune/data.py makes and tokenizes the
examples: one for every answer of a dialogue, with </s>, where TRL by itself has </s> behind the last answer alone.
"""

import sys
from pathlib import Path

from datasets import Dataset
from train import (
    LAYERS,
    DataArguments,
    StopAtNonFiniteLoss,
    UseCacheOnSave,
    WholeCheckpoints,
    begin,
    load_for_full_training,
    parse,
    train,
)
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from checkpoints import load_model

ARGUMENTS = (ModelConfig, DataArguments, SFTConfig)


class DialogueTrainer(UseCacheOnSave, WholeCheckpoints, SFTTrainer):
    """SFTTrainer that writes the config.json of train.py's full method."""


def check_options(model_config, training):
    """Refuse options of TRL that this script does not apply."""
    if model_config.load_in_4bit or model_config.load_in_8bit:
        raise ValueError(
            "--load_in_4bit and --load_in_8bit are bitsandbytes': give a folder that was saved with int4 or int8 "
            "weights, or use finetune/train.py --quantization_bit."
        )
    if training.max_length != SFTConfig.__dataclass_fields__["max_length"].default:
        raise ValueError(
            f"--max_length {training.max_length}: give --max_source_length and --max_target_length, which say what is "
            "cut."
        )
    for name in ("attn_implementation", "model_revision"):
        if getattr(model_config, name) != getattr(ModelConfig(), name):
            raise ValueError(f"--{name} is not supported here: leave it out.")
    if not model_config.use_peft and model_config.dtype != ModelConfig().dtype:
        raise ValueError(f"--dtype {model_config.dtype}: full training is in float32; add --use_peft, or leave it out.")


def prepare(model_config, data, training):
    """(trainer, checkpoint to resume from); the data is read before the model."""
    folder = model_config.model_name_or_path
    check_options(model_config, training)
    checkpoint, tokenizer, train_rows, eval_rows = begin(folder, data, training)
    training.max_length = None  # make_examples has cut them
    model_config.lora_target_modules = model_config.lora_target_modules or LAYERS
    if model_config.use_peft:
        model = load_model(folder, model_config.dtype)
    else:
        model = load_for_full_training(folder, tokenizer)
    trainer = DialogueTrainer(
        model=model,
        args=training,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        callbacks=[StopAtNonFiniteLoss()],
    )
    return trainer, checkpoint


def main(arguments=None):
    try:
        trainer, checkpoint = prepare(*parse(arguments, __doc__, ARGUMENTS))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    train(trainer, checkpoint)


if __name__ == "__main__":
    main()
