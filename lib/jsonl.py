"""Text files of other people, line by line, in UTF-8: errors name the file, the line, and what is wrong there."""

import codecs
import json
import reprlib

SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 80


def text_lines(path):
    """Yield (number, line), from 1, for each line that ends in a line feed."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text, wrong = "", line.find(b"\0")
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                wrong = error.start
            if wrong >= 0:
                found = f"byte {wrong} is not UTF-8{looks_like(line)}"
                raise ValueError(f"{path}, line {number}: {found}: save the file as UTF-8.")
            yield number, text


def looks_like(line):
    """The encoding of a line that is not UTF-8, as ", but looks like GBK"; "" if it is unknown."""
    if b"\0" in line or line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ", but looks like UTF-16"
    try:
        line.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    return ", but looks like GBK"


def json_lines(path):
    """Yield (number, object), from 1, for each line of a jsonl file that is not empty."""
    for number, line in text_lines(path):
        if line.strip():
            try:
                record = parse(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            yield number, record


def parse(line):
    try:
        record = json.loads(line)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply: one object per line.") from None
    except json.JSONDecodeError as error:
        text = SHORT.repr(line.strip())
        raise ValueError(f"{text} is not JSON ({error.msg}, column {error.colno}): one object per line.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{SHORT.repr(record)} is not a JSON object: write one object per line, not a list of them.")
    return record
