"""apply_chat_template: messages to ids, and which of them are an answer to learn."""

import copy
import inspect
import os
import re
from functools import partial

from transformers import BatchEncoding, PreTrainedTokenizer

from .family_chatglm import Roles

CHAT_TEMPLATE_FILE = "chat_template.jinja"
GENERATION_TAG = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")  # around an answer, for training
PAD_OPTIONS = {"pad_to_multiple_of", "padding_side", "return_attention_mask"}


class RenderedChat(str):
    """A chat as text, which the tokenizer encodes to the ids of the chat, whatever `add_special_tokens` is.

    Programs that render a chat first and encode the text later, as vLLM does, expect special tokens in the text, and
    none from the tokenizer. Any other string is plain text.
    """

    source = None  # where the text does not tell the ids: the arguments of apply_chat_template that give them


class ChatTemplateMixin:
    """The chat template of a ChatGLMTokenizer; must precede PreTrainedTokenizer in the bases."""

    def _read_chat_template(self):
        """Read the template from its file, for releases of transformers that do not read it.

        ChatGLM3's is its own: that of ChatGLM2 may have come into the folder with the code.
        """
        path = os.path.join(os.path.dirname(self.vocab_file), CHAT_TEMPLATE_FILE)
        if self.conversation.template:
            if "<|assistant|>" not in str(getattr(self, "chat_template", None)):
                self.chat_template = self.conversation.template
        elif getattr(self, "chat_template", None) is None and os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                self.chat_template = f.read()

    def __call__(self, text=None, *args, **kwargs):
        """As in transformers; a RenderedChat always gets [gMASK] sop, which belong to the chat."""
        if isinstance(text, RenderedChat):
            kwargs["add_special_tokens"] = True
        return super().__call__(text, *args, **kwargs)

    def apply_chat_template(
        self, conversation, tools=None, documents=None, chat_template=None, add_generation_prompt=False,
        tokenize=True, padding=False, truncation=False, max_length=None, return_tensors=None, return_dict=None,
        return_assistant_tokens_mask=False, tokenizer_kwargs=None, **kwargs,
    ):  # fmt: skip
        """As in transformers, with [gMASK] sop in front of the ids, which no text encodes to.

        With `add_generation_prompt=True` the ids are those of `build_prompt`. A system message stands where it is
        given. User messages in a row are one question, and an answer without a question gets an empty one. Other roles
        than system, developer, user, assistant and tool, and content that is not text, raise jinja2's TemplateError.

        A conversation that ends with an answer is one to learn: the answer is encoded by itself, as it is generated,
        and </s> follows it. With `return_assistant_tokens_mask=True`, `assistant_masks` is 1 for the tokens of every
        answer and for that </s>.
        """
        if return_dict is None:
            parameters = inspect.signature(PreTrainedTokenizer.apply_chat_template).parameters
            return_dict = "return_dict" in parameters and parameters["return_dict"].default
        continued = kwargs.get("continue_final_message")
        learned = tokenize and not (add_generation_prompt or continued)
        if return_assistant_tokens_mask and not (learned and return_dict):
            raise ValueError(
                "return_assistant_tokens_mask=True needs return_dict=True and tokenize=True, and neither "
                "add_generation_prompt nor continue_final_message."
            )
        if add_generation_prompt and continued:
            raise ValueError("add_generation_prompt begins an answer, continue_final_message goes on: pass one.")
        if tokenize and isinstance(self.conversation, Roles):
            if chat_template is not None:
                raise ValueError("chat_template: ChatGLM3's ids are made from the messages. Pass tokenize=False too.")
            if documents is not None:
                raise ValueError("documents: ChatGLM3 was not trained with any. Write them into a message.")
            batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
            rows = conversation if batched else [conversation]
            encode = partial(self.conversation.encoded, self, add_generation_prompt=add_generation_prompt, tools=tools)
            ids, masks = zip(*map(encode, rows))
            if continued:
                ids = [row[:-1] if row[-1] == self.eos_token_id else row for row in ids]
            options = padding, truncation, max_length, return_tensors, return_assistant_tokens_mask
            return self._chat_inputs(ids, masks, batched, return_dict, *options, tokenizer_kwargs)
        for name, value in (("tools", tools), ("documents", documents)):
            if value is not None:  # transformers before 4.42 has neither
                kwargs[name] = value
        get_template = getattr(self, "get_chat_template", None)  # before 4.43 there are no templates by name
        template = get_template(chat_template, tools) if get_template else chat_template or self.chat_template

        def render(mark=""):  # the tags themselves are for releases from 4.43 on
            marked = template and GENERATION_TAG.sub(rf"{{%\1 if true %}}{mark}{{% endif \2%}}", template)
            return super(ChatTemplateMixin, self).apply_chat_template(
                conversation,
                chat_template=marked,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **kwargs,
            )

        rendered = render()
        if not tokenize:
            if not isinstance(rendered, str) or not (add_generation_prompt or continued):
                return rendered
            chat = RenderedChat(rendered)
            if isinstance(self.conversation, Roles) and template == self.chat_template and documents is None:
                chat.source = {  # encoded when it is asked for; a copy, as the caller's messages may change
                    "conversation": copy.deepcopy(self.conversation.from_openai(conversation, tools)),
                    "add_generation_prompt": add_generation_prompt,
                    "continue_final_message": bool(continued),
                }
            return chat
        batched = not isinstance(rendered, str)
        rows = [[text] for text in (rendered if batched else [rendered])]
        if learned and GENERATION_TAG.search(template):
            used = "".join(text for (text,) in rows)
            mark = next(char for char in map(chr, range(0xE000, 0xF900)) if char not in used)  # private use
            rendered = render(mark)
            rows = [text.split(mark) for text in (rendered if batched else [rendered])]
        elif return_assistant_tokens_mask:
            raise ValueError("return_assistant_tokens_mask=True: the chat template has no {% generation %} tags.")
        ids, masks = zip(*map(self._chat_ids, rows))
        options = padding, truncation, max_length, return_tensors, return_assistant_tokens_mask
        return self._chat_inputs(ids, masks, batched, return_dict, *options, tokenizer_kwargs)

    def _chat_inputs(self, ids, masks, batched, return_dict, padding, truncation, max_length, return_tensors,
                     return_assistant_tokens_mask, tokenizer_kwargs):  # fmt: skip
        """What apply_chat_template returns for rows of ids, and of 1 where an answer is."""
        options = dict(tokenizer_kwargs or {})
        pad_options = {name: options.pop(name) for name in PAD_OPTIONS & options.keys()}
        cut = {"truncation": truncation, "max_length": max_length}
        encoded = [self.prepare_for_model(row, add_special_tokens=False, **cut, **options) for row in ids]
        columns = {name: [row[name] for row in encoded] for name in encoded[0]}
        lengths = [len(row) for row in columns["input_ids"]]
        out = self.pad(columns, padding=padding, max_length=max_length if padding else None, **pad_options)
        if return_assistant_tokens_mask:
            side = pad_options.get("padding_side") or self.padding_side
            out["assistant_masks"] = [
                self._fit_mask(mask, length, len(row), side)
                for mask, length, row in zip(masks, lengths, out["input_ids"])
            ]
        if return_tensors:
            out.convert_to_tensors(return_tensors)
        elif not batched:
            out = BatchEncoding({name: column[0] for name, column in out.items()})
        return out if return_dict else out["input_ids"]

    def _chat_ids(self, parts):
        """Return (ids, mask) of a conversation; every second part is an answer, whose tokens have 1 in the mask."""
        learned = len(parts) > 1 and parts[-1] == ""  # the conversation ends with an answer
        prompt, answer = (parts[:-2], parts[-2:-1]) if learned else (parts, [])
        ids = self.get_prefix_tokens() + self.convert_tokens_to_ids(self.tokenize("".join(prompt)))
        mask = [0, 0] + self._answer_mask(prompt)
        for text in answer:
            tokens = self.convert_tokens_to_ids(self.tokenize(text)) + [self.eos_token_id]
            ids, mask = ids + tokens, mask + [1] * len(tokens)
        return ids, mask

    def _answer_mask(self, parts):
        """Return 1 for each token of the joined parts that holds a byte of every second part, else 0."""
        if len(parts) == 1:
            return [0] * len(self.tokenize(parts[0]))
        parts = [part.replace("▁", " ") for part in parts]  # SentencePiece's own sign for a space
        text, mask = "".join(parts), []
        flags = b"".join(bytes([i % 2]) * len(part.encode()) for i, part in enumerate(parts))
        for part, start, added in self._split_at_added_tokens(text):
            first = len(text[:start].encode())
            if added:
                mask.append(int(any(flags[first : first + len(part.encode())])))
                continue
            position = first - 1  # SentencePiece puts a space in front of every text
            for piece in self._tokenize(part):
                is_byte = self.tokenizer.sp_model.IsByte(self._convert_token_to_id(piece))
                end = position + (1 if is_byte else len(piece.replace("▁", " ").encode()))
                mask.append(int(any(flags[max(position, first) : max(end, first + 1)])))
                position = end
        return mask

    def _fit_mask(self, mask, length, width, padding_side):
        """Cut the mask to `length` as the ids were, and pad it to `width`."""
        mask = mask[:length] if self.truncation_side == "right" else mask[len(mask) - length :]
        padding = [0] * (width - length)
        return padding + mask if padding_side == "left" else mask + padding
