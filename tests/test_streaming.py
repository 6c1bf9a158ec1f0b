"""stream_generate: the stream yields what `generate` returns, and its thread always ends."""

import gc
import sys
import threading

import pytest
import torch
from chatglm2.streaming_chatglm import stream
from model_helpers import GREEDY, Forbid, some_ids
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


def threads():
    return {thread for thread in threading.enumerate() if thread is not threading.current_thread()}


def test_stream_matches_generate(make_model, padded_batch):
    """Step t yields the first t new columns of what `generate` returns, for a padded batch."""
    model, (ids, mask, _) = make_model(), padded_batch
    settings = {"attention_mask": mask, **GREEDY}
    whole = model.generate(ids, **settings)
    steps = list(model.stream_generate(ids, **settings))
    assert len(steps) == whole.shape[1] - 9
    for t, step in enumerate(steps, start=1):
        assert torch.equal(step, whole[:, : 9 + t])


def test_stream_stops_at_any_eos_token_and_pads(make_model, padded_batch):
    """Either eos id finishes a row, finished rows are padded, and the stream ends with the last row."""
    model, (ids, mask, _) = make_model(), padded_batch
    free = model.generate(ids, attention_mask=mask, eos_token_id=None, **GREEDY)[:, 9:]
    ends = [free[0, 2].item(), free[1, 4].item()]
    *_, last = model.stream_generate(ids, attention_mask=mask, eos_token_id=ends, pad_token_id=0, **GREEDY)
    assert torch.equal(last, model.generate(ids, attention_mask=mask, eos_token_id=ends, pad_token_id=0, **GREEDY))
    first_end = next(t for t, token in enumerate(last[0, 9:].tolist()) if token in ends)
    assert set(last[0, 9 + first_end + 1 :].tolist()) <= {0}


AFTER_IS_TENSOR = "Tensor" in str(StoppingCriteriaList.__call__.__annotations__.get("return", ""))


def test_stream_with_processors_criteria_and_sampling(make_model, padded_batch):
    """Logits processors and stopping criteria apply; a seeded sample matches `generate`."""
    model, (ids, mask, _) = make_model(), padded_batch

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            done = input_ids.shape[1] >= 9 + 4
            return torch.full((len(input_ids),), done) if AFTER_IS_TENSOR else done

    processors = LogitsProcessorList([Forbid(range(3, 200))])
    *_, last = model.stream_generate(
        ids,
        attention_mask=mask,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([After()]),
        do_sample=False,
        max_new_tokens=12,
    )
    assert last.shape[1] == 9 + 4 and not ((last[:, 9:] >= 3) & (last[:, 9:] < 200)).any()
    settings = {"attention_mask": mask, "do_sample": True, "top_k": 20, "max_new_tokens": 8}
    torch.manual_seed(7)
    whole = model.generate(ids, **settings)
    torch.manual_seed(7)
    *_, streamed = model.stream_generate(ids, **settings)
    assert torch.equal(streamed, whole)


def test_closing_the_stream_stops_generation(make_model):
    """Closing, leaving or dropping the iterator stops generation after the current step; no thread remains."""
    model, counter = make_model(), Forbid([5])
    before = threads()
    ids = torch.tensor([[7, 8, 9]])
    stream = model.stream_generate(ids, logits_processor=LogitsProcessorList([counter]), eos_token_id=None, **GREEDY)
    next(stream), next(stream)
    assert counter.calls == 2  # no step is computed before it is requested
    stream.close()
    for _ in model.stream_generate(ids, **GREEDY):
        break
    gc.collect()
    assert counter.calls == 2 and threads() == before


def test_unread_stream_starts_no_thread(make_model):
    """No thread starts before the first step is requested."""
    before = threads()
    stream = make_model().stream_generate(torch.tensor([[7, 8]]), **GREEDY)
    assert threads() == before
    stream.close()


def test_exceptions_reach_the_consumer(make_model):
    """An exception in a processor is raised from the iterator, and the thread ends."""

    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise ArithmeticError("on purpose")

    before = threads()
    with pytest.raises(ArithmeticError, match="on purpose"):
        list(
            make_model().stream_generate(torch.tensor([[7]]), logits_processor=LogitsProcessorList([Fails()]), **GREEDY)
        )
    assert threads() == before


def test_interrupt_at_any_instruction_never_hangs():
    """Ctrl-C at any instruction of the consumer, or of what it calls, is raised and leaves no lock behind."""
    spared = {method.__code__ for method in (threading.Thread.start, threading.Thread.join, threading.Thread.is_alive)}

    def generate(streamer):
        streamer.put(1)
        streamer.put(2)

    def consume(instruction):
        """Return what the consumer got, or None if it was interrupted before that instruction."""
        got, passed = [], 0

        def trace(frame, event, argument):
            nonlocal passed
            callers, caller = [frame], frame
            while caller and caller.f_code is not stream.__code__:
                caller = caller.f_back
                callers.append(caller)
            if caller is None or spared & {c.f_code for c in callers}:  # those hold locks shared by all threads
                return None
            frame.f_trace_opcodes = True
            passed += event == "opcode"
            if event == "opcode" and passed == instruction:
                raise KeyboardInterrupt
            return trace

        def run():
            nonlocal got
            sys.settrace(trace)
            try:
                got += stream(generate, torch.device("cpu"))
            except KeyboardInterrupt:
                got = None

        consumer = threading.Thread(target=run, daemon=True)
        consumer.start()
        consumer.join(20)
        assert not consumer.is_alive(), f"interrupted at instruction {instruction}, it waits forever"
        return got

    instruction = 1
    while consume(instruction) is None:
        instruction += 1
    assert consume(instruction) == [1, 2] and instruction > 50


def test_beam_search_cannot_be_streamed(make_model):
    """transformers' error for a streamer with beams reaches the consumer."""
    with pytest.raises(ValueError, match="beam"):
        list(make_model().stream_generate(torch.tensor([[7, 8]]), num_beams=2, **GREEDY))


def test_stream_inherits_autocast(make_model):
    """Autocast is per thread in torch; the stream's thread uses the consumer's."""
    model, seen = make_model(), []
    model.transformer.output_layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        list(model.stream_generate(torch.tensor([[7, 8]]), do_sample=False, max_new_tokens=2))
    assert set(seen) == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_autocast_dtype_on_older_torch(monkeypatch):
    """Before 2.4 torch had one function per device for this; the results are the same."""
    from chatglm2.torch_compat import autocast_dtype

    answers = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            with monkeypatch.context() as older:
                older.delattr(torch, "get_autocast_dtype", raising=False)
                answers.append(autocast_dtype("cpu"))
            assert autocast_dtype("cpu") == answers[-1]
    assert answers == [None, torch.bfloat16]


def test_beams_cannot_be_streamed(make_model):
    """An error, whether sampling or not; sampling beams used to end without a token."""
    for sampling in (True, False):
        with pytest.raises(ValueError, match="Beams cannot be streamed: set num_beams=1"):
            next(make_model().stream_generate(some_ids(1), num_beams=2, do_sample=sampling))
