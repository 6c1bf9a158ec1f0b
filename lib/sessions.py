"""Conversations of several users, each with its keys and values, so that a turn encodes only itself."""

import threading
import time
from collections import OrderedDict
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from chatglm2.generation_chatglm import InvalidScoreLogitsProcessor, greedy_at_zero, without_partial_placeholder
from chatglm2.transformers_compat import DynamicCache, crop_cache
from transformers import LogitsProcessorList


class Progress(NamedTuple):
    """An answer so far."""

    text: str
    encoded: int  # tokens of the prompt that were not in the cache
    context: int  # tokens of the conversation, with this answer
    first: float  # seconds to the first token
    rate: float  # tokens per second after it


@dataclass
class Session:
    """A cache, and what it stands for."""

    cache: DynamicCache = field(default_factory=DynamicCache)
    ids: list = field(default_factory=list)  # of the conversation; the cache lacks the newest
    system: str = ""
    turns: list = field(default_factory=list)  # (query, answer)
    ends: dict = field(default_factory=dict)  # number of turns -> number of ids, where the ids are known

    def prompt(self, tokenizer, query, history, system, tools):
        """(the ids of a prompt, the number of turns whose ids were known).

        An answer keeps the ids that were generated: its text may split into others.
        """
        same = common_length(self.turns, history) if system == self.system else 0
        known = max((turns for turns in self.ends if turns <= same), default=0)
        conversation = tokenizer.conversation
        if not known:
            past = conversation.from_rounds(history)
            role = conversation.next_role(past)
            if tools:
                past, system = conversation.offer(tools, system) + list(past), ""
            return conversation.prompt(tokenizer, query, past, role, system), 0
        return self.ids[: self.ends[known]] + conversation.after(tokenizer, query, history, known), known

    def crop(self, ids, held):
        """Leave what `ids` begin with, but not all of them, of the `held` tokens in the cache; return their number."""
        same = common_length(self.ids[:held], ids[:-1])
        if held > same:
            crop_cache(self.cache, held - same)
        return same

    def nbytes(self):
        """Memory of the cache, with its room to grow."""
        if hasattr(self.cache, "layers"):
            held = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        else:  # delete with 4.53
            held = [*self.cache.key_cache, *self.cache.value_cache]
        return sum(tensor.untyped_storage().nbytes() for tensor in held if torch.is_tensor(tensor))


class Sessions:
    """The conversations with a model, by key. Idle ones beyond a limit are dropped, those used last kept.

    Args:
        most: number of idle sessions.
        most_bytes: memory of their caches together.
        tools: what ChatGLM3 may call. The call is an answer, and the next message is what the tool returned.

    Raises:
        ValueError: tools for a model that calls none.
    """

    def __init__(self, model, tokenizer, most=16, most_bytes=2 << 30, tools=None):
        self.model, self.tokenizer, self.most, self.most_bytes = model, tokenizer, most, most_bytes
        self.tools = tools
        if tools:
            tokenizer.conversation.offer(tools)
        self.idle, self.busy = OrderedDict(), {}
        self.lock = threading.Lock()

    def drop(self, key):
        """Forget a session. If it is being answered, its cache goes with the answer."""
        with self.lock:
            self.idle.pop(key, None)
            self.busy.pop(key, None)

    def stream(self, key, query, history, system="", **settings):
        """Answer `query`; yield a Progress whenever there is more text. `settings` are those of `stream_chat`.

        A lost session is encoded again. Closing the iterator keeps what was generated so far.
        """
        with self.lock:
            session = self.busy[key] = self.idle.pop(key, None) or Session()
        intact = False
        try:
            yield from self._answer(session, query, history, system, **settings)
            intact = True
        except (GeneratorExit, ValueError):  # ValueError: raised by a check, before the network has run
            intact = True
            raise
        finally:
            with self.lock:
                if self.busy.get(key) is session:  # neither dropped nor asked again at the same time
                    del self.busy[key]
                    if intact:
                        self.idle[key] = session
                while self.idle and not self._fits():
                    self.idle.popitem(last=False)

    def _fits(self):
        return len(self.idle) <= self.most and sum(s.nbytes() for s in self.idle.values()) <= self.most_bytes

    def _answer(self, session, query, history, system, temperature=0.8, top_p=0.8, logits_processor=(), **settings):
        model, tokenizer, start = self.model, self.tokenizer, time.monotonic()
        prompt, known = session.prompt(tokenizer, query, history, system, self.tools)
        cached = session.crop(prompt, model.transformer.count_cached_tokens(session.cache))
        session.ids, session.system, session.turns = prompt, system, history
        session.ends = {turns: end for turns, end in session.ends.items() if turns <= known}
        steps = model.stream_generate(
            torch.tensor([prompt], device=model.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
            past_key_values=session.cache,
            logits_processor=LogitsProcessorList([*logits_processor, InvalidScoreLogitsProcessor()]),
            **greedy_at_zero({"do_sample": True, "temperature": temperature, "top_p": top_p}),
            **settings,
        )
        shown, whole, first, progress = None, "", 0, None
        try:
            with closing(steps):
                for ids in steps:
                    session.ids = ids[0].tolist()
                    now, count = time.monotonic(), len(session.ids) - len(prompt)
                    first = first or now
                    answer = tokenizer.without_half_character(tokenizer.without_stop(session.ids[len(prompt) :]))
                    whole = model.process_response(tokenizer.decode(answer))
                    rate = (count - 1) / (now - first) if count > 1 else 0.0
                    progress = Progress(
                        without_partial_placeholder(whole), len(prompt) - cached, len(session.ids), first - start, rate
                    )
                    if progress.text and progress.text != shown:
                        shown = progress.text
                        yield progress
            if whole != shown:
                shown = whole
                yield progress._replace(text=whole)
        finally:
            if shown is not None:
                session.turns = [*history, (query, shown)]
                if shown == whole and answer == session.ids[len(prompt) : len(prompt) + len(answer)]:
                    session.ends[len(session.turns)] = len(prompt) + len(answer)


def common_length(a, b):
    """The number of items that two lists begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
