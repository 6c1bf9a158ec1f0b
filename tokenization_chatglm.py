"""The ChatGLM2 tokenizer: a SentencePiece BPE with byte fallback, five command tokens, and the chat prompt.

    tokenizer("你好")["input_ids"]  ->  [gMASK] sop 你 好, as [64790, 64792, 36474, 54591]

Text never encodes to a special id: "[gMASK]" or "</s>" in user input become ordinary pieces. Special ids come only
from `get_command` and `build_inputs_with_special_tokens`.
"""

import inspect
import os
import re
from itertools import accumulate, groupby

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizer

CHAT_TEMPLATE_FILE = "chat_template.jinja"
COMMANDS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


class SPTokenizer:
    """The SentencePiece model, with the commands numbered after its pieces.

    Attributes that converters read: `sp_model` (SentencePieceProcessor), `special_tokens` (command -> id),
    `index_special_tokens` (id -> command), `n_words`, `bos_id`, `eos_id`, `pad_id`.

    Raises:
        ValueError: `model_path` is missing, or not a SentencePiece model (an incomplete download, for example). Not an
            OSError, which `from_pretrained` would replace by a vaguer message.
    """

    def __init__(self, model_path):
        if model_path is None or not os.path.isfile(model_path):
            raise ValueError(
                f"tokenizer.model is missing (looked for {model_path}). It comes with the weights: copy it into the "
                "model directory."
            )
        self.sp_model = SentencePieceProcessor()
        try:
            self.sp_model.Load(str(model_path))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"{model_path} ({os.path.getsize(model_path)} bytes) is not a SentencePiece model; the download may "
                "be incomplete (a Git LFS pointer has about 130 bytes). Download the file again."
            ) from error
        size = self.sp_model.vocab_size()
        self.special_tokens = {command: size + i for i, command in enumerate(COMMANDS)}
        self.index_special_tokens = {i: command for command, i in self.special_tokens.items()}
        self.n_words = size + len(COMMANDS)
        self.bos_id = self.sp_model.bos_id()
        self.eos_id = self.sp_model.eos_id()
        self.pad_id = self.sp_model.unk_id()

    @property
    def _tokenizer(self):
        """The Rust decoder of the ChatGLMTokenizer around it, under the name that `transformers serve` looks up."""
        return self.rust_decoder()

    def get_vocab(self):
        """Return {token: id} of the pieces and the commands."""
        pieces = {self.sp_model.IdToPiece(i): i for i in range(self.sp_model.vocab_size())}
        return {**pieces, **self.special_tokens}


class ChatGLMTokenizer(PreTrainedTokenizer):
    """The ChatGLM2 tokenizer: pads on the left, and returns `position_ids` among its outputs.

    Args:
        vocab_file: path to `tokenizer.model`.
        padding_side: "left", so that the last column of a batch holds the last token of each row.
        **kwargs: as for any transformers tokenizer.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]

    def __init__(self, vocab_file=None, padding_side="left", clean_up_tokenization_spaces=False, **kwargs):
        self.tokenizer = SPTokenizer(vocab_file)
        self.tokenizer.rust_decoder = self._rust_decoder
        self._cached_rust_decoder = None, None
        self.vocab_file = vocab_file
        pieces = self.tokenizer.sp_model
        named = {"unk_token": pieces.unk_id(), "bos_token": pieces.bos_id(), "eos_token": pieces.eos_id()}
        self.builtin_tokens = {**{pieces.IdToPiece(i): i for i in named.values()}, **self.tokenizer.special_tokens}
        for name, i in named.items():
            kwargs[name] = pieces.IdToPiece(i)
        kwargs["pad_token"] = kwargs.get("pad_token") or kwargs["unk_token"]
        super().__init__(padding_side=padding_side, clean_up_tokenization_spaces=clean_up_tokenization_spaces, **kwargs)
        self._read_chat_template()

    def _read_chat_template(self):
        """Read the template from its file, for releases of transformers that do not read it."""
        path = os.path.join(os.path.dirname(self.vocab_file), CHAT_TEMPLATE_FILE)
        if getattr(self, "chat_template", None) is None and os.path.isfile(path):
            with open(path, encoding="utf-8") as f:
                self.chat_template = f.read()

    # Vocabulary

    @property
    def vocab_size(self):
        """Number of pieces and commands; the model's embedding may be padded to more."""
        return self.tokenizer.n_words

    def get_vocab(self):
        """Return {token: id}: one token for every id below `vocab_size`, and tokens added by the user."""
        return {**self.tokenizer.get_vocab(), **self.get_added_vocab()}

    def get_command(self, token):
        """Return the id of a command: [MASK], [gMASK], [sMASK], sop, eop, or <bos>, <eos>, <pad>.

        Raises:
            ValueError: `token` is not one of them.
        """
        words = self.tokenizer
        commands = {**words.special_tokens, "<bos>": words.bos_id, "<eos>": words.eos_id, "<pad>": words.pad_id}
        if token not in commands:
            raise ValueError(f"{token!r} is not a command: use one of {', '.join(commands)}.")
        return commands[token]

    def get_prefix_tokens(self):
        """Return the ids in front of every text: [gMASK] sop."""
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    def _convert_token_to_id(self, token):
        if token in self.builtin_tokens:
            return self.builtin_tokens[token]
        return self.tokenizer.sp_model.PieceToId(token)

    def _convert_id_to_token(self, index):
        """Return the piece of an id; "" for special ids and for ids of the padded embedding."""
        return self.tokenizer.sp_model.IdToPiece(index) if self._is_text(index) else ""

    def _is_text(self, index):
        pieces = self.tokenizer.sp_model
        return 0 <= index < pieces.vocab_size() and not pieces.IsControl(index) and not pieces.IsUnknown(index)

    def _user_added_vocab(self):
        return {token: i for token, i in self.get_added_vocab().items() if i >= self.vocab_size}

    # Text to ids and back

    def tokenize(self, text, pair=None, add_special_tokens=False, **kwargs):
        """Split `text` into pieces. Tokens added by the user are kept whole; built-in special tokens are plain text."""
        if pair is not None or add_special_tokens:
            raise ValueError("tokenize() takes one text and adds no special tokens; call the tokenizer itself for ids.")
        added = self._user_added_vocab()
        if not added:
            return self._tokenize(text)
        longest_first = sorted(added, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
        return [t for part in parts if part for t in ([part] if part in added else self._tokenize(part))]

    def _tokenize(self, text, **kwargs):
        return self.tokenizer.sp_model.EncodeAsPieces(text)

    def convert_tokens_to_string(self, tokens):
        """Join pieces to text; special tokens give no text."""
        return self._decode(self.convert_tokens_to_ids(tokens))

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs):
        """Decode ids to text. Special ids and ids of the padded embedding give no text.

        A single special id, passed as an int, gives its name: evaluation tools look up "</s>" this way.
        """
        if isinstance(token_ids, int) and not skip_special_tokens and token_ids in self.all_special_ids:
            return next((token for token, i in self.builtin_tokens.items() if i == token_ids), "")
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        hidden = set(self.all_special_ids) if skip_special_tokens else ()
        text = self._text([i for i in ids if i not in hidden])
        clean = getattr(self, "clean_up_tokenization", str)  # missing in transformers 5.0
        return clean(text) if clean_up_tokenization_spaces else text

    def _text(self, ids):
        added = {i: token for token, i in self._user_added_vocab().items()}
        runs = groupby((i for i in ids if i in added or self._is_text(i)), key=added.__contains__)
        return "".join(
            "".join(added[i] for i in run) if is_added else self.tokenizer.sp_model.DecodeIds(list(run))
            for is_added, run in runs
        )

    def _rust_decoder(self):
        """A `tokenizers.Tokenizer` that can only decode, for tokenizers' `DecodeStream`: its tokens are ids in digits.

        A stream's text is that of `decode(ids, skip_special_tokens=True)` without the U+FFFD at its end: they may be
        the beginning of a character.
        """
        key = len(self), tuple(self.all_special_ids)
        if self._cached_rust_decoder[0] != key:
            rust = Tokenizer(models.WordLevel(vocab={str(i): i for i in range(len(self))}, unk_token="0"))
            rust.add_special_tokens([str(i) for i in self.all_special_ids])
            rust.decoder = decoders.Decoder.custom(DigitsDecoder(self._text))
            self._cached_rust_decoder = key, rust
        return self._cached_rust_decoder[1]

    def __getstate__(self):
        return {**self.__dict__, "_cached_rust_decoder": (None, None)}  # tokenizers cannot pickle a decoder in Python

    def without_half_character(self, ids):
        """Return `ids` up to the last complete character, without ids that give no text.

        Byte fallback encodes a rare character with one id per byte, so a stream can stop in the middle of one.
        """
        pieces, added = self.tokenizer.sp_model, set(self._user_added_vocab().values())
        ids = [i for i in ids if self._is_text(i) or i in added]  # others may occur within a character
        for count, i in enumerate(reversed(ids[-3:]), start=1):  # a character has at most four bytes
            if not (self._is_text(i) and pieces.IsByte(i)):
                break
            byte = int(pieces.IdToPiece(i)[1:-1], 16)  # "<0xE4>"
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            if length > 1:
                return ids[:-count] if length > count else ids
            if byte < 0x80:
                break
        return ids

    # Ids to model inputs

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """Add special tokens: [gMASK] sop A, or [gMASK] sop A B </s> for a pair."""
        ids = self.get_prefix_tokens() + list(token_ids_0)
        return ids if token_ids_1 is None else ids + list(token_ids_1) + [self.get_command("<eos>")]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        """Return 1 for [gMASK], sop and every other special id, 0 for text."""
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(not self._is_text(i)) for i in token_ids_0]

    def create_token_type_ids_from_sequences(self, token_ids_0, token_ids_1=None):
        """Return zeros: ChatGLM2 has no segments."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def _pad(self, encoded_inputs, *args, **kwargs):
        """Pad one row. `position_ids` count real tokens from 0; padding has position 0."""
        length = len(encoded_inputs["input_ids"])
        mask = encoded_inputs.get("attention_mask", [1] * length)
        positions = encoded_inputs.pop("position_ids", None)
        if positions is None:
            positions = [max(0, count - 1) for count in accumulate(mask)]
        encoded_inputs = super()._pad(encoded_inputs, *args, **kwargs)
        padding = [0] * (len(encoded_inputs["input_ids"]) - length)
        side = kwargs.get("padding_side") or self.padding_side
        encoded_inputs["position_ids"] = padding + positions if side == "left" else positions + padding
        return encoded_inputs

    # Chat

    def build_prompt(self, query, history=None, system=None):
        """Build the chat prompt.

        Args:
            query: the user's message.
            history: earlier rounds as (query, response), oldest first. A None is written as "None".
            system: instructions in front of the first round, where the chat template has them, too.

        Returns:
            The text; encode it with special tokens to get the model's input.
        """
        past = "".join(self.build_round(i, q) + f"{r}\n\n" for i, (q, r) in enumerate(history or [], start=1))
        return (f"{system}\n\n" if system else "") + past + self.build_round(len(history or []) + 1, query)

    def build_round(self, number, query):
        """The start of a round, numbered from 1: up to 答： and without an answer."""
        return f"[Round {number}]\n\n问：{query}\n\n答："

    def apply_chat_template(
        self,
        conversation,
        *args,
        tokenize=True,
        padding=False,
        truncation=False,
        max_length=None,
        return_tensors=None,
        return_dict=None,
        tokenizer_kwargs=None,
        **kwargs,
    ):
        """As in transformers, with [gMASK] sop in front of the ids, which no text encodes to.

        With `add_generation_prompt=True` the ids are those of `build_prompt`. A system message stands where it is
        given. User messages in a row are one question, and an answer without a question gets an empty one. Other roles
        than system, developer, user, assistant and tool, and content that is not text, raise jinja2's TemplateError.
        """
        if kwargs.pop("return_assistant_tokens_mask", False):
            raise ValueError("return_assistant_tokens_mask needs a fast tokenizer; this one is not.")
        text = super().apply_chat_template(conversation, *args, tokenize=False, **kwargs)
        if not tokenize:
            return text
        if return_dict is None:
            return_dict = inspect.signature(PreTrainedTokenizer.apply_chat_template).parameters["return_dict"].default
        inputs = self(
            text,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        return inputs if return_dict else inputs["input_ids"]

    # Files

    def save_vocabulary(self, save_directory, filename_prefix=None):
        """Write `tokenizer.model` to `save_directory` and return the paths written."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = os.path.join(save_directory, prefix + self.vocab_files_names["vocab_file"])
        with open(path, "wb") as f:
            f.write(self.tokenizer.sp_model.serialized_model_proto())
        return (path,)


class DigitsDecoder:
    """Calls `text` with the ids whose digits are the tokens.

    tokenizers' own ByteFallback shows every byte of a run as U+FFFD where one is stray. DecodeStream fails there, as
    the text no longer begins with what it has passed on.
    """

    def __init__(self, text):
        self.text = text

    def decode_chain(self, tokens):
        return [self.text([int(token) for token in tokens])]
