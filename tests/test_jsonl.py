"""Files of training data and of questions that are not what they should be: one error that names file and line."""

import json

import data
import pytest
from evaluate_ceval import read_csv, read_jsonl

MESSAGES = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
READERS = {  # name -> (reader of texts, a good line)
    "training data": (
        lambda path: [row.messages[0]["content"] for row in data.read_rounds(path)],
        {"messages": MESSAGES},
    ),
    "questions": (
        lambda path: [row.text for row in read_jsonl(path, labelled=True)],
        {"inputs_pretokenized": "你好", "label": 1},
    ),
}


@pytest.fixture(params=READERS)
def reader(request):
    return READERS[request.param]


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("separator", "\u2028\u2029\x85")
def test_only_line_feeds_end_a_line(reader, separator, tmp_path):
    """JSON may hold the line separators of Unicode in its strings, where str.splitlines would cut them."""
    read, line = reader
    line = json.dumps(line, ensure_ascii=False).replace("你好", f"你{separator}好")
    assert read(write(tmp_path / "a.jsonl", f"\ufeff{line}\r\n\n{line}".encode())) == [f"你{separator}好"] * 2


@pytest.mark.parametrize(
    "encoding, message",
    [
        ("gbk", r"line 3: byte \d+ is not UTF-8, but looks like GBK: save the file as UTF-8"),
        ("utf-16", "line 1: byte [01] is not UTF-8, but looks like UTF-16: save the file as UTF-8"),
        ("utf-16-le", "line 1: byte 1 is not UTF-8, but looks like UTF-16"),
        ("utf-16-be", "line 1: byte 0 is not UTF-8, but looks like UTF-16"),
        ("latin-1", r"line 3: byte \d+ is not UTF-8: save the file as UTF-8"),
    ],
)
def test_other_encodings_are_named(reader, encoding, message, tmp_path):
    read, line = reader
    text = ("" if "16" in encoding else "\n\n") + json.dumps(line, ensure_ascii=False)
    text = text.replace("好", "é").replace("你", "n") if encoding == "latin-1" else text
    content = text.encode(encoding)
    with pytest.raises(ValueError, match=f"a.jsonl, {message}"):
        read(write(tmp_path / "a.jsonl", content))
    with pytest.raises(ValueError, match=f"a.csv, {message}"):
        read_csv(write(tmp_path / "a.csv", content), labelled=True)


BOMBS = {
    "list": ("[" * 100_000, "its brackets are nested too deeply"),
    "object": ('{"a":' * 100_000, "its brackets are nested too deeply"),
    "number": ('{"a": ' + "9" * 5000 + "}", "4300|there is no column|no text under"),
    "value": (
        '{"messages": %s, "inputs_pretokenized": "q", "label": %s}' % (("[" * 500 + "]" * 500,) * 2),
        "messages|label",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_json_bombs_are_one_error(reader, bomb, tmp_path):
    read, line = reader
    text, message = BOMBS[bomb]
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: .*({message})") as caught:
        read(write(tmp_path / "a.jsonl", f"{json.dumps(line)}\n{text}\n".encode()))
    assert len(str(caught.value)) < 600


def test_half_a_surrogate_pair_is_named(reader, tmp_path):
    r"""JSON can spell "\ud800", which no tokenizer can encode."""
    read, line = reader
    text = f"{json.dumps(line)}\n{json.dumps(line)}".replace(r"\u597d", r"\u597d\ud83d")
    with pytest.raises(ValueError, match=r"a.jsonl, line 1.* cannot be encoded in UTF-8: character 2 is '\\ud83d'"):
        read(write(tmp_path / "a.jsonl", text.encode()))
    line = {"prompt": "a", "response": "b", "history": [["c", "d\ud800"]]}
    with pytest.raises(ValueError, match=r"line 1: history\[0\]\[1\] cannot be encoded in UTF-8: character 1"):
        data.read_rounds(write(tmp_path / "b.jsonl", json.dumps(line).encode()), "prompt", "response", "history")


def test_csv_that_breaks_off_within_its_header(tmp_path):
    with pytest.raises(ValueError, match="a.csv, line 1: unexpected end of data"):
        read_csv(write(tmp_path / "a.csv", b'id,"question'), labelled=True)
