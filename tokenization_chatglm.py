"""The ChatGLM2 tokenizer: a SentencePiece BPE with byte fallback, five command tokens, and the chat prompt.

    tokenizer("你好")["input_ids"]  ->  [gMASK] sop 你 好, as [64790, 64792, 36474, 54591]

Text never encodes to a special id: "[gMASK]" or "</s>" in user input become ordinary pieces. Special ids come only
from `get_command` and `build_inputs_with_special_tokens`.
"""

import os
import re
from itertools import accumulate, groupby

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizer

from .chat_template_chatglm import ChatTemplateMixin
from .family_chatglm import COMMANDS, Roles, check_rounds, conversation, tokenizer_family

TYPED_COMMAND = re.compile(r"(\[s?MASK\]|\[gMASK\]|(?<=MASK\])(?:sop|eop)|<\|(?:system|user|assistant|observation)\|>)")


class SPTokenizer:
    """The SentencePiece model, with the commands numbered after its pieces.

    Attributes that converters read: `sp_model` (SentencePieceProcessor), `special_tokens` (command -> id),
    `index_special_tokens` (id -> command), `n_words`, `bos_id`, `eos_id`, `pad_id`.

    Raises:
        ValueError: `model_path` is missing, or not a SentencePiece model (an incomplete download, for example). Not an
            OSError, which `from_pretrained` would replace by a vaguer message.
    """

    def __init__(self, model_path, commands=COMMANDS, shown=()):
        if model_path is None or not os.path.isfile(model_path):
            looked = f" (looked for {model_path})" if model_path else ""
            raise ValueError(
                f"tokenizer.model is missing{looked}. It comes with the weights: copy it into the model directory."
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
        self.special_tokens = {command: size + i for i, command in enumerate(commands)}
        self.index_special_tokens = {i: command for command, i in self.special_tokens.items()}
        self.shown = {self.special_tokens[command]: command for command in shown}
        self.n_words = size + len(commands)
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

    def is_text(self, index):
        """Whether the id gives text: not a command, <unk>, <s>, </s>, nor an id of the padded embedding."""
        pieces = self.sp_model
        return 0 <= index < pieces.vocab_size() and not pieces.IsControl(index) and not pieces.IsUnknown(index)

    def convert_token_to_id(self, token):
        """Return the id of a piece or a command, and that of <unk> for anything else."""
        return self.special_tokens[token] if token in self.special_tokens else self.sp_model.PieceToId(token)

    def convert_id_to_token(self, index):
        """Return the piece of an id, or the name of a command that is shown; "" if the id gives no text."""
        return self.shown.get(index) or (self.sp_model.IdToPiece(index) if self.is_text(index) else "")

    def tokenize(self, s):
        """Split text into pieces."""
        return self.sp_model.EncodeAsPieces(s)

    def encode(self, s, bos=False, eos=False):
        """Return the ids of text, without [gMASK] sop; with <s> in front and </s> at the end if asked for."""
        return [self.bos_id] * bos + self.sp_model.EncodeAsIds(s) + [self.eos_id] * eos

    def decode(self, t, keep_space=False):
        """Return the text of ids, by default without the space that SentencePiece puts in front of every text."""
        ids = [i for i in t if self.is_text(i)]
        newline = [self.sp_model.PieceToId("<0x0A>")] if keep_space else []
        return self.sp_model.DecodeIds(newline + ids)[len(newline) :]

    def decode_tokens(self, tokens):
        """Return the text of pieces."""
        return self.sp_model.DecodePieces(tokens)


BUILT_IN = {"eos_token": ("</s>", 2), "pad_token": ("<unk>", 0), "unk_token": ("<unk>", None)}  # no bos_token


def special_token(name):
    """Properties for a special token and its id: those of the token that the user has named, or the built-in ones."""
    token, token_id = BUILT_IN[name]

    def get_token(self):
        return self.special_tokens_map.get(name) or token

    def get_id(self):
        named = self.special_tokens_map.get(name)
        return self.convert_tokens_to_ids(named) if named else token_id

    properties = [getattr(PreTrainedTokenizer, key, None) for key in (name, f"{name}_id")]  # up to transformers 4.46
    return [property(get, getattr(base, "fset", None)) for get, base in zip((get_token, get_id), properties)]


class ChatGLMTokenizer(ChatTemplateMixin, PreTrainedTokenizer):
    """The ChatGLM2 tokenizer: pads on the left, and returns `position_ids` among its outputs.

    Args:
        vocab_file: path to `tokenizer.model`.
        padding_side: "left", so that the last column of a batch holds the last token of each row.
        **kwargs: as for any transformers tokenizer.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    eos_token, eos_token_id = special_token("eos_token")
    pad_token, pad_token_id = special_token("pad_token")
    unk_token, unk_token_id = special_token("unk_token")

    def __init__(self, vocab_file=None, padding_side="left", clean_up_tokenization_spaces=False, **kwargs):
        folder = os.path.dirname(vocab_file or "")
        self.model_family = kwargs["model_family"] = tokenizer_family(folder, kwargs)
        self.conversation = conversation(self.model_family)
        self.encode_special_tokens = kwargs.pop("encode_special_tokens", False)
        if self.encode_special_tokens:
            self._roles()
        self.tokenizer = SPTokenizer(vocab_file, self.conversation.commands, self.conversation.shown)
        self.tokenizer.rust_decoder = self._rust_decoder
        self._cached_rust_decoder = None, None
        self.vocab_file = vocab_file
        for name, (token, _) in BUILT_IN.items():
            if kwargs.get(name) is None or str(kwargs[name]) == token:
                kwargs.pop(name, None)
        self.split_special_tokens = kwargs.get("split_special_tokens", False)  # for transformers before 4.34
        super().__init__(padding_side=padding_side, clean_up_tokenization_spaces=clean_up_tokenization_spaces, **kwargs)
        self._read_chat_template()
        self.response_template = getattr(self, "response_template", None) or self.conversation.response_template
        self.tokenizer.response_template = self.response_template  # `transformers serve` looks for both there
        self.tokenizer.parse_response = getattr(self, "parse_response", None)

    # Vocabulary

    @property
    def special_tokens_map(self):
        """{"eos_token": ...} of the special tokens that the user has named; like `all_special_ids` empty without."""
        named = getattr(super(), "special_tokens_map_extended", None)  # before transformers 5 this has no properties
        named = super().special_tokens_map if named is None else named
        return {name: list(map(str, token)) if isinstance(token, list) else str(token) for name, token in named.items()}

    @property
    def vocab_size(self):
        """Number of pieces and commands; the model's embedding may be padded to more."""
        return self.tokenizer.n_words

    def get_vocab(self):
        """Return {token: id}: one token for every id below `vocab_size`, and tokens added by the user."""
        return {**self.tokenizer.get_vocab(), **self.get_added_vocab()}

    def get_command(self, token):
        """Return the id of a command: [MASK], [gMASK], [sMASK], sop, eop, ChatGLM3's roles, <bos>, <eos>, <pad>, <unk>.

        Raises:
            ValueError: `token` is not one of them.
        """
        words = self.tokenizer
        commands = {
            **words.special_tokens,
            "<bos>": words.bos_id,
            "<eos>": words.eos_id,
            "<pad>": words.pad_id,
            "<unk>": 0,
        }
        if token not in commands:
            raise ValueError(f"{token!r} is not a command: use one of {', '.join(commands)}.")
        return commands[token]

    def get_prefix_tokens(self):
        """Return the ids in front of every text: [gMASK] sop."""
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    def _convert_token_to_id(self, token):
        return self.tokenizer.convert_token_to_id(token)

    def _convert_id_to_token(self, index):
        """Return the piece of an id; "" for special ids and for ids of the padded embedding."""
        return self.tokenizer.convert_id_to_token(index)

    def _user_added_vocab(self):
        return {token: i for token, i in self.get_added_vocab().items() if i >= self.vocab_size}

    # Text to ids and back

    def tokenize(self, text, pair=None, add_special_tokens=False, split_special_tokens=None, **kwargs):
        """Split `text` into pieces. Tokens added by the user are kept whole; built-in special tokens are plain text.

        split_special_tokens: split added tokens that are special, too; by default as the constructor was told.
        """
        if pair is not None or add_special_tokens:
            raise ValueError("tokenize() takes one text and adds no special tokens; call the tokenizer itself for ids.")
        if getattr(text, "source", None):  # a RenderedChat
            ids = self.apply_chat_template(**text.source, return_dict=False)
            return self.convert_ids_to_tokens(ids[2:])  # behind [gMASK] sop
        check_unicode(text, "the text")
        parts = self._split_at_added_tokens(text, split_special_tokens)
        return [token for part, _, added in parts for token in ([added] if added else self._tokenize(part))]

    def _tokenize(self, text, **kwargs):
        if not self.encode_special_tokens:
            return self.tokenizer.tokenize(text)
        tokens = []
        for i, part in enumerate(TYPED_COMMAND.split(text)):  # every second part is a command
            tokens += [part] if i % 2 else self.tokenizer.tokenize(part)
        return tokens

    def _split_at_added_tokens(self, text, split_special_tokens=None):
        """Yield (part of text, where it begins, the added token that it is or None), without empty parts."""
        added = self._user_added_vocab()
        if not added:
            yield text, 0, None
            return
        split_special_tokens = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        details = {str(token): token for token in self.added_tokens_decoder.values()}  # AddedToken; before 4.34 str
        special = set(self.all_special_tokens)
        patterns = []
        for name in sorted(added, key=len, reverse=True):  # the longest first
            token = details[name]
            if split_special_tokens and (getattr(token, "special", False) or name in special):
                continue
            pattern = "(" + re.escape(name) + ")"
            pattern = rf"(?<!\S){pattern}(?!\S)" if getattr(token, "single_word", False) else pattern
            left = r"\s*" if getattr(token, "lstrip", False) else ""
            right = r"\s*" if getattr(token, "rstrip", False) else ""
            patterns.append(left + pattern + right)
        end = 0
        for match in re.finditer("|".join(patterns), text) if patterns else ():
            if match.start() > end:
                yield text[end : match.start()], end, None
            yield match[0], match.start(), match[match.lastindex]
            end = match.end()
        if end < len(text):
            yield text[end:], end, None

    def convert_tokens_to_string(self, tokens):
        """Join pieces to text; special tokens give no text."""
        return self._decode(self.convert_tokens_to_ids(tokens))

    def _decode(
        self,
        token_ids,
        skip_special_tokens=False,
        clean_up_tokenization_spaces=None,
        spaces_between_special_tokens=False,
        **kwargs,
    ):
        """Decode ids to text. Special ids and ids of the padded embedding give no text.

        The id of the eos or pad token, passed as an int, gives its name: evaluation tools look up "</s>" this way.
        spaces_between_special_tokens: put a space on either side of tokens that were added.
        """
        if isinstance(token_ids, int) and not skip_special_tokens:
            for i, token in ((self.eos_token_id, self.eos_token), (self.pad_token_id, self.pad_token)):
                if token_ids == i:
                    return token
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        hidden = {*self.all_special_ids, *self.tokenizer.shown} if skip_special_tokens else ()
        text = self._text([i for i in ids if i not in hidden], " " if spaces_between_special_tokens else "")
        clean = getattr(self, "clean_up_tokenization", str)  # missing in transformers 5.0
        return clean(text) if clean_up_tokenization_spaces else text

    def _text(self, ids, between=""):
        named, parts = {**{i: token for token, i in self._user_added_vocab().items()}, **self.tokenizer.shown}, []
        ids = (i for i in ids if i in named or self.tokenizer.is_text(i))
        for is_named, run in groupby(ids, key=named.__contains__):
            run = list(run)
            behind_command = parts and parts[-1] in self.tokenizer.special_tokens
            parts += [named[i] for i in run] if is_named else [self.tokenizer.decode(run, keep_space=behind_command)]
        return between.join(parts)

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
        pieces, named = self.tokenizer.sp_model, {*self._user_added_vocab().values(), *self.tokenizer.shown}
        ids = [i for i in ids if self.tokenizer.is_text(i) or i in named]  # others may occur within a character
        for count, i in enumerate(reversed(ids[-3:]), start=1):  # a character has at most four bytes
            if not (self.tokenizer.is_text(i) and pieces.IsByte(i)):
                break
            byte = int(pieces.IdToPiece(i)[1:-1], 16)  # "<0xE4>"
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            if length > 1:
                return ids[:-count] if length > count else ids
            if byte < 0x80:
                break
        return ids

    def answer(self, ids):
        """The text of an answer's ids, up to the last complete character, without the id that ends it."""
        return self.decode(self.without_half_character(self.without_stop(list(ids))))

    def without_stop(self, ids):
        """Return `ids` without the one that ends an answer."""
        return ids[:-1] if ids and ids[-1] in self.stop_ids() else ids

    def stop_ids(self):
        """Ids that end an answer: </s>, and for ChatGLM3 the roles that speak next."""
        return [self.eos_token_id, *map(self.get_command, self.conversation.stops)]

    def encode_continuation(self, text):
        """The ids of text that follows other text: without a space in front, which most models' encoding adds."""
        ids = self.encode(text, add_special_tokens=False)
        return ids[1:] if ids and self.convert_ids_to_tokens(ids[0]) == "▁" else ids

    # Ids to model inputs

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        """Add special tokens: [gMASK] sop A, or [gMASK] sop A B </s> for a pair."""
        ids = self.get_prefix_tokens() + list(token_ids_0)
        return ids if token_ids_1 is None else ids + list(token_ids_1) + [self.get_command("<eos>")]

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        """Return 1 for [gMASK], sop and every other special id, 0 for text."""
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(not self.tokenizer.is_text(i)) for i in token_ids_0]

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

    def build_single_message(self, role, metadata, message):
        """ChatGLM3: the ids of one message.

        Raises:
            ValueError: an unknown role, or another model's tokenizer.
        """
        return self._roles().message(self, role, metadata, message)

    def build_chat_input(self, query, history=None, role="user"):
        """ChatGLM3: the model's inputs for a message after `history`: tensors, int [1, T].

        Raises:
            ValueError: an unknown role, or another model's tokenizer.
        """
        roles = self._roles()
        ids = roles.prompt(self, query, roles.checked(query, history, role), role)
        return self.pad({"input_ids": [ids]}, return_tensors="pt")

    def _roles(self):
        if not isinstance(self.conversation, Roles):
            raise ValueError(
                f"This is the tokenizer of {self.model_family}, whose prompt has no roles. If the weights are "
                'ChatGLM3\'s, write "model_family": "chatglm3" into config.json and tokenizer_config.json.'
            )
        return self.conversation

    def build_prompt(self, query, history=None, system=None):
        """Build the chat prompt.

        Args:
            query: the user's message.
            history: earlier rounds as (query, response), oldest first. A None is written as "None".
            system: instructions in front of the first round, where the chat template has them, too.

        Returns:
            The text; encode it with special tokens to get the model's input.

        Raises:
            ValueError: a malformed history, or text that cannot be encoded.
        """
        check_rounds(history)
        past = ""
        for i, (asked, answered) in enumerate(history or [], start=1):
            check_unicode(f"{answered}", f"the response of round {i}")
            past += self.build_round(i, asked) + f"{answered}\n\n"
        return (f"{system}\n\n" if system else "") + past + self.build_round(len(history or []) + 1, query)

    def build_round(self, number, query):
        """The start of a round, numbered from 1: up to 答： and without an answer."""
        check_unicode(f"{query}", f"the query of round {number}")
        return f"[Round {number}]\n\n问：{query}\n\n答："

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


class DigitsDecoder:
    """Calls `text` with the ids whose digits are the tokens.

    tokenizers' own ByteFallback shows every byte of a run as U+FFFD where one is stray. DecodeStream fails there, as
    the text no longer begins with what it has passed on.
    """

    def __init__(self, text):
        self.text = text

    def decode_chain(self, tokens):
        return [self.text([int(token) for token in tokens])]
