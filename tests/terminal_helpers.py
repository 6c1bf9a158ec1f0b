"""A program in a pseudo terminal, typed to and read from."""

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import time

IN_A_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # standard input becomes what Ctrl-C is typed into
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """Runs `command`; a context manager that ends it."""

    def __init__(self, command, environment):
        self.end, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # rows, columns
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_A_TERMINAL, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = b""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.end)

    def type_in(self, text):
        os.write(self.end, text.encode())

    def read_until(self, text):
        """Return what is shown before `text`, which must come."""
        deadline = time.monotonic() + 30
        while text.encode() not in self.shown:
            ready, _, _ = select.select([self.end], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} does not come: {self.shown.decode(errors='replace')}"
            try:
                self.shown += os.read(self.end, 4096)
            except OSError:  # the program has ended
                raise AssertionError(f"ends before {text!r}: {self.shown.decode(errors='replace')}") from None
        before, self.shown = self.shown.split(text.encode(), 1)
        return before.decode(errors="replace")

    def status(self):
        """Wait for the end; the exit status."""
        return self.process.wait(timeout=60)
