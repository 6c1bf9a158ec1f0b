"""Samples for calibration from a file: conversations, or any text."""

import random
from pathlib import Path

from jsonl import json_lines, text_lines

TOKENS = 512  # of a piece of text


def read_samples(path, tokenizer, count=128):
    """Up to `count` samples for `quantize(calibration=...)`, chosen at random, the same ones every time.

    A .jsonl file gives conversations, {"messages": [{"role": ..., "content": ...}, ...]} a line, as fine-tuning reads
    them. Any other file is text: documents between blank lines, in pieces of up to TOKENS tokens.

    Raises ValueError, with the file's name, for what is neither, and OSError.
    """
    chance = random.Random(0)
    if Path(path).suffix == ".jsonl":
        samples = [_messages(path, number, record) for number, record in json_lines(path)]
        chance.shuffle(samples)
    else:
        documents = "".join(line for _, line in text_lines(path)).split("\n\n")
        documents = [text for text in map(str.strip, documents) if text]
        chance.shuffle(documents)
        samples = _pieces(documents, tokenizer, 4 * count)
        chance.shuffle(samples)
    if not samples:
        raise ValueError(f"{path} is empty: give a few hundred samples of what the model will read and write.")
    return samples[:count]


def _messages(path, number, record):
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'{path}, line {number}: expected {{"messages": [{{"role": ..., "content": ...}}, ...]}}')
    return messages


def _pieces(documents, tokenizer, enough):
    """The ids of pieces of documents, each with [gMASK] sop in front, until there are `enough`."""
    prefix, pieces = tokenizer.get_prefix_tokens(), []
    size = TOKENS - len(prefix)
    for text in documents:
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces += [prefix + ids[i : i + size] for i in range(0, len(ids), size)]
        if len(pieces) >= enough:
            break
    return pieces
