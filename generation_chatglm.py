"""Chat on top of transformers' `generate`, whose loop is used unchanged."""

import contextlib
import contextvars
import math
import queue
import threading
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from .attention_chatglm import KEYWORDS, causal_mask
from .torch_compat import autocast_dtype
from .transformers_compat import CACHE, KEEPS_EMPTY_MASKS, DynamicCache, crop_cache, drafts, is_static, take_cache

# Streaming: from the streamer that generate calls to an iterator


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


# Drafts: tokens that a step checks instead of computing them one by one


class PromptLookup:
    """Drafts what followed the last three tokens where they stood before, in the prompt or in the answer.

    `generate(prompt_lookup_num_tokens=most)` uses it instead of transformers' own, which drafts at every step. This one
    counts how often a look-up is right, also while it drafts nothing. A draft is as long as its last token is more
    likely right than wrong: at best `most` tokens, and none in a text without repetitions.
    """

    requires_model_outputs = False
    TOKENS = 3  # that must be the same
    RATE = 0.25  # weight of the newest look-up in the mean

    def __init__(self, most, longest, eos_token_ids):
        self.most, self.longest, self.eos_token_ids = most, longest, eos_token_ids
        self.ids, self.place_after = [], {}  # the last tokens -> where the next one stands
        self.place, self.right = None, 0.0  # of what is expected next; how likely it comes

    def get_candidates(self, input_ids, **kwargs):
        """Return input_ids, int [1, T], with a draft at the end; and None for its logits."""
        for token in input_ids[0, len(self.ids) :].tolist():
            self._add(token)
        return torch.cat((input_ids, input_ids.new_tensor([self._draft()], dtype=torch.long)), dim=1), None

    def update_candidate_strategy(self, *args, **kwargs):
        """get_candidates sees by itself what became of the last draft."""

    def _add(self, token):
        if self.place is not None:
            hit = self.ids[self.place] == token
            self.right += self.RATE * (hit - self.right)
            self.place = self.place + 1 if hit else None
        self.ids.append(token)
        last = tuple(self.ids[-self.TOKENS :])
        if self.place is None:
            self.place = self.place_after.get(last)
        self.place_after[last] = len(self.ids)

    def _draft(self):
        if self.place is None or self.right < 0.5:
            return []
        length = int(math.log(0.5) / math.log(min(self.right, 0.99)))  # right ** length >= 0.5
        length = min(length, self.most, self.longest - len(self.ids) - 1)
        draft = self.ids[self.place : self.place + max(length, 0)]
        return draft[: next((i for i, token in enumerate(draft) if token in self.eos_token_ids), len(draft))]


# keyword arguments that `generate` passes to `forward`, besides those of the attention
FORWARDED = {"use_cache", "logits_to_keep", "output_attentions", "output_hidden_states"}
ITS_OWN = {"tokenizer"}  # what some releases leave among them, and forward does not need
PLACEHOLDER, TRAINING_DATE = "[[训练时间]]", "2023年"  # the released models write this for the date of their training


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Clamps scores to [-10,000, 10,000], nan to the lowest, so that temperature and sampling cannot fail."""

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
        system=None,
        **kwargs,
    ):
        """Answer `query`.

        Args:
            tokenizer: a ChatGLMTokenizer.
            query: the user's message.
            history: earlier rounds as (query, response), oldest first; not modified. As in the original, a text may be
                empty, and None is written into the prompt as "None".
            max_length: limit on prompt and response tokens together, unless `max_new_tokens` is given.
            num_beams, do_sample, top_p, temperature: as for `generate`. A `generation_config` in the keyword
                arguments replaces these and max_length.
            logits_processor: a list of logits processors; not modified. After them nan and inf are made finite, so
                that no step raises.
            max_history_tokens: drop the oldest rounds from the prompt until the rest has at most this many tokens.
            system: instructions for the whole conversation, in front of its first round.
            **kwargs: passed to `generate`. `prompt_lookup_num_tokens=10` saves steps where an answer repeats parts of
                the conversation (see PromptLookup).

        Returns:
            The response, and the history with (query, response) appended, a new list of tuples.

        Raises:
            ValueError: a malformed query or history, or a prompt that exceeds `seq_length`.
        """
        history = checked_history(query, history)
        if (kwargs.get("num_return_sequences") or 1) > 1:
            raise ValueError("chat returns one answer: set num_return_sequences=1, or use generate.")
        kept = self._recent_rounds(tokenizer, query, history, max_history_tokens)
        inputs = self.build_inputs(tokenizer, query, kept, system)
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
        system=None,
        **kwargs,
    ):
        """Answer `query` step by step. Takes the arguments of `chat` and:

        Args:
            past_key_values: the cache from the previous round, even if that round was interrupted; only the new round
                is then encoded, since the cache holds `system` and `history`. (As in the original, it lacks the last
                token of an interrupted answer.) An empty cache is filled with the whole prompt.
            return_past_key_values: also yield the cache, one object that is updated in place.

        Yields:
            (text so far, history with it[, cache]). Each text extends the previous one and never ends in the middle of
            a character; the last one is complete. A round interrupted before its first text leaves the cache unchanged.
        """
        history = checked_history(query, history)
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        if not held:
            kept = self._recent_rounds(tokenizer, query, history, max_history_tokens)
            inputs = self.build_inputs(tokenizer, query, kept, system)
        elif max_history_tokens is not None:
            raise ValueError("max_history_tokens cannot drop rounds from a cache: pass it or past_key_values.")
        else:
            drafted = drafts(kwargs, kwargs.get("generation_config") or self.generation_config)
            seen = tokenizer.build_prompt("", history, system) if drafted else ""
            inputs = self._next_round_inputs(tokenizer, query, history, past_key_values, seen)
        prompt_length = inputs["input_ids"].shape[1]
        sampling = {"do_sample": do_sample, "top_p": top_p, "temperature": temperature}
        settings = self._chat_settings(tokenizer, prompt_length, max_length, sampling, logits_processor, kwargs)
        cache = DynamicCache() if past_key_values is None and return_past_key_values else past_key_values
        if cache is not None:
            settings["cache"] = cache

        def output(text):
            result = (text, [*history, (query, text)])
            return (*result, cache) if return_past_key_values else result

        shown = whole = ""
        try:
            with contextlib.closing(self.stream_generate(**inputs, **settings)) as steps:
                for ids in steps:
                    whole = self._response(tokenizer, ids[0, prompt_length:].tolist())
                    text = without_partial_placeholder(whole)
                    if text and text != shown:
                        shown = text
                        yield output(text)
        except BaseException:
            if not shown and cache is not None and cache.get_seq_length() > held:
                crop_cache(cache, cache.get_seq_length() - held)
            raise
        if whole != shown or not shown:
            yield output(whole)

    def build_inputs(self, tokenizer, query, history=None, system=None):
        """The model's inputs for `query` after `history`: input_ids, attention_mask, position_ids, int [1, T]."""
        prompt = tokenizer.build_prompt(query, history, system)
        return tokenizer([prompt], return_tensors="pt").to(self._input_device())

    def build_stream_inputs(self, tokenizer, query, history=None):
        """As `build_inputs`, but of the new round alone, to follow a cache that holds `history`."""
        if not history:
            return self.build_inputs(tokenizer, query)
        text = "\n\n" + tokenizer.build_round(len(history) + 1, query)
        new = tokenizer.encode(text, add_special_tokens=False)[1:]  # without the space that every text begins with
        inputs = tokenizer.pad({"input_ids": [new]}, return_tensors="pt")
        return inputs.to(self._input_device())

    def _input_device(self):
        """The device for input_ids: the embedding's, or the one that accelerate moves an offloaded embedding to."""
        hook = getattr(self.get_input_embeddings(), "_hf_hook", None)
        target = getattr(hook, "execution_device", None)
        if target is not None:
            return torch.device(target)
        return self.get_input_embeddings().weight.device

    def process_response(self, response):
        """Strip an answer, and fill its placeholder for the training date."""
        return response.strip().replace(PLACEHOLDER, TRAINING_DATE)

    def _response(self, tokenizer, ids):
        return self.process_response(tokenizer.decode(tokenizer.without_half_character(ids)))

    def _recent_rounds(self, tokenizer, query, history, max_history_tokens):
        """The last rounds of `history` that take at most `max_history_tokens` tokens."""
        if max_history_tokens is None:
            return history

        def tokens(rounds):
            return len(tokenizer(tokenizer.build_prompt(query, rounds))["input_ids"])

        alone = tokens([])
        first = next(
            (i for i in range(len(history)) if tokens(history[i:]) - alone <= max_history_tokens), len(history)
        )
        return history[first:]

    def _next_round_inputs(self, tokenizer, query, history, past_key_values, seen):
        """Inputs of a new round after the cache.

        `generate` needs ids for cached tokens, too, but only drafts read them: those of the text `seen`, or zeros.
        """
        new = self.build_stream_inputs(tokenizer, query, history)["input_ids"]
        held = self.transformer.count_cached_tokens(past_key_values)
        past = tokenizer(seen, return_tensors="pt")["input_ids"].to(new.device)[:, -held:] if seen else new[:, :0]
        input_ids = F.pad(torch.cat((past, new), dim=1), (held - past.shape[1], 0))
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def _chat_settings(self, tokenizer, prompt_length, max_length, sampling, logits_processor, kwargs):
        """Keyword arguments for `generate`; checks that the answer fits into `seq_length`."""
        if "streamer" in kwargs:
            raise ValueError("chat does not take a streamer: iterate over stream_chat, or pass it to generate.")
        settings, given = dict(kwargs), kwargs.get("generation_config")
        if given is None:
            given = self.generation_config
            if not (sampling["do_sample"] and sampling["temperature"]):  # temperature 0 is greedy decoding
                sampling = {**sampling, "do_sample": False, "top_p": None, "temperature": None}
            settings.update(sampling)
        if settings.get("stop_strings") or getattr(given, "stop_strings", None):
            settings["tokenizer"] = tokenizer
        new = kwargs.get("max_new_tokens") or given.max_new_tokens
        if new is not None:
            self._check_room(prompt_length, new)
        elif "generation_config" not in kwargs:
            settings["max_length"] = min(max_length or self.config.seq_length, self.config.seq_length)
            if prompt_length >= settings["max_length"]:
                raise ValueError(
                    f"The prompt has {prompt_length} tokens, which leaves none for an answer: max_length={max_length}, "
                    f"seq_length={self.config.seq_length}. Shorten the query, drop rounds with max_history_tokens, or "
                    "raise max_length up to seq_length."
                )
        settings["logits_processor"] = LogitsProcessorList([*(logits_processor or []), InvalidScoreLogitsProcessor()])
        return settings

    def _check_room(self, prompt_length, max_new_tokens):
        limit = self.config.seq_length
        if prompt_length + max_new_tokens > limit:
            room = limit - prompt_length
            raise ValueError(
                f"A prompt of {prompt_length} tokens and max_new_tokens={max_new_tokens} exceed seq_length={limit}. "
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

        Takes the arguments of `generate`, with any batch size; finished rows are padded. With
        `return_past_key_values` it yields (ids, cache).

        Raises:
            ValueError: prompt and `max_new_tokens` exceed `seq_length`, or beam search, which cannot be streamed.
        """
        new = kwargs.get("max_new_tokens") or getattr(generation_config, "max_new_tokens", None)
        self._check_room(input_ids.shape[1], new or 0)
        cache = take_cache(kwargs)
        if return_past_key_values and cache is None:
            cache = DynamicCache()
        if "streamer" in kwargs:
            raise ValueError("stream_generate does not take a streamer: iterate over it, or use generate.")
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
        ids = input_ids
        try:
            with contextlib.closing(stream(generate, self._input_device())) as steps:
                ids = next(steps).to(input_ids.device)
                for step in steps:
                    ids = torch.cat((ids, step.to(ids.device).view(len(ids), -1)), dim=1)
                    yield (ids, cache) if return_past_key_values else ids
        finally:  # between two steps the cache holds a draft of which the model has refused the end
            if cache is not None and drafts(kwargs, generation_config or self.generation_config):
                surplus = self.transformer.count_cached_tokens(cache) - ids.shape[1] + 1
                if surplus > 0:
                    crop_cache(cache, surplus)

    def _get_candidate_generator(self, generation_config, input_ids, model_kwargs, **kwargs):
        """Draft by PromptLookup where `prompt_lookup_num_tokens` asks for drafts without a model."""
        given = {"generation_config": generation_config, "input_ids": input_ids, "model_kwargs": model_kwargs}
        generator = super()._get_candidate_generator(**given, **kwargs)
        if model_kwargs.get("attention_mask") is None:  # else releases from 5.23 on encode cached tokens once more
            model_kwargs["attention_mask"] = torch.ones_like(input_ids)
        if not hasattr(generator, "num_output_tokens"):
            return generator
        ends = generation_config.eos_token_id
        ends = set() if ends is None else set(torch.as_tensor(ends).flatten().tolist())
        return PromptLookup(generator.num_output_tokens, generation_config.max_length, ends)

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
        """Prepare the arguments of `forward` for one step of `generate`.

        Args:
            input_ids: int [B, n], all ids so far, or one chunk of a long prompt.
            cache, past_key_values: two names of the cache; a Cache under any other name is accepted, too.
            attention_mask: [B, S], or None if there is no padding.
            next_sequence_length: number of new tokens, from transformers 5 on. Earlier releases pass `cache_position`
                [T] instead, and still earlier ones leave it to the cache and the mask.

        Raises:
            ValueError: neither the cache nor the whole prompt was passed, so the ids would be wrong.
        """
        cache = take_cache(kwargs, cache, past_key_values)
        masked = attention_mask is not None and attention_mask.dim() == 2
        seen = None if is_static(cache) else self.transformer.count_cached_tokens(cache)  # unknown for a static cache
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
        if not 1 <= new <= given or given > new + (given if seen is None else seen):  # PEFT's prefix: more are cached
            raise ValueError(
                f"A step of generate got {given} ids, {new} of them new, and a cache of {seen} tokens: it needs the "
                "cache or the whole prompt. (prefill_chunk_size does not work with a P-Tuning prefix.)"
            )
        cache_position = None if cache_position is None else cache_position[-new:]  # 5.3 passes those of all tokens
        if embedded and first:
            inputs = {"inputs_embeds": inputs_embeds[:, -new:]}
        else:
            inputs = {"input_ids": input_ids[:, -new:]}

        if position_ids is not None:  # some releases pass those of the prompt at every step
            places, alone = position_ids.shape[1], new == input_ids.shape[1] and not embedded
            fits = total is None or places == total or (places == new and alone)
            position_ids = position_ids[:, -new:] if fits and not self.config.pre_seq_len else None
        waits = KEEPS_EMPTY_MASKS or is_first_iteration is not None  # these releases and assisted decoding read the GPU
        if masked and waits and attention_mask.all():
            attention_mask = None  # attention without a mask is faster
        if is_static(cache):  # same shapes and strides at every step: compiled once
            x = torch.empty(input_ids.shape[0], new, 0, dtype=self.dtype, device=input_ids.device)
            if position_ids is None:
                position_ids = self.transformer.default_positions(attention_mask, cache.get_seq_length(), x)
            attention_mask = causal_mask(self.config, x, attention_mask, cache, cache_position=cache_position)
            position_ids = position_ids.clone(memory_format=torch.contiguous_format)
            inputs = {name: value.clone(memory_format=torch.contiguous_format) for name, value in inputs.items()}
        kwargs = {name: value for name, value in kwargs.items() if name not in ITS_OWN}
        unknown = [name for name in kwargs if name not in KEYWORDS and name not in FORWARDED]
        if unknown:
            warnings.warn(f"ChatGLM2 ignores {', '.join(unknown)}, which generate passed to it", stacklevel=2)
        inputs.update({CACHE: cache, "attention_mask": attention_mask, "position_ids": position_ids})
        if cache_position is not None:
            inputs["cache_position"] = cache_position
        return {**inputs, **{name: value for name, value in kwargs.items() if name not in unknown}}


def without_partial_placeholder(text):
    """Remove an incomplete placeholder from the end of `text`: a later step would have to retract it."""
    for length in range(len(PLACEHOLDER) - 1, 0, -1):
        if text.endswith(PLACEHOLDER[:length]):
            return text[:-length].rstrip()
    return text


def checked_history(query, history):
    """Copy `history` to a list of tuples. Raises ValueError for what is not text, or None in place of it."""
    if not isinstance(query, (str, type(None))):
        raise ValueError(f"query must be a string, got {query!r}")
    if history is not None and not isinstance(history, (list, tuple)):
        raise ValueError(f"history must be a list of (query, response), got a {type(history).__name__}")
    for i, turn in enumerate(history or []):
        pair = isinstance(turn, (list, tuple)) and len(turn) == 2
        if not pair or not all(isinstance(text, (str, type(None))) for text in turn):
            raise ValueError(f"history[{i}] must be (query, response), two strings, got {turn!r}")
    return [tuple(turn) for turn in history or []]
