#!/usr/bin/env python3
"""Chat in the terminal with ChatGLM2 weights, or with the tiny checkpoint of this repository.

    python demos/cli_demo.py                                    # the tiny checkpoint
    python demos/cli_demo.py --model chatglm2-6b --quantize 4 --save chatglm2-6b-int4   # and keep the int4 files
    python demos/cli_demo.py --model chatglm2-6b --checkpoint output/lora   # a LoRA adapter, or a P-Tuning prefix

Type a message and press Enter. Ctrl-C stops an answer; `clear` forgets the conversation, `stop` (or Ctrl-D) quits, and
/help lists the other commands. Piped input is answered line by line: echo 你好 | python demos/cli_demo.py
"""

import signal

if __name__ == "__main__":  # until the chat begins, Ctrl-C ends the program without a traceback
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "SIGPIPE"):  # as does a closed pipe
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)

import argparse
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from starting import importing

with importing("chat"):
    import torch
    from checkpoints import TINY, held_in
    from conversation import Conversation
    from conversations import read_conversation, rounds_of, written
    from line_input import LineInput
    from options import SETTINGS, chat_parser, load_or_exit, sampling


def parse_arguments(arguments=None):
    parser = chat_parser(__doc__)
    parser.add_argument("--seed", type=int, help="make sampled answers reproducible")
    parser.add_argument("--system", default="", help="instructions in front of the conversation")
    parser.add_argument("--stats", action="store_true", help="show tokens/s and the context used after each answer")
    parser.add_argument(
        "--max-length", type=SETTINGS["max_new_tokens"], default=8192, help="tokens of conversation and answer"
    )
    return parser.parse_args(arguments)


def write(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def count(number, noun):
    return f"{number} {noun}" + "s" * (number != 1)


def show(pieces):
    """Write an answer as it comes."""
    with contextlib.closing(pieces):
        for piece in pieces:
            write(piece)


def answer_lines(conversation, lines):
    """Answer line after line, up to `stop` or their end. What goes wrong ends the program."""
    try:
        for query in map(str.strip, lines):
            if query == "stop":
                return
            if query == "clear":
                conversation.clear()
            elif query:
                show(conversation.answer(query))
                write("\n")
    except ValueError as error:  # for example, the conversation is too long
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # a shell's exit status for SIGINT


class Chat:
    """A conversation in a terminal, with commands. `/name` is the method do_name, and its docstring the line of /help.

    Args:
        args: the command line's options; /set changes them.
    """

    def __init__(self, conversation, args):
        self.conversation, self.args, self.given = conversation, args, vars(args).copy()
        self.commands = {f"/{name[3:]}": getattr(self, name) for name in vars(Chat) if name.startswith("do_")}
        self.running, self.path = True, None

    def run(self, read_message):
        """Act on message after message. Ctrl-C stops the answer or discards what is being typed."""
        while self.running:
            try:
                self.take(read_message())
            except EOFError:
                write("\n")
                return
            except KeyboardInterrupt:
                write(" … (`stop` quits)\n")

    def take(self, message):
        command, _, argument = message.partition(" ")
        try:
            if message in ("clear", "stop"):
                command = {"clear": "/clear", "stop": "/quit"}[message]
            if command in self.commands:
                self.commands[command](argument.strip())
            elif message.startswith("/") and not message.startswith("//"):
                raise ValueError(f"{command} is not a command: /help lists them, and // begins a message with a slash.")
            elif message:
                self.answer(message[message.startswith("//") :])
        except (ValueError, OSError) as error:
            write(f"{error}\n")

    def answer(self, query):
        dropped = self.conversation.make_room(query)
        if dropped:
            write(f"(The context is full: the oldest {count(dropped, 'round')} dropped.)\n")
        self.show(self.conversation.answer(query))

    def show(self, pieces):
        try:
            show(pieces)
        except ValueError as error:  # for example, the message is too long
            raise ValueError(f"{error}\n(`clear` starts a new conversation.)") from error
        write("\n")
        chat = self.conversation
        if chat.context >= chat.limit:
            write("(The context is full: the answer ends here.)\n")
        if self.args.stats and chat.first is not None:
            rate = f", then {chat.rate:.1f} tokens/s" if chat.rate else ""
            write(
                f"({chat.first:.1f} s to the first token{rate}; context: {chat.context:,} of {chat.limit:,} tokens)\n"
            )

    def do_help(self, argument):
        """/help                 list the commands"""
        write("\n".join(command.__doc__ for command in self.commands.values()) + "\n")
        write('Several lines: paste them, or begin and end with """. Ctrl-C stops an answer, Ctrl-D quits.\n')

    def do_clear(self, argument):
        """/clear, clear         begin a new conversation"""
        self.conversation.clear()

    def do_system(self, argument):
        """/system TEXT          set the system prompt; /system shows it, /system - removes it"""
        chat = self.conversation
        if argument:
            chat.restart(chat.history, "" if argument == "-" else argument)
        write(f"System prompt: {chat.system}\n" if chat.system else "There is no system prompt.\n")

    def do_set(self, argument):
        """/set NAME VALUE       change a setting; /set NAME restores it, /set lists all"""
        name, _, value = argument.replace("=", " ", 1).partition(" ")
        if name and name not in SETTINGS:
            raise ValueError(f"{name} is not a setting: give {', '.join(SETTINGS)}.")
        if name:
            try:
                setattr(self.args, name, SETTINGS[name](value.strip()) if value else self.given[name])
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{name}: {error}") from None
            self.conversation.settings = sampling(self.args)
        for each in [name] if name else SETTINGS:
            value = getattr(self.args, each)
            if value is None or isinstance(value, bool):
                value = {None: "what fits", True: "on", False: "off"}[value]
            write(f"{each} {value}\n")

    def do_save(self, argument):
        """/save FILE            write the conversation as JSON; /save writes to the same file again"""
        chat, path = self.conversation, self.file(argument)
        if path.exists() and path != self.path:
            raise ValueError(f"{path} exists: give another name.")
        path.write_text(written(chat.form, chat.history, chat.system), encoding="utf-8")
        self.path = path
        write(f"{count(len(chat.rounds), 'round')} in {path}\n")

    def do_load(self, argument):
        """/load FILE            go on with a conversation that was saved here or exported from the web page"""
        path = self.file(argument)
        system, messages = read_conversation(path.read_text(encoding="utf-8"))
        rounds = rounds_of(messages)
        self.conversation.load(rounds, system)
        self.path = path
        write(f"{count(len(rounds), 'round')} from {path}\n")
        if len(messages) > 2 * len(rounds):
            write(f"Left out: {count(len(messages) - 2 * len(rounds), 'message')} without a question or an answer.\n")

    def do_observation(self, argument):
        """/observation TEXT     ChatGLM3: what the tool that it called returned"""
        self.show(self.conversation.answer(argument, role="observation"))

    def do_regenerate(self, argument):
        """/regenerate           answer the last message again"""
        if not self.conversation.rounds:
            raise ValueError("There is no message yet.")
        self.show(self.conversation.answer_again())

    def do_history(self, argument):
        """/history              show the conversation"""
        for query, answer in self.conversation.rounds:
            write(f"> {query}\n{answer}\n\n")

    def do_quit(self, argument):
        """/quit, stop           end the program"""
        self.running = False

    def file(self, argument):
        if not argument and not self.path:
            raise ValueError("Give the name of a file.")
        return Path(argument).expanduser() if argument else self.path


def main(arguments=None):
    args = parse_arguments(arguments)
    for channel in (sys.stdin, sys.stdout):
        channel.reconfigure(encoding="utf-8", errors="replace")
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model, tokenizer = load_or_exit(args)
    try:
        conversation = Conversation(model, tokenizer, args.system, args.max_length, args.tools, **sampling(args))
    except ValueError as error:
        raise SystemExit(f"--tools: {error}") from None
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not sys.stdin.isatty():
        return answer_lines(conversation, sys.stdin)
    write(f"{args.model}: {held_in(model)}, on {model.device}.\n")
    write("clear: new conversation, stop: quit, Ctrl-C: stop the answer, /help: more.\n")
    if Path(args.model).resolve() == TINY:
        write("The tiny checkpoint has memorized examples/tiny/dialogues.jsonl and knows nothing else.\n")
        write("Try 你好, Hello or 讲个笑话, and `clear` before another dialogue.\n")
    chat = Chat(conversation, args)
    chat.run(LineInput([*chat.commands]))


if __name__ == "__main__":
    main()
