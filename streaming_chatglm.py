"""From the streamer that `generate` calls to an iterator, which the consumer paces."""

import contextlib
import contextvars
import queue
import threading

import torch

from .torch_compat import autocast_dtype


class Closed(Exception):
    """The consumer of a stream is gone; raised inside `generate` to stop it."""


class StepStreamer:
    """Passes on what `generate` puts, and pauses it until the consumer asks for more.

    Both directions use SimpleQueue: unlike a Semaphore, it cannot be left locked by a Ctrl-C at the wrong moment.
    """

    def __init__(self):
        self.outbox = queue.SimpleQueue()
        self.wanted = queue.SimpleQueue()  # True: go on; False: the consumer is gone

    def wait(self):
        if not self.wanted.get():
            raise Closed

    def put(self, value):
        self.outbox.put(value)
        self.wait()

    def end(self):
        """Nothing to flush: `stream` detects the end itself."""


def stream(generate, device):
    """Iterate over what `generate(streamer=...)` puts: the prompt's ids [B, T], then the ids of each step.

    `generate` runs in its own thread and takes turns with the consumer: never both at once. Closing the iterator, or a
    Ctrl-C at any point, ends the thread after the current step. An exception in the thread is raised in the consumer.
    """
    streamer, finished = StepStreamer(), object()
    inherited = thread_state(device)

    def work():
        try:
            streamer.wait()
            with inherited():
                generate(streamer=streamer)
        except Closed:
            return
        except BaseException as error:
            streamer.outbox.put(error)
        else:
            streamer.outbox.put(finished)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    try:
        thread.start()
        while True:
            streamer.wanted.put(True)
            item = streamer.outbox.get()
            if item is finished:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        streamer.wanted.put(False)
        if thread.is_alive():  # False if start() itself was interrupted
            thread.join()


def thread_state(device):
    """Capture what torch keeps per thread: inference mode, autocast, the CUDA device and stream."""
    dtype, inference = autocast_dtype(device.type), torch.is_inference_mode_enabled()
    cuda_stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def inherited():
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.cuda.stream(cuda_stream))
            if dtype is not None:
                stack.enter_context(torch.autocast(device.type, dtype=dtype))
            yield

    return inherited
