"""The ChatGLM2 tokenizer: a SentencePiece BPE with byte fallback, five command tokens, and the chat prompt.

    tokenizer("你好")["input_ids"]  ->  [gMASK] sop 你 好, as [64790, 64792, 36474, 54591]

Text never encodes to a special id: "[gMASK]" or "</s>" in user input become ordinary pieces. Special ids come only
from `get_command` and `build_inputs_with_special_tokens`.
"""

import inspect
import os
import re
from functools import cached_property
from itertools import accumulate, groupby

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models
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

    @cached_property
    def _tokenizer(self):
        """A decoder of the same text in Rust, under the name that `transformers serve` looks up."""
        vocab, silent = self.get_vocab(), (self.sp_model.unk_id(), self.bos_id, self.eos_id)
        hidden = [piece for piece, i in vocab.items() if i in self.index_special_tokens or i in silent]
        return rust_decoder(vocab, hidden)

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
        check_unicode(text, "the text")
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
        added = {i: token for token, i in self._user_added_vocab().items()}
        hidden = set(self.all_special_ids) if skip_special_tokens else ()
        ids = [i for i in ids if self._is_text(i) or (i in added and i not in hidden)]
        runs = groupby(ids, key=added.__contains__)
        text = "".join(
            "".join(added[i] for i in run) if is_added else self.tokenizer.sp_model.DecodeIds(list(run))
            for is_added, run in runs
        )
        clean = getattr(self, "clean_up_tokenization", str)  # missing in transformers 5.0
        return clean(text) if clean_up_tokenization_spaces else text

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

    def build_prompt(self, query, history=None):
        """Build the chat prompt.

        Args:
            query: the user's message.
            history: earlier rounds as (query, response), oldest first.

        Returns:
            The text; encode it with special tokens to get the model's input.
        """
        rounds = [*(history or []), (query, None)]
        return "".join(self.build_round(i, q, r) for i, (q, r) in enumerate(rounds, start=1))

    def build_round(self, number, query, response=None):
        """One round of the prompt, numbered from 1; it ends with 答： if `response` is None."""
        check_unicode(f"{query}", f"the query of round {number}")
        check_unicode(f"{response}", f"the response of round {number}")
        return f"[Round {number}]\n\n问：{query}\n\n答：" + ("" if response is None else f"{response}\n\n")

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

        With `add_generation_prompt=True` the ids are those of `build_prompt`. An optional system message comes before
        round 1; user and assistant alternate. Any other order raises jinja2's TemplateError.
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


def check_unicode(text, what):
    """Raise ValueError if `text` holds half of a surrogate pair, which JSON can spell ("\\ud800") but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        i = error.start
        before = text[max(i - 20, 0) : i]
        raise ValueError(
            f"{what} cannot be encoded in UTF-8: character {i} is {text[i]!r}, half of a surrogate pair, after "
            f"{before!r}. Remove it."
        ) from None


def rust_decoder(vocab, special_tokens):
    """Build a `tokenizers.Tokenizer` that decodes ids as SentencePiece does. It has no merges, so it cannot encode.

    Args:
        vocab: {token: id}; pieces use "▁" for a space and "<0xE4>" for a byte.
        special_tokens: the tokens of `vocab` that give no text with `skip_special_tokens`.

    Ids beyond `vocab`, those of tokens added by the user, give no text.
    """
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
