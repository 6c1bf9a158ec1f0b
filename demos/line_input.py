"""Messages typed in a terminal: line editing, a history between sessions, pasted lines as one message.

prompt_toolkit edits the line if it is installed, else readline; without either (Windows), the terminal itself does.
"""

import contextlib
import json
import os
import re
import sys
from pathlib import Path

HISTORY_FILE = Path("~/.chatglm2_history")  # a message a line, as JSON: messages can have several lines
LONGEST_HISTORY = 1000
QUOTES = '"""'


class LineInput:
    """Reads messages; call it for the next one.

    Args:
        commands: what Tab completes.
    """

    def __init__(self, commands):
        self.path = HISTORY_FILE.expanduser()
        self.read_line = line_reader(self._load(), commands)

    def __call__(self):
        """The next message: a line, lines pasted together, or those between two `\"\"\"`.

        Raises:
            EOFError: Ctrl-D.
        """
        print()
        text = self.read_line("> ").strip()
        opened = re.match(rf"(/\w+ +)?{QUOTES}", text)
        if opened and QUOTES not in text[opened.end() :]:
            while not text.endswith(QUOTES, opened.end()):
                text = f"{text}\n{self.read_line('. ').rstrip()}"
        if opened and text.find(QUOTES, opened.end()) == len(text) - len(QUOTES):
            text = (opened[1] or "") + text[opened.end() : -len(QUOTES)].strip("\n")
        if text:
            self._remember(text)
        return text

    def _load(self):
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()[-LONGEST_HISTORY:]
            return [message for message in map(json.loads, lines) if isinstance(message, str)]
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            self._give_up(error)
            return []

    def _remember(self, message):
        if self.path is not None:
            try:
                with open(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as file:
                    file.write(json.dumps(message) + "\n")
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error):
        print(f"(The line history is not kept: {self.path}: {error})")
        self.path = None


def line_reader(history, commands):
    """A function that shows a prompt and returns what was typed or pasted before Enter."""
    if os.environ.get("TERM") != "dumb" and sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # an extra
            from prompt_toolkit import PromptSession
            from prompt_toolkit.completion import WordCompleter
            from prompt_toolkit.history import InMemoryHistory

            completion = {"completer": WordCompleter(commands, sentence=True), "complete_while_typing": False}
            return PromptSession(history=InMemoryHistory(history), **completion).prompt
    try:
        import readline
    except ImportError:  # Windows
        return input
    for message in history:
        readline.add_history(message)
    readline.set_completer_delims("")
    readline.set_completer(lambda text, n: [*(c for c in commands if c.startswith(text)), None][n] if text else None)
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    return input
