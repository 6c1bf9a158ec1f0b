#!/usr/bin/env python3
"""Chat in the terminal with weights and the LoRA adapter, or the prefix of P-Tuning, that was trained on them.

    python finetune/chat.py --model chatglm2-6b --checkpoint output/lora
    python finetune/chat.py --model chatglm2-6b --checkpoint output/prefix --quantize 4

The other options are those of cli_demo.py, which also chats with a folder that was trained in full.
"""

import sys

import torch
from checkpoints import CODE, load_finetuned, load_tokenizer
from transformers.utils import logging

sys.path.insert(0, str(CODE))
from cli_demo import DTYPES, Conversation, chat_parser, choose_device, sampling, talk  # noqa: E402


def main(arguments=None):
    parser = chat_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder with adapter_config.json or pytorch_model.bin")
    args = parser.parse_args(arguments)
    for channel in (sys.stdin, sys.stdout):
        channel.reconfigure(encoding="utf-8", errors="replace")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        device = choose_device(args.device)
        half = torch.bfloat16 if device.type == "cpu" else torch.float16
        tokenizer = load_tokenizer(args.model)
        model = load_finetuned(args.model, args.checkpoint, DTYPES.get(args.dtype, half), args.quantize)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    conversation = Conversation(model.to(device).eval(), tokenizer, **sampling(args))
    interactive = sys.stdin.isatty()
    talk(conversation, lambda: input("\n> ") if interactive else input(), interactive)


if __name__ == "__main__":
    main()
