"""The tiny checkpoint: it answers its dialogues, and it is what its README says."""

import json

import pytest
import torch
from chatglm2 import quantization_cpu
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
from conftest import TINY, c_kernels, import_train
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def train():
    """examples/tiny/train.py as a module."""
    return import_train()


@pytest.mark.needs_transformers("4.57", "the Trainer that the training script was written for")
def test_all_dialogues_are_answered(train, tiny_model, tokenizer):
    """Every round of every dialogue, later rounds with their history, greedy: the answer of the data."""
    dialogues = train.read_dialogues()
    assert len(dialogues) >= 150 and {len(rounds) for rounds in dialogues} == {1, 2, 3}
    assert train.wrong_answers(tiny_model, tokenizer, dialogues) == []


@pytest.mark.needs_transformers("4.57", "the Trainer that the training script was written for")
@pytest.mark.parametrize("backend", ["auto", "auto: avx2", "stock", "torch"])
@pytest.mark.parametrize(("bits", "share"), [(8, 1.0), (4, 0.95)])
def test_quantized_answers(train, tokenizer, bits, share, backend, monkeypatch):
    """int8 answers all rounds, int4 at least 95% of them, in the dtype whose activations are rounded too."""
    backend, _, kind = backend.partition(": ")
    if kind:
        library, reason = c_kernels(kind)
        if reason:
            pytest.skip(reason)
        monkeypatch.setattr(quantization_cpu, "load_library", lambda: (library, reason))
    dialogues = train.read_dialogues()
    model = ChatGLMForConditionalGeneration.from_pretrained(TINY).bfloat16().eval().quantize(bits, backend=backend)
    rounds = sum(map(len, dialogues))
    assert len(train.wrong_answers(model, tokenizer, dialogues)) <= (1 - share) * rounds


def test_chat_and_stream_go_through_three_rounds(tiny_model, tokenizer):
    """A dialogue of three rounds by chat, by stream_chat, and by stream_chat on one cache."""
    dialogue = next(rounds for rounds in read_dialogues() if len(rounds) == 3)
    for cached in (False, True):
        history, cache = [], None
        for query, answer in dialogue:
            assert tiny_model.chat(tokenizer, query, history, do_sample=False)[0] == answer
            *_, last = tiny_model.stream_chat(
                tokenizer, query, history, cache, do_sample=False, return_past_key_values=cached
            )
            assert last[0] == answer
            history, cache = last[1], last[2] if cached else None


def read_dialogues():
    with open(TINY / "dialogues.jsonl", encoding="utf-8") as f:
        return [[tuple(turn) for turn in json.loads(line)["turns"]] for line in f]


def test_size():
    """2 to 6 million parameters in at most 12 MB."""
    model = ChatGLMForConditionalGeneration.from_pretrained(TINY)
    assert 2e6 <= sum(p.numel() for p in model.parameters()) <= 6e6
    assert (TINY / "model.safetensors").stat().st_size <= 12e6
    assert {tensor.dtype for tensor in load_file(TINY / "model.safetensors").values()} == {torch.float16}
