"""Chat on top of transformers' `generate`: nothing of its loop is written again here."""

import contextlib
import contextvars
import queue
import threading
import warnings
from functools import partial

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from .attention_chatglm import KEYWORDS, causal_mask
from .torch_compat import autocast_dtype
from .transformers_compat import CACHE, KEEPS_EMPTY_MASKS, DynamicCache, crop_cache, is_static, take_cache

# From generate's pushing to an iterator's pulling


class Closed(Exception):
    """The consumer of a stream has gone; raised inside `generate` to end it."""


class StepStreamer(BaseStreamer):
    """Hands out what `generate` puts, and lets it go on only when more is asked for.

    Both ways are SimpleQueues: unlike a Semaphore, none can be left locked by a Ctrl-C at the wrong moment.
    """

    def __init__(self):
        self.outbox = queue.SimpleQueue()
        self.wanted = queue.SimpleQueue()  # of bool: whether there is still a consumer

    def wait(self):
        if not self.wanted.get():
            raise Closed

    def put(self, value):
        self.outbox.put(value)
        self.wait()

    def end(self):
        """Nothing to flush: `stream` notices the end itself."""


def stream(generate, device):
    """Iterate over what `generate(streamer=...)` puts: the prompt's ids [B, T], then the ids of each step.

    `generate` runs in a thread of its own, in turns with the consumer: never both at once. Closing the iterator, or a
    Ctrl-C wherever it lands, ends the thread after the step in progress; an exception in the thread is raised to the
    consumer.
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
        if thread.is_alive():  # not so where start() itself was interrupted
            thread.join()


def thread_state(device):
    """What torch keeps per thread, taken from this one: inference mode, autocast, the CUDA device and stream."""
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


# what `generate` hands on to `forward` besides the attention's keywords
FORWARDED = {"use_cache", "logits_to_keep", "output_attentions", "output_hidden_states"}
PLACEHOLDER, TRAINING_DATE = "[[训练时间]]", "2023年"  # what the released models write for the date of their training


class FiniteScores(LogitsProcessor):
    """Scores between -10,000 and 10,000, nan lowest, so that dividing by a temperature and sampling cannot fail."""

    def __call__(self, input_ids, scores):
        return scores.nan_to_num(nan=-1e4).clamp(-1e4, 1e4)


class ChatMixin:
    """`chat`, `stream_chat` and `stream_generate`, for a model with transformers' `generate`."""

    # Chat

    def chat(
        self,
        tokenizer,
        query,
        history=None,
        max_length=8192,
        num_beams=1,
        do_sample=True,
        top_p=0.8,
        temperature=0.8,
        logits_processor=None,
        max_history_tokens=None,
        **kwargs,
    ):
        """Answer `query`.

        Args:
            tokenizer: a ChatGLMTokenizer.
            query: what the user says, not empty.
            history: (query, response) of the rounds before, oldest first; it is not changed.
            max_length: tokens of prompt and response together, where `max_new_tokens` is not given.
            num_beams, do_sample, top_p, temperature: as for `generate`. A `generation_config` among the keyword
                arguments stands in the place of these and of max_length.
            logits_processor: a list of processors of scores; it is not changed. Scores of nan and inf are made finite
                behind them, so that no step raises.
            max_history_tokens: drop the oldest rounds from the prompt until those kept take so many tokens or fewer.
            **kwargs: for `generate`.

        Returns:
            response (text), history with (query, response) at its end: a new list of tuples.

        Raises:
            ValueError: an empty query, a history of another form, a prompt that would pass `seq_length`.
        """
        history = checked_history(query, history)
        if (kwargs.get("num_return_sequences") or 1) > 1:
            raise ValueError("chat gives one answer: leave num_return_sequences at 1, or use generate.")
        kept = self._recent_rounds(tokenizer, query, history, max_history_tokens)
        inputs = self.build_inputs(tokenizer, query, kept)
        prompt_length = inputs["input_ids"].shape[1]
        sampling = {"num_beams": num_beams, "do_sample": do_sample, "top_p": top_p, "temperature": temperature}
        settings = self._chat_settings(tokenizer, prompt_length, max_length, sampling, logits_processor, kwargs)
        output = self.generate(**inputs, **settings)
        ids = getattr(output, "sequences", output)[0, prompt_length:].tolist()
        response = self._response(tokenizer, ids)
        return response, [*history, (query, response)]

    def stream_chat(
        self,
        tokenizer,
        query,
        history=None,
        past_key_values=None,
        max_length=8192,
        do_sample=True,
        top_p=0.8,
        temperature=0.8,
        logits_processor=None,
        return_past_key_values=False,
        max_history_tokens=None,
        **kwargs,
    ):
        """Answer `query` step by step; arguments as for `chat`.

        Args:
            past_key_values: the cache that the round before handed out, also if that round was cut off; only the new
                round is encoded then. (As in the original, the last token of an answer that was cut off is not in it.)
                An empty cache is filled with the whole prompt.
            return_past_key_values: hand out the cache, too; it is one object, extended in place.

        Yields:
            (text so far, history with it[, cache]). The text is extended from step to step, never ends in half a
            character, and the last one is whole. A round that is broken off before its first text leaves the cache as
            it was.
        """
        history = checked_history(query, history)
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        if not held:
            kept = self._recent_rounds(tokenizer, query, history, max_history_tokens)
            inputs = self.build_inputs(tokenizer, query, kept)
        elif max_history_tokens is not None:
            raise ValueError("max_history_tokens cannot drop rounds from a cache: leave out past_key_values or it.")
        else:
            inputs = self._next_round_inputs(tokenizer, query, history, past_key_values)
        prompt_length = inputs["input_ids"].shape[1]
        sampling = {"do_sample": do_sample, "top_p": top_p, "temperature": temperature}
        settings = self._chat_settings(tokenizer, prompt_length, max_length, sampling, logits_processor, kwargs)
        cache = DynamicCache() if past_key_values is None and return_past_key_values else past_key_values
        if cache is not None:
            settings["cache"] = cache

        def handed_out(text):
            result = (text, [*history, (query, text)])
            return (*result, cache) if return_past_key_values else result

        shown = whole = ""
        try:
            for ids in self.stream_generate(**inputs, **settings):
                whole = self._response(tokenizer, ids[0, prompt_length:].tolist())
                text = without_half_placeholder(whole)
                if text and text != shown:
                    shown = text
                    yield handed_out(text)
        except BaseException:
            if not shown and cache is not None and cache.get_seq_length() > held:
                crop_cache(cache, cache.get_seq_length() - held)
            raise
        if whole != shown or not shown:
            yield handed_out(whole)

    def build_inputs(self, tokenizer, query, history=None):
        """The model's inputs for `query` after `history`: input_ids, attention_mask, position_ids, int [1, T]."""
        prompt = tokenizer.build_prompt(query, history)
        return tokenizer([prompt], return_tensors="pt").to(self._input_device())

    def _input_device(self):
        """Where ids go: the embedding's device, or the one that accelerate will bring an offloaded embedding to."""
        hook = getattr(self.get_input_embeddings(), "_hf_hook", None)
        target = getattr(hook, "execution_device", None)
        if target is not None:
            return torch.device(target)
        return self.get_input_embeddings().weight.device

    def process_response(self, response):
        """The text of an answer as it is shown: stripped, and its placeholder for the training date filled."""
        return response.strip().replace(PLACEHOLDER, TRAINING_DATE)

    def _response(self, tokenizer, ids):
        return self.process_response(tokenizer.decode(tokenizer.without_half_character(ids)))

    def _recent_rounds(self, tokenizer, query, history, max_history_tokens):
        """The newest rounds of `history` that take at most `max_history_tokens` tokens."""
        if max_history_tokens is None:
            return history

        def tokens(rounds):
            return len(tokenizer(tokenizer.build_prompt(query, rounds))["input_ids"])

        alone = tokens([])
        first = next(
            (i for i in range(len(history)) if tokens(history[i:]) - alone <= max_history_tokens), len(history)
        )
        return history[first:]

    def _next_round_inputs(self, tokenizer, query, history, past_key_values):
        """The new round behind the cache. `generate` wants ids for the cached tokens as well, and never reads them."""
        text = "\n\n" + tokenizer.build_round(len(history) + 1, query)
        new = tokenizer.encode(text, add_special_tokens=False)[1:]  # less the space that every text begins with
        cached = [tokenizer.pad_token_id] * self.transformer.count_cached_tokens(past_key_values)
        input_ids = torch.tensor([cached + new], device=self._input_device())
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def _chat_settings(self, tokenizer, prompt_length, max_length, sampling, logits_processor, kwargs):
        """Keyword arguments for `generate`; checks that the answer's length fits the model."""
        if "streamer" in kwargs:
            raise ValueError("chat has no use for a streamer: iterate over stream_chat, or give it to generate.")
        settings, given = dict(kwargs), kwargs.get("generation_config")
        if given is None:
            given = self.generation_config
            settings.update(sampling if sampling["do_sample"] else {**sampling, "top_p": None, "temperature": None})
        if settings.get("stop_strings") or getattr(given, "stop_strings", None):
            settings["tokenizer"] = tokenizer
        new = kwargs.get("max_new_tokens") or given.max_new_tokens
        if new is not None:
            self._check_room(prompt_length, new)
        elif "generation_config" not in kwargs:
            settings["max_length"] = min(max_length or self.config.seq_length, self.config.seq_length)
            if prompt_length >= settings["max_length"]:
                raise ValueError(
                    f"The prompt has {prompt_length} tokens, and max_length={max_length}, with "
                    f"seq_length={self.config.seq_length}, leaves none for an answer. Shorten the query, drop rounds "
                    "with max_history_tokens, or raise max_length up to seq_length."
                )
        settings["logits_processor"] = LogitsProcessorList([*(logits_processor or []), FiniteScores()])
        return settings

    def _check_room(self, prompt_length, max_new_tokens):
        limit = self.config.seq_length
        if prompt_length + max_new_tokens > limit:
            room = limit - prompt_length
            raise ValueError(
                f"A prompt of {prompt_length} tokens and max_new_tokens={max_new_tokens} pass seq_length={limit}. "
                "Shorten the prompt" + (f" or lower max_new_tokens to {room}." if room > 0 else ".")
            )

    # Generation

    def stream_generate(
        self,
        input_ids,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        return_past_key_values=False,
        **kwargs,
    ):
        """Run `generate` and yield the ids so far, int [B, T + step], after every step.

        Arguments are those of `generate`, and any batch size will do; rows that have ended are padded. With
        `return_past_key_values` it yields (ids, cache).

        Raises:
            ValueError: prompt and `max_new_tokens` together pass `seq_length`; beams, which cannot be streamed.
        """
        new = kwargs.get("max_new_tokens") or getattr(generation_config, "max_new_tokens", None)
        self._check_room(input_ids.shape[1], new or 0)
        cache = take_cache(kwargs)
        if return_past_key_values and cache is None:
            cache = DynamicCache()
        if "streamer" in kwargs:
            raise ValueError("stream_generate is the stream: leave out the streamer, or give it to generate.")
        generate = partial(
            self.generate,
            input_ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            cache=cache,
            **kwargs,
        )
        with contextlib.closing(stream(generate, self._input_device())) as steps:
            ids = next(steps).to(input_ids.device)
            for step in steps:
                ids = torch.cat((ids, step.to(ids.device).view(len(ids), -1)), dim=1)
                yield (ids, cache) if return_past_key_values else ids

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        cache=None,
        position_ids=None,
        cache_position=None,
        next_sequence_length=None,
        is_first_iteration=None,
        **kwargs,
    ):
        """What `forward` gets at a step of `generate`.

        Args:
            input_ids: int [B, n]: all ids so far, or those of one part of a long prompt.
            cache, past_key_values: two names of the cache; a Cache is taken for it under any other name, too.
            attention_mask: [B, S], or None where all tokens are real.
            next_sequence_length: how many tokens are new, from transformers 5 on; before, `cache_position` [T] has as
                many places, and earlier yet the cache and the mask tell.

        Raises:
            ValueError: the step would get neither the cache nor the whole prompt, and so compute other ids.
        """
        cache = take_cache(kwargs, cache, past_key_values)
        masked = attention_mask is not None and attention_mask.dim() == 2
        seen = None if is_static(cache) else self.transformer.count_cached_tokens(cache)  # not asked of a static cache
        embedded = 0 if inputs_embeds is None else inputs_embeds.shape[1]
        first = is_first_iteration
        if first is None:
            first = not seen if seen is not None else cache_position is not None and len(cache_position) == embedded
        given = embedded if embedded and first else input_ids.shape[1]
        if seen is not None and (masked or self.config.pre_seq_len):  # generate does not count a prefix
            new = (attention_mask.shape[1] if masked else given if first else given + embedded) - seen
        elif next_sequence_length is not None:
            new = next_sequence_length
        else:
            new = given if cache_position is None else cache_position.shape[0]
        total = attention_mask.shape[1] if masked else None if seen is None else seen + new
        if new < 1 or total is not None and given not in (new, total, total - embedded):
            raise ValueError(
                f"A step of generate got {given} ids, {new} of them new, and a cache of {seen} tokens: it needs the "
                "cache or the whole prompt. (prefill_chunk_size does not go with the prefix of P-Tuning.)"
            )
        if embedded and first:
            inputs = {"inputs_embeds": inputs_embeds[:, -new:]}
        else:
            inputs = {"input_ids": input_ids[:, -new:]}

        if position_ids is not None:  # some releases hand the prompt's own to every step
            places, alone = position_ids.shape[1], new == input_ids.shape[1] and not embedded
            fits = total is None or places == total or (places == new and alone)
            position_ids = position_ids[:, -new:] if fits and not self.config.pre_seq_len else None
        if masked and KEEPS_EMPTY_MASKS and attention_mask.all():  # those releases ask the GPU at every step anyway
            attention_mask = None  # attention without a mask is faster
        if is_static(cache):  # the same shapes and strides at every step, so that it is compiled once
            x = torch.empty(input_ids.shape[0], new, 0, dtype=self.dtype, device=input_ids.device)
            if position_ids is None:
                position_ids = self.transformer.default_positions(attention_mask, cache.get_seq_length(), x)
            attention_mask = causal_mask(self.config, x, attention_mask, cache, cache_position=cache_position)
            position_ids = position_ids.clone(memory_format=torch.contiguous_format)
            inputs = {name: value.clone(memory_format=torch.contiguous_format) for name, value in inputs.items()}
        unknown = [name for name in kwargs if name not in KEYWORDS and name not in FORWARDED]
        if unknown:
            warnings.warn(f"generate gave the model {', '.join(unknown)}, which ChatGLM2 does not know", stacklevel=2)
        inputs.update({CACHE: cache, "attention_mask": attention_mask, "position_ids": position_ids})
        if cache_position is not None:
            inputs["cache_position"] = cache_position
        return {**inputs, **{name: value for name, value in kwargs.items() if name not in unknown}}


def without_half_placeholder(text):
    """`text` less an unfinished placeholder at its end, which would be taken back once it is whole."""
    for length in range(len(PLACEHOLDER) - 1, 0, -1):
        if text.endswith(PLACEHOLDER[:length]):
            return text[:-length].rstrip()
    return text


def checked_history(query, history):
    """`history` as a new list of tuples. Raises ValueError where the query is empty or a round is no pair of texts."""
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"query={query!r} is empty or no text: say something.")
    if history is not None and not isinstance(history, (list, tuple)):
        raise ValueError(f"history is a {type(history).__name__}: give a list of (query, response) pairs.")
    for i, turn in enumerate(history or []):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"history[{i}] is {turn!r}: give (query, response), a pair of texts.")
    return [tuple(turn) for turn in history or []]
