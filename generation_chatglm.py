"""Chat on top of transformers' `generate`, whose loop is used unchanged."""

import contextlib
import contextvars
import copy
import math
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from .attention_chatglm import KEYWORDS, causal_mask
from .blocks_cuda import leave
from .checkpoint_chatglm import shorten
from .family_chatglm import PLACEHOLDER, Roles, with_date
from .streaming_chatglm import stream
from .transformers_compat import CACHE_NAMES, KEEPS_EMPTY_MASKS, DynamicCache, crop_cache, drafts, is_static, take_cache

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

    def get_candidates(self, input_ids, *args, **kwargs):  # 5.0 to 5.2 pass one more argument by position
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

GENERATING = contextvars.ContextVar("generating", default=False)  # `generate` calls that of an assistant model


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Clamps scores to [-10,000, 10,000], nan to the lowest, so that temperature and sampling cannot fail."""

    def __call__(self, input_ids, scores):
        return scores.nan_to_num(nan=-1e4).clamp(-1e4, 1e4)


class ScoreCheck(LogitsProcessor):
    """Ends a generation where nan has replaced all scores of a row, as damaged weights do: they would choose noise.

    nan stays: it is in the cache from then on. So only the first step, every 32nd and the last are looked at.
    """

    def __init__(self, model):
        self.model, self.steps, self.scores, self.warned = model, 0, None, False

    def __call__(self, input_ids, scores):
        self.scores = scores
        if self.steps % 32 == 0:
            self.report()
        self.steps += 1
        return scores

    def report(self):
        """Raise ValueError if all scores of a row are nan; warn once of single ones. -inf excludes a token."""
        if self.scores is None or bool((self.scores.amax(dim=-1) < math.inf).all()):  # nan is not less, either
            return
        numbers = self.scores.nan_to_num(nan=-math.inf, posinf=math.inf)
        if (self.scores.isnan().any(-1) & (numbers.amax(dim=-1) == -math.inf)).any():
            raise nan_scores_error(self.model)
        if not self.warned:
            self.warned = True
            warnings.warn("some scores are nan or inf; chat makes them finite and goes on", stacklevel=2)


def nan_scores_error(model):
    """The error if a step has no score that is a number, with the weights that are at fault."""
    damaged = [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and not weight.is_meta and not weight.isfinite().all()
    ]
    if damaged:
        cause = f"{shorten(damaged)} contain nan or inf. The checkpoint is damaged: download it again."
    else:
        cause = f"its weights are finite, so a value left the range of {model.dtype}. Load it in bfloat16 or float32."
    return ValueError(f"The model's scores are all nan: {cause}")


def conversation_of(tokenizer):
    """How `tokenizer` writes a conversation. Raises ValueError if it is none of this package's."""
    if not hasattr(tokenizer, "conversation"):
        found = type(tokenizer)
        raise ValueError(
            f"tokenizer is a {found.__module__}.{found.__qualname__}, not this package's ChatGLMTokenizer. Load it by "
            "AutoTokenizer.from_pretrained(folder, trust_remote_code=True), from a folder with this package's "
            "tokenization_chatglm.py and tokenizer_config.json."
        )
    return tokenizer.conversation


class ChatMixin:
    """`chat`, `stream_chat` and `stream_generate`, for a model with transformers' `generate`."""

    # Chat

    def chat(
        self, tokenizer, query, history=None, max_length=8192, num_beams=1, do_sample=True, top_p=0.8,
        temperature=0.8, logits_processor=None, max_history_tokens=None, system=None, role="user", **kwargs,
    ):  # fmt: skip
        """Answer `query`.

        Args:
            tokenizer: a ChatGLMTokenizer.
            query: the user's message.
            history: earlier rounds as (query, response), oldest first; not modified. As in the original, a text may be
                empty, and None is written into the prompt as "None". For ChatGLM3 messages, {"role", "content"}.
            max_length: limit on prompt and response tokens together, unless `max_new_tokens` is given.
            num_beams, do_sample, top_p, temperature: as for `generate`. A `generation_config` in the keyword
                arguments replaces these and max_length.
            logits_processor: a list of logits processors; not modified. After them single nan and inf are made finite,
                so that no step raises.
            max_history_tokens: drop the oldest rounds from the prompt until the rest has at most this many tokens.
            system: instructions for the whole conversation, in front of its first round.
            role: for ChatGLM3: "observation" if `query` is what a tool returned, "system" for instructions.
            **kwargs: passed to `generate`. `prompt_lookup_num_tokens=10` saves steps where an answer repeats parts of
                the conversation (see PromptLookup).

        Returns:
            The response, and a new list: the history with (query, response), for ChatGLM3 with both messages. Where
            ChatGLM3 calls a tool, the response is {"name", "parameters"}: pass on the result with role="observation".

        Raises:
            ValueError: a tokenizer of another kind, a malformed query or history, a prompt that exceeds `seq_length`,
                or scores that are all nan.
        """
        history = conversation_of(tokenizer).checked(query, history, role)
        if (kwargs.get("num_return_sequences") or 1) > 1:
            raise ValueError("chat returns one answer: set num_return_sequences=1, or use generate.")
        kept = self._recent_rounds(tokenizer, query, history, max_history_tokens, role)
        inputs = self.build_inputs(tokenizer, query, kept, system, role)
        prompt_length = inputs["input_ids"].shape[1]
        sampling = {"num_beams": num_beams, "do_sample": do_sample, "top_p": top_p, "temperature": temperature}
        settings = self._chat_settings(tokenizer, prompt_length, max_length, sampling, logits_processor, kwargs)
        output = self.generate(**inputs, **settings)
        ids = getattr(output, "sequences", output)[0, prompt_length:].tolist()
        return tokenizer.conversation.answered(self.process_response, tokenizer.answer(ids), query, history, role)

    def stream_chat(
        self, tokenizer, query, history=None, past_key_values=None, max_length=8192, do_sample=True, top_p=0.8,
        temperature=0.8, logits_processor=None, return_past_key_values=False, max_history_tokens=None, system=None,
        role="user", **kwargs,
    ):  # fmt: skip
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
        history = conversation_of(tokenizer).checked(query, history, role)
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        if not held:
            kept = self._recent_rounds(tokenizer, query, history, max_history_tokens, role)
            inputs = self.build_inputs(tokenizer, query, kept, system, role)
        elif max_history_tokens is not None:
            raise ValueError("max_history_tokens cannot drop rounds from a cache: pass it or past_key_values.")
        else:
            drafted = drafts(kwargs, kwargs.get("generation_config") or self.generation_config)
            seen = tokenizer.conversation.prompt(tokenizer, "", history, system=system) if drafted else []
            inputs = self._next_round_inputs(tokenizer, query, history, past_key_values, role, seen)
        prompt_length = inputs["input_ids"].shape[1]
        sampling = {"do_sample": do_sample, "top_p": top_p, "temperature": temperature}
        settings = self._chat_settings(tokenizer, prompt_length, max_length, sampling, logits_processor, kwargs)
        cache = DynamicCache() if past_key_values is None and return_past_key_values else past_key_values
        if cache is not None:
            settings["cache"] = cache

        def output(text):
            result = tokenizer.conversation.answered(self.process_response, text, query, history, role)
            return (*result, cache) if return_past_key_values else result

        shown, text = None, ""
        try:
            with contextlib.closing(self.stream_generate(**inputs, **settings)) as steps:
                for ids in steps:
                    text = tokenizer.answer(ids[0, prompt_length:].tolist())
                    known = output(without_partial_placeholder(text))
                    if known[0] and known != shown and not tokenizer.conversation.is_undecided(text, history):
                        shown = known
                        yield known
        except BaseException:
            if not shown and cache is not None and cache.get_seq_length() > held:
                crop_cache(cache, cache.get_seq_length() - held)
            raise
        known = output(text)
        if known != shown:
            yield known

    def build_inputs(self, tokenizer, query, history=None, system=None, role="user"):
        """The model's inputs for `query` after `history`: input_ids, attention_mask, position_ids, int [1, T]."""
        ids = conversation_of(tokenizer).prompt(tokenizer, query, history or [], role, system)
        return tokenizer.pad({"input_ids": [ids]}, return_tensors="pt").to(self._input_device())

    def build_stream_inputs(self, tokenizer, query, history=None, role="user"):
        """As `build_inputs`, but of the new round alone, to follow a cache that holds `history`."""
        if not history:
            return self.build_inputs(tokenizer, query, role=role)
        ids = conversation_of(tokenizer).next_round(tokenizer, query, history, role)
        return tokenizer.pad({"input_ids": [ids]}, return_tensors="pt").to(self._input_device())

    def _input_device(self):
        """The device for input_ids: the embedding's, or the one that accelerate moves an offloaded embedding to."""
        hook = getattr(self.get_input_embeddings(), "_hf_hook", None)
        target = getattr(hook, "execution_device", None)
        if target is not None:
            return torch.device(target)
        return self.get_input_embeddings().weight.device

    def process_response(self, response, history=None):
        """Strip an answer, and fill its placeholder for the training date.

        With `history`, messages that end with the one that was answered, the text is ChatGLM3's: returns (response,
        history with the answer), see `Roles.response`.
        """
        return with_date(response.strip()) if history is None else Roles().response(response, history)

    @staticmethod
    def _recent_rounds(tokenizer, query, history, max_history_tokens, role="user"):
        """The last rounds of `history` that take at most `max_history_tokens` tokens."""
        if max_history_tokens is None:
            return history

        def tokens(rounds):
            return len(tokenizer.conversation.prompt(tokenizer, query, rounds, role))

        kept, rounds = tokenizer.conversation.split(history)
        alone = tokens(kept)
        while rounds and tokens(kept + sum(rounds, [])) - alone > max_history_tokens:
            rounds = rounds[1:]
        return kept + sum(rounds, [])

    def _next_round_inputs(self, tokenizer, query, history, past_key_values, role, seen):
        """Inputs of a new round after the cache.

        `generate` needs ids for cached tokens, too, but only drafts read them: those `seen`, or zeros.
        """
        new = self.build_stream_inputs(tokenizer, query, history, role)["input_ids"]
        held = self.transformer.count_cached_tokens(past_key_values)
        past = new.new_tensor([seen[-held:]], dtype=torch.long)
        input_ids = F.pad(torch.cat((past, new), dim=1), (held - past.shape[1], 0))
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def _chat_settings(self, tokenizer, prompt_length, max_length, sampling, logits_processor, kwargs):
        """Keyword arguments for `generate`; checks that the answer fits into `seq_length`."""
        if "streamer" in kwargs:
            raise ValueError("chat does not take a streamer: iterate over stream_chat, or pass it to generate.")
        settings, given = dict(kwargs), kwargs.get("generation_config")
        if given is None:
            given = self.generation_config
            settings.update(greedy_at_zero(sampling))
        stops = tokenizer.stop_ids()
        if len(stops) > 1 and not (given is kwargs.get("generation_config") and given.eos_token_id is not None):
            settings.setdefault("eos_token_id", stops)
        if settings.get("stop_strings") or getattr(given, "stop_strings", None):
            settings["tokenizer"] = tokenizer
        new = given.max_new_tokens if kwargs.get("max_new_tokens") is None else kwargs["max_new_tokens"]
        if new is None and "generation_config" not in kwargs:
            limit = self.config.seq_length
            settings["max_length"] = limit if max_length is None else min(max_length, limit)
            if prompt_length >= settings["max_length"]:
                cure = f" or raise max_length up to {limit}" if settings["max_length"] < limit else ""
                raise ValueError(
                    f"The prompt has {prompt_length} tokens, which leaves none for an answer: max_length={max_length}, "
                    f"seq_length={limit}. Shorten the query, drop old rounds (max_history_tokens){cure}."
                )
        settings["logits_processor"] = LogitsProcessorList([*(logits_processor or []), InvalidScoreLogitsProcessor()])
        return settings

    # Generation

    def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
        """As in transformers, but never beyond `seq_length`: there, the answer ends as at max_length.

        Raises:
            ValueError: prompt and the argument max_new_tokens exceed `seq_length`, or all scores are nan; and what
                transformers raises. A max_new_tokens of a generation_config is a limit: servers and pipelines set it.
        """
        if GENERATING.get():  # an assistant's drafts are checked by the model that asks for them
            return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)
        prompts = (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids"))
        length = next((prompt.shape[min(1, prompt.dim() - 1)] for prompt in prompts if prompt is not None), 0)
        generation_config = self._within_seq_length(length, generation_config, kwargs)
        check, processors = ScoreCheck(self), LogitsProcessorList(logits_processor or [])
        clamps = [i for i, item in enumerate(processors) if isinstance(item, InvalidScoreLogitsProcessor)]
        processors.insert(clamps[0] if clamps else len(processors), check)
        outer = GENERATING.set(True)
        try:
            output = super().generate(inputs, generation_config, processors, *args, **kwargs)
        finally:
            GENERATING.reset(outer)
            leave()
        check.report()
        return output

    def _within_seq_length(self, prompt_length, generation_config, kwargs):
        """Lower the limits in `kwargs`, or in the copy of generation_config that is returned, to `seq_length`."""
        given, room = generation_config or self.generation_config, self.config.seq_length - prompt_length
        asked = kwargs.get("max_new_tokens")
        self._check_room(prompt_length, 1 if asked is None else asked)
        new = given.max_new_tokens if asked is None else asked
        longest = given.max_length if kwargs.get("max_length") is None else kwargs["max_length"]
        if new is None and longest in (None, 20):  # transformers' default, in some releases behind the prompt
            new = 20
        if new is not None:
            changes = {"max_new_tokens": room} if new > room else {}
        else:
            changes = {"max_length": self.config.seq_length} if longest > self.config.seq_length else {}
        if changes and generation_config is not None:
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(**changes)
            kwargs.pop(*changes, None)
        else:
            kwargs.update(changes)
        return generation_config

    def _check_room(self, prompt_length, max_new_tokens):
        limit = self.config.seq_length
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} leaves no token for an answer: give 1 or more.")
        if prompt_length + max_new_tokens > limit:
            room = limit - prompt_length
            raise ValueError(
                f"A prompt of {prompt_length} tokens and max_new_tokens={max_new_tokens} exceed seq_length={limit}. "
                "Shorten the prompt" + (f" or lower max_new_tokens to {room}." if room > 0 else ".")
            )

    def stream_generate(
        self, input_ids, generation_config=None, logits_processor=None, stopping_criteria=None,
        prefix_allowed_tokens_fn=None, return_past_key_values=False, **kwargs,
    ):  # fmt: skip
        """Run `generate` and yield the ids so far, int [B, T + step], after every step.

        Takes the arguments of `generate`, with any batch size; finished rows are padded. With
        `return_past_key_values` it yields (ids, cache).

        Raises:
            ValueError: beam search, which cannot be streamed; and as `generate`.
        """
        cache = take_cache(kwargs)
        if return_past_key_values and cache is None:
            cache = DynamicCache()
        if (kwargs.get("num_beams") or getattr(generation_config, "num_beams", 1) or 1) > 1:
            raise ValueError("Beams cannot be streamed: set num_beams=1, or use chat or generate.")
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
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, cache=None, position_ids=None,
        cache_position=None, next_sequence_length=None, is_first_iteration=None, **kwargs,
    ):  # fmt: skip
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
        inputs.update(dict.fromkeys(CACHE_NAMES, cache))  # PEFT looks for the older name
        inputs.update({"attention_mask": attention_mask, "position_ids": position_ids})
        if cache_position is not None:
            inputs["cache_position"] = cache_position
        return {**inputs, **{name: value for name, value in kwargs.items() if name not in unknown}}


def greedy_at_zero(sampling):
    """`sampling` for `generate`: at temperature 0, which transformers rejects, as without do_sample greedy decoding."""
    if sampling["do_sample"] and sampling["temperature"]:
        return sampling
    return {**sampling, "do_sample": False, "top_p": None, "temperature": None}


def without_partial_placeholder(text):
    """Remove an incomplete placeholder from the end of `text`: a later step would have to retract it."""
    for length in range(len(PLACEHOLDER) - 1, 0, -1):
        if text.endswith(PLACEHOLDER[:length]):
            return text[:-length].rstrip()
    return text
