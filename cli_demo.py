#!/usr/bin/env python3
"""Chat in the terminal with ChatGLM2 weights, or with the toy checkpoint that this repository carries.

    python cli_demo.py                                    # the toy checkpoint, on whatever device there is
    python cli_demo.py --model ../chatglm2-6b --quantize 4

Type a message and press Enter. `clear` forgets the conversation, `stop` (or Ctrl-D) leaves, Ctrl-C ends an answer.
Piped input is answered line by line: echo 你好 | python cli_demo.py
"""

import argparse
import contextlib
import sys
from pathlib import Path

import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

CODE = Path(__file__).resolve().parent
TOY = CODE / "examples" / "tiny"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def model_parser(description):
    """A parser of the options about the model: which weights, where, in what form."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TOY), help="folder with weights and tokenizer.model (default: the toy)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *DTYPES],
        help="auto: float16, as released; bfloat16 on a CPU, if not quantized",
    )
    parser.add_argument("--quantize", type=int, default=0, choices=[0, 4, 8], help="hold the weights in so many bits")
    return parser


def chat_parser(description):
    """`model_parser` with the options of how answers are sampled."""
    parser = model_parser(description)
    parser.add_argument(
        "--max-new-tokens", type=int, default=None, help="tokens an answer may take (default: what fits)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the likeliest token (default: 0.8)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.8, help="sample among the likeliest tokens of so much probability"
    )
    return parser


def sampling(args):
    """The arguments of stream_chat that these options stand for."""
    settings = {"do_sample": args.temperature > 0, "temperature": args.temperature, "top_p": args.top_p}
    if args.max_new_tokens is not None:
        settings["max_new_tokens"] = args.max_new_tokens
    return settings


def parse_arguments(arguments=None):
    parser = chat_parser(__doc__)
    parser.add_argument("--seed", type=int, default=None, help="make sampled answers repeatable")
    return parser.parse_args(arguments)


def choose_device(name):
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load(folder, device, dtype, bits):
    """(model, tokenizer) of the weights in `folder`, by the code beside this file: the folder needs none of its own."""
    if not Path(folder).is_dir():
        raise SystemExit(
            f"{folder} is no folder. Give the one that holds config.json, the weights and tokenizer.model."
        )
    model_class = get_class_from_dynamic_module("modeling_chatglm.ChatGLMForConditionalGeneration", str(CODE))
    tokenizer_class = get_class_from_dynamic_module("tokenization_chatglm.ChatGLMTokenizer", str(CODE))
    if dtype == "auto":  # torch multiplies many tokens in float16 on a CPU ten times slower than in bfloat16
        quantized = bits or model_class.config_class.from_pretrained(folder).quantization_bit
        dtype = "bfloat16" if device.type == "cpu" and not quantized else "float16"
    tokenizer = tokenizer_class.from_pretrained(folder)
    model = model_class.from_pretrained(folder, torch_dtype=DTYPES[dtype])
    return model.quantize(bits).to(device).eval(), tokenizer


def load_or_exit(args):
    """(model, tokenizer) of the options. Raises SystemExit, which says what is wrong with the folder or the device."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        return load(args.model, choose_device(args.device), args.dtype, args.quantize)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        raise SystemExit(f"{args.model} on {args.device}: {error}") from None


class Conversation:
    """The rounds so far and the cache that holds them."""

    def __init__(self, model, tokenizer, **settings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.clear()

    def clear(self):
        self.history, self.cache = [], None

    def answer(self, query):
        """Yield the answer piece by piece. Closing the iterator keeps what was said so far."""
        shown = ""
        history = self.history
        steps = self.model.stream_chat(
            self.tokenizer, query, history, self.cache, return_past_key_values=True, **self.settings
        )
        for text, self.history, self.cache in steps:
            yield text[len(shown) :]
            shown = text


def write(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def talk(conversation, read_line, interactive):
    """Answer line after line until `stop`, or the end of the input.

    In a terminal Ctrl-C ends an answer, or drops the line that is being typed; of a pipe it ends the program.
    """
    going = True
    while going:
        try:
            going = take_turn(conversation, read_line, interactive)
        except KeyboardInterrupt:
            if not interactive:
                raise SystemExit(130) from None  # what a shell makes of SIGINT
            write(" … (`stop` leaves)\n")


def take_turn(conversation, read_line, interactive):
    """Answer one line; False where it was the last."""
    try:
        query = read_line().strip()
    except EOFError:
        return False
    if query == "clear":
        conversation.clear()
    elif query and query != "stop":
        try:
            with contextlib.closing(conversation.answer(query)) as pieces:
                for piece in pieces:
                    write(piece)
        except ValueError as error:  # a conversation that has become too long, for example
            if not interactive:
                raise SystemExit(str(error)) from error
            write(f"{error}\n(`clear` starts a new conversation.)")
        write("\n")
    return query != "stop"


def main(arguments=None):
    args = parse_arguments(arguments)
    for channel in (sys.stdin, sys.stdout):
        channel.reconfigure(encoding="utf-8", errors="replace")
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model, tokenizer = load_or_exit(args)
    conversation = Conversation(model, tokenizer, **sampling(args))
    if not sys.stdin.isatty():
        return talk(conversation, input, interactive=False)
    try:
        import readline  # noqa: F401  (input() gains line editing and history)
    except ImportError:
        write("(line editing needs the readline module)\n")  # Windows
    bits = f"int{args.quantize}" if args.quantize else str(model.dtype).replace("torch.", "")
    write(
        f"ChatGLM2 from {args.model} in {bits} on {model.device}. clear: forget, stop: leave, Ctrl-C: end an answer.\n"
    )
    if Path(args.model).resolve() == TOY:
        write(
            "This toy knows the dialogues of examples/tiny/dialogues.jsonl by heart. Try 你好, Hello or 讲个笑话, and\n"
        )
        write("`clear` before another one.\n")
    talk(conversation, lambda: input("\n> "), interactive=True)


if __name__ == "__main__":
    main()
