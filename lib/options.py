"""The command-line options about a model, and the model that they stand for; shared by the demos and the evaluation."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch
from chatglm2 import inference_cpu
from checkpoints import TINY, check_new, load_config, load_model, load_tokenizer, save
from transformers.utils import logging

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind, accepts, expected):
    """A type for argparse: a number that `accepts` is true of."""

    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if accepts(value):
                return value
        raise argparse.ArgumentTypeError(f"give {expected}, not {text}")

    return convert


def switch(text):
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"give on or off, not {text}")
    return text == "on"


SETTINGS = {  # what can be changed between two answers, and its type
    "temperature": number(float, lambda value: 0 <= value < float("inf"), "0 (greedy) or more"),
    "top_p": number(float, lambda value: 0 < value <= 1, "more than 0 and at most 1"),
    "max_new_tokens": number(int, lambda value: value >= 1, "1 or more"),
    "prompt_lookup": switch,
    "stats": switch,
}


def device(text):
    try:
        return text if text == "auto" else str(torch.device(text))
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"give auto, cpu, cuda, cuda:1 or mps, not {text}") from None


def json_file(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: {error}") from None


def model_parser(description):
    """A parser of the options about the model: which weights, on which device, in which precision."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(TINY), help="folder with weights and tokenizer.model (default: the tiny checkpoint)")
    add("--checkpoint", help="folder with the LoRA adapter or P-Tuning prefix that was trained on these weights")
    add("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="auto: float16, as released; bfloat16 on a CPU, if not quantized",
    )
    add(
        "--quantize",
        type=int,
        default=0,
        choices=[0, 4, 8],
        help="quantize the weights to this many bits; for a chat on a CPU embedding and output layer to int8 as well",
    )
    return parser


def chat_parser(description):
    """`model_parser` with the sampling options."""
    parser = model_parser(description)
    parser.set_defaults(head=True)
    add = parser.add_argument
    add("--tools", type=json_file, help="ChatGLM3: a JSON file with the tools that it may call")
    add("--save", metavar="FOLDER", help="keep the quantized weights in this new folder, to be started from later")
    add("--max-new-tokens", type=SETTINGS["max_new_tokens"], help="maximum length of an answer (default: what fits)")
    add(
        "--prompt-lookup",
        action="store_true",
        help="faster where an answer repeats the conversation, as in edits; the answers stay the same",
    )
    add("--temperature", type=SETTINGS["temperature"], default=0.8, help="0 is greedy decoding (default: 0.8)")
    add(
        "--top-p", type=SETTINGS["top_p"], default=0.8, help="sample from the most likely tokens up to this probability"
    )
    return parser


def sampling(args):
    """These options as arguments of stream_chat."""
    settings = {"do_sample": args.temperature > 0, "temperature": args.temperature, "top_p": args.top_p}
    if args.max_new_tokens is not None:
        settings["max_new_tokens"] = args.max_new_tokens
    if args.prompt_lookup:
        settings["prompt_lookup_num_tokens"] = 10
    return settings


def choose_device(name):
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(args):
    """(model, tokenizer) of the options."""
    device, dtype = choose_device(args.device), DTYPES.get(args.dtype)
    if dtype is None:  # on a CPU, torch's float16 matrix products are ten times slower than those in bfloat16
        quantized = args.quantize or load_config(args.model).quantization_bit
        dtype = torch.bfloat16 if device.type == "cpu" and not quantized else torch.float16
    folder = getattr(args, "save", None)
    if folder is not None:
        check_save(args)
    tokenizer = load_tokenizer(args.model)
    head = bool(args.quantize) and device.type == "cpu" and getattr(args, "head", False)
    model = load_model(args.model, dtype, args.quantize, args.checkpoint, head)
    if folder is not None:
        save(model, tokenizer, folder)
    if device.type == "cpu":
        inference_cpu.load_library()  # compiled now, if it has to be, and not during the first answer
    return model.to(device).eval(), tokenizer


def check_save(args):
    """Raise ValueError where --save has nothing to keep, or no room for it."""
    if not args.quantize or args.checkpoint:
        raise ValueError(f"--save {args.save} keeps quantized weights: give --quantize 4 or 8, and no --checkpoint.")
    check_new(args.save, "--save ")


def load_or_exit(args):
    """`load`, where an error of the folder or the device is a SystemExit of one message."""
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        return load(args)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise SystemExit(f"{args.model}, --device {args.device}: {error}") from None
