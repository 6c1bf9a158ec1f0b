"""evaluate_ceval.py: what it reads, what it chooses, what it writes. The data are the example's few questions."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from evaluate_ceval import CONCLUSION, LETTERS, Judge, Question, averages, evaluate, read_all, read_split

EXAMPLE = ROOT / "evaluation" / "example"
HEADER = "id,question,A,B,C,D,answer\n"


@pytest.fixture
def make_judge(tiny_model, tokenizer):
    return lambda batch_size: Judge(tiny_model, tokenizer, batch_size, max_new_tokens=24)


@pytest.fixture
def questions():
    return [question for rows in read_split(EXAMPLE, "val").values() for question in rows]


@torch.no_grad()
def letter_alone(model, tokenizer, prompt):
    """The likeliest letter behind one prompt without padding, each in both spellings, by probabilities."""
    logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].double()
    vocab = tokenizer.get_vocab()
    chances = [(logits.softmax(0)[[vocab[letter], vocab["▁" + letter]]]).sum().item() for letter in LETTERS]
    return LETTERS[max(range(4), key=chances.__getitem__)]


@pytest.mark.parametrize("shots", [0, 2])
def test_batched_letters_match_single_prompts(make_judge, questions, tiny_model, tokenizer, shots):
    """Batches of 1 and of 8, left-padded, give the letter of an unpadded forward pass; examples are rounds before."""
    examples = read_split(EXAMPLE, "dev")["logic"][:shots]
    history = [(example.text, example.answer) for example in examples]
    expected = [letter_alone(tiny_model, tokenizer, tokenizer.build_prompt(q.text, history)) for q in questions]
    assert len(set(expected)) > 1 or shots
    assert make_judge(1).letters(questions, examples) == expected
    assert make_judge(8).letters(questions, examples) == expected


def test_chain_of_thought_asks_twice(make_judge, questions, tiny_model, tokenizer):
    """As the original's script did it; batches of 1 and 8 give the same."""
    expected = []
    for question in questions:
        inputs = tokenizer(tokenizer.build_prompt(question.text), return_tensors="pt")
        ids = tiny_model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        prompt = tokenizer.build_prompt(f"{question.text}{tokenizer.decode(ids)}\n{CONCLUSION}")
        expected.append(letter_alone(tiny_model, tokenizer, prompt))
    assert make_judge(1).reasoned_letters(questions) == expected
    assert make_judge(8).reasoned_letters(questions) == expected


def test_examples_that_do_not_fit_are_left_out(make_judge, questions, tiny_model, tokenizer):
    """The oldest go first; a question that does not fit by itself is named."""
    judge, limit = make_judge(1), tiny_model.config.seq_length
    long = Question("0", "长" * (limit // 2), "A", "there")
    prompt = tokenizer.decode(judge.prompt(questions[0], [long, long, questions[1]]))
    assert prompt.startswith("[Round 1]") and questions[1].text in prompt and prompt.count("长") == limit // 2
    with pytest.raises(ValueError, match=rf"there: \d+ tokens, and {limit - 600} fit"):
        judge.prompt(long, reserved=600)


def test_jsonl_matches_csv(make_judge, tmp_path):
    """The original's form, in folders of its own, with the same questions: the same scores."""
    (tmp_path / "val" / "Humanities").mkdir(parents=True)
    for subject, rows in read_split(EXAMPLE, "val").items():
        lines = [{"inputs_pretokenized": row.text, "label": LETTERS.index(row.answer)} for row in rows]
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
        (tmp_path / "val" / "Humanities" / f"{subject}.jsonl").write_text(text, encoding="utf-8")
    assert evaluate(make_judge(8), *read_all(tmp_path, "val", 0)) == evaluate(
        make_judge(8), *read_all(EXAMPLE, "val", 0)
    )


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a_val.csv", "id,question,A,B,C,answer\n", "a_val.csv, line 1: no column D"),
        ("a_val.csv", HEADER + "0,q,1,2,3,4,A\n1,q,1,2,3,A\n", "line 3: not 7 fields"),
        ("a_val.csv", HEADER + '0,"q\nq",1,2,3,4,A\n1,q,1,2,3,4,E\n', "line 4: answer is 'E'"),
        ("a_val.csv", HEADER + "0,q,1, ,3,4,A\n", "line 2: B is empty"),
        ("a_val.csv", HEADER + "0,q,1,2,3,4,A\n0,q,1,2,3,4,A\n", "line 3: the id 0 occurs twice"),
        ("a_val.csv", HEADER + '0,"q"q,1,2,3,4,A\n', "line 2: "),
        ("a_val.csv", HEADER, "a_val.csv: no questions"),
        ("a.jsonl", '{"inputs_pretokenized": "q", "label": 1}\n{"label": \n', "a.jsonl, line 2: .* is not JSON"),
        ("a.jsonl", '\n{"question": "q", "label": 1}\n', "line 2: no text under inputs_pretokenized"),
        ("a.jsonl", '{"inputs_pretokenized": "q", "label": 4}\n', "line 1: label is 4"),
        ("a.jsonl", '{"inputs_pretokenized": "q", "label": "A"}\n', "line 1: label is 'A'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, text, message):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_split(tmp_path, "val")


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no csv and no jsonl file"):
        read_split(tmp_path, "val")
    with pytest.raises(ValueError, match="--shots 5: college_physics has only 2 rows in dev"):
        read_all(EXAMPLE, "val", 5)
    with pytest.raises(ValueError, match="val has no subject law; it has college_physics, logic"):
        read_all(EXAMPLE, "val", 0, names=["law"])


class Key:
    """A judge that knows the answers of all subjects but one."""

    def letters(self, questions, examples):
        return ["A" if "logic" in question.place else question.answer for question in questions]


def test_scores(capsys):
    """Accuracy of each subject, category and all, every question counting the same; the table says so."""
    result = evaluate(Key(), *read_all(EXAMPLE, "val", 0))
    assert result["subjects"]["college_physics"] == {"questions": 3, "correct": 3, "accuracy": 100.0}
    assert result["subjects"]["logic"] == {"questions": 5, "correct": 0, "accuracy": 0.0}
    assert {name: row["accuracy"] for name, row in result["averages"].items()} == {
        "STEM": 100.0,
        "Humanities": 0.0,
        "Hard": 100.0,
        "All": 37.5,
    }
    assert "college_physics                                3 of 3      100.00%" in capsys.readouterr().out
    assert averages({"no_subject_of_theirs": result["subjects"]["logic"]}).keys() == {"All"}


def test_command_line(tmp_path):
    """The script by itself: the test split gives the submission's form; a bad folder is one line, and no traceback."""
    command = [sys.executable, str(ROOT / "evaluation" / "evaluate_ceval.py"), "--device", "cpu"]
    output = tmp_path / "submission.json"
    done = subprocess.run(
        [*command, str(EXAMPLE), "--split", "test", "--quantize", "4", "--output", str(output)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(output.read_text(encoding="utf-8"))
    assert {subject: list(rows) for subject, rows in answers.items()} == {"college_physics": ["0"], "logic": ["0", "1"]}
    assert all(letter in LETTERS for rows in answers.values() for letter in rows.values())
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "has no csv" in done.stderr and "Traceback" not in done.stderr
