"""A few new tokens through all blocks in one CUDA graph, for eager inference on a GPU.

Without it a decode step takes as long as the host needs to launch its kernels one by one: 13 to 17 ms on an H200, of
which the GPU works for 3 to 5. A graph is captured from the modules, which are its reference, at the second step that
finds the cache's buffers in the same place, and replayed as long as they, the weights and the shapes stay. Since
nothing but numbers on the GPU may change from replay to replay, tokens are written to slots that a tensor holds, and
attend to a whole buffer under a mask.

`config.cuda_graphs = False` leaves all steps to the modules.
"""

import contextlib
import functools
import gc
import threading
import time
import warnings
from typing import Callable, Dict, List, Optional, Sequence, Tuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .attention_chatglm import gpu_attention, sdpa_attention
from .attention_triton import MOST_TOKENS
from .blocks_chatglm import NotServed, PlainBlocks, require
from .inference_cpu import PLAIN
from .quantization import QuantizedLinear
from .quantization_triton import runs_on
from .torch_compat import forget_capture, needs_dispatch, other_random_numbers

MOST_ROWS = 64  # new tokens of all rows together: with more the GPU works, and a graph's memory is kept
PATIENCE = 10  # seconds after its last step in which another thread may still draw random numbers
LONGEST_WAIT = 1  # seconds for another thread's turn, which takes a tenth of that at most
WORTHWHILE = 4  # replays that pay for a capture
AFTER_A_FAILURE = 64  # steps of the modules


def serves(x: Tensor) -> bool:
    """Whether a graph may compute on x: it has no gradient, torch's dispatcher does not see it, and Triton runs."""
    return (
        x.device.type == "cuda"
        and not (torch.is_grad_enabled() or needs_dispatch(x))
        and not torch.cuda.is_current_stream_capturing()
        and torch.version.hip is None  # where graphs were never tried
        and runs_on(x.device)  # so attention under a mask need not read a whole buffer
    )


class BlocksInGraph(PlainBlocks):
    """The CUDA graphs for plain blocks."""

    def __init__(self, *classes):
        super().__init__(*classes)
        self.steps = WeakKeyDictionary()  # the cache's first layer -> Steps

    def __call__(self, blocks: Sequence[nn.Module], x: Tensor, rotary, mask, attend, cache) -> Optional[Tensor]:
        """x (B, T, C) after all blocks, with its keys and values in the cache; None if the modules have to compute it.

        rotary: cos, sin (B or 1, T, 1, D / 4), float32. mask: boolean (B or 1, 1, T, S), or None for one token that
        attends to all; it and `attend` are those of attention_chatglm.
        """
        if not serves(x):
            return None
        card, tokens = card_of(x.device), x.shape[1]
        card.enter()
        try:
            require(card.works and attend in (sdpa_attention, gpu_attention))
            require(tokens <= MOST_TOKENS and x.shape[0] * tokens <= MOST_ROWS)
            layers = self.layers(blocks, x, cache)
            require(tokens == 1 if mask is None else fits(mask, x, layers[0].keys.shape[2]))
            identity, _weights = self.identity(blocks, x, rotary, mask)
            buffers = self.buffers(layers, x)
        except NotServed:
            return None
        identity += [buffers[0][0].shape, *(buffer.data_ptr() for pair in buffers for buffer in pair)]
        step = self.steps.setdefault(layers[0], Steps()).find((tokens, mask is not None), identity)
        y = None
        if step is not None:
            with torch.cuda.device_of(x), card.turn() as has_turn:
                if has_turn and (step.graph or card.has_one_thread()):
                    y = step(card, blocks, x, rotary, mask, buffers, layers[0].keys.shape[2])
        for layer in layers:  # the modules fill the buffers where the next step looks for them
            layer.extend(0 if y is None else tokens)
        return y

    @staticmethod
    def buffers(layers, x: Tensor) -> List[Tuple[Tensor, Tensor]]:
        """Of each layer of the cache, the buffers (B, G, room, D) of keys and values, with room for x (B, T, C)."""
        B, T, _ = x.shape
        shape = layers[0].keys.shape
        require(shape[0] == B)
        for layer in layers:
            require(layer.keys.shape == layer.values.shape == shape)
            require(layer.keys.dtype == layer.values.dtype == x.dtype)
            require(layer.keys.get_device() == layer.values.get_device() == x.get_device())
        buffers = [layer.reserve(T, x.dtype, x.dtype) for layer in layers]
        require(len({buffer.shape for pair in buffers for buffer in pair}) == 1)
        return buffers

    def identity(self, blocks, x: Tensor, rotary, mask) -> Tuple[list, List[Tensor]]:
        """(what a graph is captured for, the weights, to be held meanwhile: another thread may replace a layer's)."""
        place, weights = x.get_device(), []
        what = [x.shape, x.dtype, rotary[0].shape, None if mask is None else mask.shape[0]]
        for i, block in enumerate(blocks):
            attention, norms, linears = self.parts(block, i)
            require(attention.config.cuda_graphs)
            what += attention.scaling, norms[0].eps, norms[1].eps
            for module in (*norms, *linears):
                parameters = module._parameters
                require(parameters.get("weight") is not None and not module._buffers)
                if type(module) is QuantizedLinear:
                    require(module._weights.parameters is parameters)
                    what.append(module.backend)
                for weight in parameters.values():
                    if weight is not None:
                        require(type(weight) in PLAIN and weight.layout is torch.strided)
                        require(weight.get_device() == place)
                        what += weight.data_ptr(), weight.dtype, weight.shape, weight.stride()
                        weights.append(weight)
        return what, weights


def fits(mask: Tensor, x: Tensor, seen: int) -> bool:
    """Whether this is a boolean mask (B or 1, 1, T, S) where x (B, T, C) is."""
    shapes = [(rows, 1, x.shape[1], seen + x.shape[1]) for rows in (1, x.shape[0])]
    return mask.dtype == torch.bool and mask.device == x.device and mask.shape in shapes


class Steps:
    """The kinds of steps that a cache has seen, and how many of their graphs were in vain: drafts crop the cache."""

    def __init__(self):
        self.held, self.wasted = {}, 0

    def find(self, kind: tuple, identity: list) -> Optional["Step"]:
        """The step of this kind, if what it reads has stayed where it is for long enough to be captured."""
        step = self.held.get(kind)
        if step is None or step.identity != identity:
            if step is not None and step.graph is not None:
                self.wasted = self.wasted + 1 if step.replays < WORTHWHILE else max(self.wasted - 1, 0)
            step = self.held[kind] = Step(identity, 2 ** min(self.wasted, 10))
        if step.waits:
            step.waits -= 1
            return None
        return step


class Step:
    """One step of a kind: what a graph reads and writes beside weights and cache, and the graph once there is one."""

    graph, replays = None, 0

    def __init__(self, identity: list, waits: int = 0):
        self.identity = identity
        self.waits = waits  # steps that are the modules' before a capture

    def __call__(self, card: "Card", blocks, x: Tensor, rotary, mask: Optional[Tensor], buffers, seen: int) -> Tensor:
        """x (B, T, C) after all blocks. The first call runs the modules and captures what they launch."""
        if self.graph is None:
            self.make_inputs(x, rotary, mask, buffers)
        self.fill(x, rotary, mask, seen)
        if self.graph is None:
            y, self.graph = card.capture(functools.partial(self.compute, blocks, buffers))
            self.waits = 0 if self.graph else AFTER_A_FAILURE
            return y
        self.replays += 1
        return self.graph()

    def make_inputs(self, x: Tensor, rotary, mask: Optional[Tensor], buffers) -> None:
        tokens, room = x.shape[1], buffers[0][0].shape[2]
        with torch.inference_mode(False):  # a tensor created in inference mode could not be written outside it
            self.x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            self.rotary = [torch.empty(angles.shape, dtype=angles.dtype, device=x.device) for angles in rotary]
            self.slots = torch.empty(tokens, dtype=torch.long, device=x.device)
            self.mask = None
            if mask is not None:
                self.mask = torch.zeros(*mask.shape[:3], room, dtype=torch.bool, device=x.device)

    def fill(self, x: Tensor, rotary, mask: Optional[Tensor], seen: int) -> None:
        self.x.copy_(x)
        for held, angles in zip(self.rotary, rotary):
            held.copy_(angles)
        torch.arange(seen, seen + x.shape[1], device=x.device, out=self.slots)
        if mask is not None:
            self.mask[..., : mask.shape[-1]] = mask

    def compute(self, blocks, buffers) -> Tensor:
        """What the graph holds: the modules, on the tensors that are filled before each replay."""
        x, cache = self.x, SlotCache(buffers, self.slots)
        place = torch.arange(buffers[0][0].shape[2], device=x.device)
        mask = (place <= self.slots[-1])[None, None, None]  # (1, 1, 1, room): what is behind was in a longer mask
        mask = mask if self.mask is None else mask & self.mask  # (B or 1, 1, T, room)
        for block in blocks:
            x, _ = block(x, x.dtype, self.rotary, mask, attend=gpu_attention, cache=cache)
        return x


class SlotCache:
    """A cache whose new tokens go to the slots [T] of its buffers (B, G, room, D), all of which it returns."""

    def __init__(self, buffers, slots: Tensor):
        self.buffers, self.slots = buffers, slots

    def update(self, key: Tensor, value: Tensor, layer_idx: int, cache_kwargs=None) -> Tuple[Tensor, Tensor]:
        keys, values = self.buffers[layer_idx]
        return keys.index_copy_(2, self.slots, key), values.index_copy_(2, self.slots, value)


# ---- the card -------------------------------------------------------------------------------------------------------


CARDS: Dict[torch.device, "Card"] = {}


def card_of(device: torch.device) -> "Card":
    return CARDS.get(device) or CARDS.setdefault(device, Card(device))


def leave() -> None:
    """Say that this thread draws no more random numbers before its next step."""
    for card in list(CARDS.values()):
        card.threads.pop(threading.get_ident(), None)


class Card:
    """What all graphs of a GPU share: the stream that captures, memory for what they compute, and whose turn it is.

    A replay overwrites what another has computed. So replays take turns, and their result is copied within the turn.

    Before torch 2.13, while a capture begins, the GPU refuses random numbers to all threads. So a thread captures only
    if no other has entered within PATIENCE and not left, and others wait to enter.
    """

    def __init__(self, device: torch.device):
        self.device, self.lock = device, threading.Lock()
        self.works, self.failures = True, 0  # it gives up at once, or when memory is wanting a third time
        self.tried = False  # whether a replay was compared with the modules
        self.threads: Dict[int, float] = {}  # when each has last entered
        self.stream = None  # which captures
        self.last, self.done = None, None  # the stream that has had the last turn, and the end of that

    def enter(self) -> None:
        """Begin to compute new tokens, unless another thread captures: wait for that."""
        self.threads[threading.get_ident()] = time.monotonic()
        if self.lock.acquire(timeout=LONGEST_WAIT):
            self.lock.release()

    def has_one_thread(self) -> bool:
        """Whether no other thread may draw random numbers before it enters again. The caller holds the lock."""
        since = time.monotonic() - PATIENCE
        for thread, then in list(self.threads.items()):
            if then < since:
                self.threads.pop(thread, None)
        return self.threads.keys() <= {threading.get_ident()}

    @contextlib.contextmanager
    def turn(self):
        """Compute on the current stream, after what others have replayed. Yields whether there is a turn.

        There is none if the lock's holder waits for this thread, as a collected iterator does for its worker.
        """
        if not self.lock.acquire(timeout=LONGEST_WAIT):
            yield False
            return
        try:
            self.begin_turn()
            try:
                yield True
            finally:
                self.done.record(self.last)
        finally:
            self.lock.release()

    def begin_turn(self) -> None:
        stream = torch.cuda.current_stream()
        if self.done is None:
            self.done = torch.cuda.Event()
        elif self.last != stream:
            stream.wait_event(self.done)
        self.last = stream

    def capture(self, work: Callable[[], Tensor]) -> Tuple[Tensor, Optional[Callable[[], Tensor]]]:
        """Return (what `work` returns, its graph: a function that replays it); no graph if there cannot be one."""
        y = work()  # compiles kernels, too
        try:
            graph, output = self.record(work)

            def replay() -> Tensor:
                graph.replay()
                return output.clone()

            again = replay()  # the first takes memory, too; it writes the same into the cache
        except RuntimeError as error:
            self.fail(error)
            return y, None
        self.failures = 0
        if not self.tried and y.isfinite().all():
            self.tried = True
            if not (again - y).abs().max() <= 0.02 * y.abs().max():
                self.give_up("differ from the modules")
                return work(), None  # once more: the cache has the graph's keys and values
        return y, replay

    def fail(self, error: RuntimeError) -> None:
        reason = " ".join(str(error).split())[:200]
        if "out of memory" in reason:
            torch.cuda.empty_cache()  # which torch does by itself, but not in the middle of a capture
            self.failures += 1
        if "out of memory" not in reason or self.failures == 3:
            self.give_up(f"cannot be captured ({reason})")

    def record(self, work: Callable[[], Tensor]) -> Tuple["torch.cuda.CUDAGraph", Tensor]:
        """The graph of what `work` launches, and what it returns."""
        # a priority that others hardly ask for: torch hands out the same 32 streams again and again, and frees cuBLAS's
        # workspace of a stream, which graphs use, with the first graph of that stream that is destroyed
        stream = self.stream or torch.cuda.Stream(priority=-1)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            if self.stream is None:
                pool = torch.cuda.graph_pool_handle()
                self.first = captured(lambda: torch.zeros(1, device=self.device), pool)  # the pool lives as long as it
                self.stream, self.pool = stream, pool
            return captured(work, self.pool)

    def give_up(self, why: str) -> None:
        self.works = False
        warnings.warn(
            f"CUDA graphs of a decode step on {self.device} {why}, so that each token takes several times as long. "
            "Please report this; config.cuda_graphs=False skips the attempt.",
            stacklevel=2,
        )


def captured(work: Callable[[], Tensor], pool) -> Tuple["torch.cuda.CUDAGraph", Tensor]:
    """(the graph of what `work` launches on the current stream, what it returns)."""
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()  # a graph that is destroyed, or an event that is asked for, would end the capture
    try:
        try:
            with torch.inference_mode(False), torch.no_grad(), other_random_numbers():
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            output = work()
        finally:
            if torch.cuda.is_current_stream_capturing():
                graph.capture_end()
    except BaseException:
        forget_capture(pool)
        raise
    finally:
        if collects:
            gc.enable()
    return graph, output
