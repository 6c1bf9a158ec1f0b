#!/usr/bin/env python3
"""Chat in the terminal with ChatGLM2 weights, or with the tiny checkpoint of this repository.

    python demos/cli_demo.py                                    # the tiny checkpoint
    python demos/cli_demo.py --model chatglm2-6b --quantize 4 --save chatglm2-6b-int4   # and keep the int4 files
    python demos/cli_demo.py --model chatglm2-6b --checkpoint output/lora   # a LoRA adapter, or a P-Tuning prefix

Type a message and press Enter. `clear` forgets the conversation, `stop` (or Ctrl-D) quits, Ctrl-C stops an answer.
Piped input is answered line by line: echo 你好 | python demos/cli_demo.py
"""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from starting import importing

with importing():
    import torch
    from checkpoints import TINY, held_in
    from options import chat_parser, load_or_exit, sampling


def parse_arguments(arguments=None):
    parser = chat_parser(__doc__)
    parser.add_argument("--seed", type=int, help="make sampled answers reproducible")
    return parser.parse_args(arguments)


class Conversation:
    """The rounds so far, and the cache with their keys and values."""

    def __init__(self, model, tokenizer, **settings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.clear()

    def clear(self):
        self.history, self.cache = [], None

    def answer(self, query):
        """Yield the answer piece by piece. If the iterator is closed early, the history keeps what was yielded."""
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

    In a terminal Ctrl-C stops the answer or discards the line being typed; with piped input it ends the program.
    """
    running = True
    while running:
        try:
            running = take_turn(conversation, read_line, interactive)
        except KeyboardInterrupt:
            if not interactive:
                raise SystemExit(130) from None  # a shell's exit status for SIGINT
            write(" … (`stop` quits)\n")


def take_turn(conversation, read_line, interactive):
    """Answer one line; False if it was the last."""
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
        except ValueError as error:  # for example, the conversation is too long
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
        import readline  # noqa: F401  (gives input() line editing and history)
    except ImportError:
        write("(no line editing: there is no readline module)\n")  # Windows
    write(f"{args.model}: {held_in(model)}, on {model.device}.\n")
    write("clear: new conversation, stop: quit, Ctrl-C: stop the answer.\n")
    if Path(args.model).resolve() == TINY:
        write("The tiny checkpoint has memorized examples/tiny/dialogues.jsonl and knows nothing else.\n")
        write("Try 你好, Hello or 讲个笑话, and `clear` before another dialogue.\n")
    talk(conversation, lambda: input("\n> "), interactive=True)


if __name__ == "__main__":
    main()
