#!/usr/bin/env python3
"""Fine-tune ChatGLM2 with TRL's SFTTrainer: dialogues through the chat template, a loss on the answers alone.

    python finetune/sft.py --model_name_or_path chatglm2-6b --train_file dialogues.jsonl --output_dir output/sft \\
        --use_peft --dtype bfloat16 --learning_rate 2e-4

Arguments are those of TRL's SFTConfig and ModelConfig, and of finetune/train.py for the data; TRL trains in bfloat16
unless told otherwise, and wants --use_cpu where there is no GPU. The examples are made by finetune/data.py, and TRL
finds them tokenized: its own way takes a dialogue's end from the template's text, and no text spells </s> here, so the
model would not learn to stop.
"""

from checkpoints import load_model
from datasets import Dataset
from train import LAYERS, DataArguments, EndAtNan, UseCacheOnSave, begin, parse, train, trained_in_full
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

ARGUMENTS = (ModelConfig, DataArguments, SFTConfig)


class DialogueTrainer(UseCacheOnSave, SFTTrainer):
    """SFTTrainer with the config.json of train.py's full method."""


def check_options(model_config, training):
    """Refuse what TRL's arguments offer and this script would pass over in silence."""
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
            raise ValueError(f"--{name} has no meaning here: leave it out.")
    if not model_config.use_peft and model_config.dtype != ModelConfig().dtype:
        raise ValueError(f"--dtype {model_config.dtype}: full training holds float32 weights; add --use_peft.")


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
        model = trained_in_full(folder, tokenizer)
    trainer = DialogueTrainer(
        model=model,
        args=training,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        callbacks=[EndAtNan()],
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
