"""Imported before all else by the demos: a sign of life, and faster imports. It imports nothing that takes time."""

import contextlib
import gc
import sys
import threading


@contextlib.contextmanager
def importing(extra="test"):
    """For the imports of torch and transformers: 3 s from a warm file cache, 20 or more from a cold disk.

    A terminal says so, with a dot a second. The garbage collector, which would take a fifth of that time, waits. A
    package that is not installed ends the program with the command that installs pyproject.toml's `extra`.
    """
    done = threading.Event()
    ticker = threading.Thread(target=_tick, args=(done,), daemon=True)
    if sys.stderr.isatty():
        ticker.start()
    gc.disable()
    try:
        yield
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}. Install it in this folder: pip install -c constraints.txt ".[{extra}]"') from None
    finally:
        gc.enable()
        done.set()
        if ticker.ident:
            ticker.join()


def _tick(done):
    print("Importing torch and transformers ", end="", file=sys.stderr, flush=True)
    while not done.wait(1):
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
