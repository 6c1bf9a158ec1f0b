"""A conversation with the model that remembers its keys and values, so that a turn encodes only itself."""

import json
import time
from contextlib import closing

from chatglm2.transformers_compat import crop_cache


class Conversation:
    """The rounds so far, and the cache with their keys and values.

    Attributes:
        history: the rounds that the model sees, in the form of its family.
        system: instructions in front of them, or "".
        opening: what a conversation begins with, where tools are offered.
        settings: arguments of `stream_chat`, as temperature.
        first, rate: seconds to the first text of the last answer, and tokens per second after it.
    """

    def __init__(self, model, tokenizer, system="", max_length=8192, tools=None, **settings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.form = tokenizer.conversation
        self.limit = min(max_length, model.config.seq_length)
        self.opening = self.form.offer(tools, system) if tools else []  # the history of a new conversation
        self.restart(self.opening, "" if tools else system)

    def restart(self, history, system):
        """Go on from these rounds, which the next answer encodes again."""
        self.history, self.system, self.cache = history, system, None
        self.before = 0  # tokens in the cache before the last round
        self.first = self.rate = None

    def clear(self):
        self.restart(self.opening, self.system)

    @property
    def rounds(self):
        """[(query, answer)], for `load`; the call of a tool is an answer, and its result a query."""
        return self.form.to_rounds(self.history)

    def load(self, rounds, system):
        """`restart` from [(query, answer)]."""
        self.restart([*self.opening, *self.form.from_rounds(rounds)], system)

    @property
    def context(self):
        """Tokens of the conversation; the cache lacks the newest."""
        cached = self.model.transformer.count_cached_tokens(self.cache)
        return cached + 1 if cached else 0

    def answer(self, query, role="user"):
        """Yield the answer piece by piece. If the iterator is closed early, the history keeps what was yielded."""
        before = self._cached() if role == "user" else self.before  # an observation goes on with its round
        self.first = self.rate = None
        start, text, shown, history = time.monotonic(), "", "", self.history
        steps = self.model.stream_chat(
            self.tokenizer,
            query,
            history,
            self.cache,
            system=self.system,
            role=role,
            max_length=self.limit,
            return_past_key_values=True,
            **self.settings,
        )
        with closing(steps):
            for text, self.history, self.cache in steps:
                now, self.before = time.monotonic(), before
                if self.first is None:
                    self.first, counted, begun = now - start, self.context, now
                elif now > begun:
                    self.rate = (self.context - counted) / (now - begun)
                if isinstance(text, str):
                    yield text[len(shown) :]
                    shown = text
        if isinstance(text, dict):  # the call of a tool, once it is whole
            yield "\n" * bool(shown) + json.dumps(text, ensure_ascii=False)

    def answer_again(self):
        """`answer` for the last query; the round stays as it was if the iterator is closed before the first piece."""
        history = self.history
        kept, rounds = self.form.split(history)
        query, _ = self.form.to_rounds(rounds[-1])[0]
        if self.before and self.cache is not None:
            crop_cache(self.cache, self._cached() - self.before)
        else:
            self.cache = None
        self.history = kept + sum(rounds[:-1], [])
        try:
            yield from self.answer(query)
        finally:
            if len(self.history) < len(history):
                self.restart(history, self.system)

    def make_room(self, query):
        """Drop the oldest rounds if `query` and an answer would exceed the limit; return how many.

        What is left takes half of the limit, because it is encoded again.
        """
        asked = self.settings.get("max_new_tokens")
        room = asked or self.limit // 8
        kept, rounds = self.form.split(self.history)
        fits = self._tokens(query, self.history) + room <= self.limit
        if fits or self._tokens(query, kept) + (asked or 1) > self.limit:  # too much for an empty conversation, too
            return 0
        dropped = 0
        while dropped < len(rounds) and self._tokens(query, kept + sum(rounds[dropped:], [])) + room > self.limit // 2:
            dropped += 1
        self.restart(kept + sum(rounds[dropped:], []), self.system)
        return dropped

    def _cached(self):
        return 0 if self.cache is None else self.cache.get_seq_length()

    def _tokens(self, query, history):
        return len(self.form.prompt(self.tokenizer, query, history, system=self.system))
