"""The card of blocks_cuda, with torch.cuda replaced: streams, turns, and captures that fail."""

import contextlib
import gc

import pytest
import torch
from chatglm2 import blocks_cuda


class Stream:
    def wait_stream(self, other):
        self.waited_for = other

    def wait_event(self, event):
        self.waited_for = event.stream


class Event:
    def record(self, stream):
        self.stream = stream


class Generator:
    """The GPU's default generator, whose state is its own but where a capture begins."""

    device, state = torch.device("cpu"), "own"

    def graphsafe_get_state(self):
        return self.state

    def graphsafe_set_state(self, state):
        self.state = state


class Graph:
    """Runs nothing. Errors: where the next capture begins, where it ends, and where a graph is launched."""

    begins, ends, launches, capturing = None, None, None, False
    generator = Generator()

    def capture_begin(self, pool, capture_error_mode):
        assert pool == "pool" and capture_error_mode == "thread_local"
        assert torch.__version__ >= (2, 13) or self.generator.state != "own"
        assert not (gc.isenabled() or torch.is_inference_mode_enabled())
        if Graph.begins:
            raise RuntimeError(Graph.begins)
        Graph.capturing = True

    def capture_end(self):
        assert self.generator.state == "own"
        Graph.capturing = False
        if Graph.ends:
            raise RuntimeError(Graph.ends)

    def replay(self):
        if Graph.launches:
            raise RuntimeError(Graph.launches)


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as far as `Card` needs it."""
    streams = [Stream()]

    @contextlib.contextmanager
    def stream(other):
        streams.append(other)
        try:
            yield
        finally:
            streams.pop()

    for name in ("begins", "ends", "launches"):
        monkeypatch.setattr(Graph, name, None)
    for name, value in {
        "Stream": lambda priority: Stream(),
        "is_current_stream_capturing": lambda: Graph.capturing,
        "Event": Event,
        "CUDAGraph": Graph,
        "current_stream": lambda: streams[-1],
        "current_device": lambda: 0,
        "stream": stream,
        "graph_pool_handle": lambda: "pool",
        "default_generators": [Graph.generator],
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value, raising=False)
    forgotten = []
    monkeypatch.setattr(blocks_cuda, "forget_capture", forgotten.append)
    return forgotten


@pytest.fixture
def real_card():
    return blocks_cuda.Card(torch.device("cpu"))


def ones():
    return torch.ones(3)


@torch.inference_mode()
def test_a_capture(cuda, real_card):
    """The work runs where the caller computes, then is captured on another stream; a turn waits for the one before."""
    streams, main = [], torch.cuda.current_stream()

    def work():
        streams.append(torch.cuda.current_stream())
        return ones()

    with real_card.turn() as has_turn:
        y, replay = real_card.capture(work)
    assert has_turn and streams == [main, real_card.stream] and real_card.stream is not main
    assert real_card.stream.waited_for is main and real_card.done.stream is main
    assert torch.equal(replay(), y) and replay() is not replay() and real_card.works and real_card.tried
    other = Stream()
    with torch.cuda.stream(other), real_card.turn():
        replay()
    assert other.waited_for is main and gc.isenabled() and not cuda


@pytest.mark.parametrize("where", ["begins", "ends", "launches"])
@pytest.mark.parametrize("first", [True, False])
def test_a_capture_that_fails(cuda, real_card, where, first):
    """The step has its result, a warning says why, and the modules compute from then on."""
    if not first:
        real_card.capture(ones)
    setattr(Graph, where, "operation not permitted\nwhen stream is capturing")
    with pytest.warns(UserWarning, match="operation not permitted when stream.*config.cuda_graphs=False"):
        y, replay = real_card.capture(ones)
    assert torch.equal(y, ones()) and replay is None and not real_card.works
    assert gc.isenabled() and Graph.generator.state == "own" and cuda == ([] if where == "launches" else ["pool"])


@pytest.mark.parametrize("where", ["work", "ends", "launches"])
def test_no_memory_for_a_capture(cuda, real_card, where):
    """A long prompt may have left none: it is tried again, not for ever."""

    def work():
        if where == "work" and torch.cuda.current_stream() is real_card.stream:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return ones()

    real_card.capture(ones)
    setattr(Graph, where, "CUDA error: out of memory")
    for _ in range(2):
        assert real_card.capture(work)[1] is None and real_card.works
    Graph.ends = Graph.launches = None
    real_card.capture(ones)
    setattr(Graph, where, "CUDA error: out of memory")
    for _ in range(2):
        assert real_card.capture(work)[1] is None and real_card.works and not Graph.capturing
    with pytest.warns(UserWarning, match="out of memory"):
        real_card.capture(work)
    assert not real_card.works and gc.isenabled()


@pytest.mark.parametrize("wrong", [3.0, float("nan")])
def test_a_first_replay_that_differs(cuda, real_card, wrong):
    """The modules compute once more: the cache has what the graph wrote."""
    results = iter([ones(), wrong * ones(), ones()])
    with pytest.warns(UserWarning, match="differ from the modules"):
        y, replay = real_card.capture(lambda: next(results))
    assert torch.equal(y, ones()) and replay is None and not real_card.works and next(results, None) is None


def test_a_first_result_that_is_not_finite(cuda, real_card):
    """It says nothing about the graph: the next one is compared."""
    y, replay = real_card.capture(lambda: ones() / 0)
    assert replay is not None and real_card.works and not real_card.tried


def test_an_error_of_the_work_itself(cuda, real_card):
    """As by the modules; the next turn comes."""
    with pytest.raises(ZeroDivisionError), real_card.turn():
        real_card.capture(lambda: 1 / 0)
    with real_card.turn() as has_turn:
        assert has_turn and real_card.works
