#!/usr/bin/env python3
"""Evaluate ChatGLM2 weights, or the tiny checkpoint of this repository, on C-Eval.

    python evaluation/evaluate_ceval.py evaluation/example                    # a few questions, the tiny checkpoint
    python evaluation/evaluate_ceval.py ceval-exam --model chatglm2-6b --quantize 4 --shots 5

DATA is the folder that C-Eval distributes: {dev,val,test}/SUBJECT_{dev,val,test}.csv, with the columns id, question, A,
B, C, D and answer. Or it holds the jsonl files of ChatGLM2-6B's own script: {val,test}/**/SUBJECT.jsonl, with
inputs_pretokenized (question and options in one text) and label (0 to 3).

val is scored. test has no answers: the result is the file to submit on C-Eval's site.
"""

import csv
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from chatglm2.generation_chatglm import ScoreCheck
from chatglm2.tokenization_chatglm import check_unicode
from jsonl import SHORT, json_lines, text_lines
from options import load_or_exit, model_parser

LETTERS = "ABCD"
COLUMNS = ("id", "question", *LETTERS)
CONCLUSION = "综上所述，ABCD中正确的选项是："
CATEGORIES = {
    "STEM": "computer_network operating_system computer_architecture college_programming college_physics "
    "college_chemistry advanced_mathematics probability_and_statistics discrete_mathematics electrical_engineer "
    "metrology_engineer high_school_mathematics high_school_physics high_school_chemistry high_school_biology "
    "middle_school_mathematics middle_school_biology middle_school_physics middle_school_chemistry veterinary_medicine",
    "Social science": "college_economics business_administration marxism mao_zedong_thought education_science "
    "teacher_qualification high_school_politics high_school_geography middle_school_politics middle_school_geography",
    "Humanities": "modern_chinese_history ideological_and_moral_cultivation logic law chinese_language_and_literature "
    "art_studies professional_tour_guide legal_professional high_school_chinese high_school_history "
    "middle_school_history",
    "Other": "civil_servant sports_science plant_protection basic_medicine clinical_medicine urban_and_rural_planner "
    "accountant fire_engineer environmental_impact_assessment_engineer tax_accountant physician",
    "Hard": "advanced_mathematics discrete_mathematics probability_and_statistics college_chemistry college_physics "
    "high_school_mathematics high_school_chemistry high_school_physics",
}


# ---- the data -------------------------------------------------------------------------------------------------------


@dataclass
class Question:
    """One row: its id, question and options as one text, the correct letter (None in test), and its file and line."""

    id: str
    text: str
    answer: str
    place: str


def read_csv(path, labelled):
    """The questions of one csv file. Raises ValueError, with file and line, for an invalid row."""
    questions, seen = [], set()
    text = "".join(line for _, line in text_lines(path))
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        needed = (*COLUMNS, "answer") if labelled else COLUMNS
        if missing := [name for name in needed if name not in (rows.fieldnames or ())]:
            raise ValueError(f"{path}, line 1: no column {', '.join(missing)}. C-Eval's are {', '.join(needed)}.")
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{place}: not {len(rows.fieldnames)} fields. Put quotes around text with commas.")
            if empty := [name for name in COLUMNS if not row[name].strip()]:
                raise ValueError(f"{place}: {', '.join(empty)} is empty.")
            answer = row["answer"].strip() if labelled else None
            if labelled and (len(answer) != 1 or answer not in LETTERS):
                raise ValueError(f"{place}: answer is {answer!r}, not one of A, B, C, D.")
            if row["id"] in seen:
                raise ValueError(f"{place}: the id {row['id']} occurs twice.")
            seen.add(row["id"])
            options = "\n".join(f"{letter}. {row[letter].strip()}" for letter in LETTERS)
            questions.append(Question(row["id"], f"{row['question'].strip()}\n{options}", answer, place))
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.reader.line_num}: {error}") from error
    return questions


def read_jsonl(path, labelled):
    """The questions of one jsonl file; the id is the line, from 0. Raises ValueError as `read_csv` does."""
    questions = []
    for number, row in json_lines(path):
        place, text = f"{path}, line {number}", row.get("inputs_pretokenized")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: no text under inputs_pretokenized.")
        check_unicode(text, f"inputs_pretokenized in {place}")
        label = row.get("label")
        if labelled and (type(label) is not int or not 0 <= label < len(LETTERS)):
            raise ValueError(f"{place}: label is {SHORT.repr(label)}, not one of 0, 1, 2, 3.")
        questions.append(Question(str(number - 1), text, LETTERS[label] if labelled else None, place))
    return questions


def read_split(folder, split):
    """{subject: its questions} of one split.

    Raises:
        ValueError: there are no files, or a row is invalid.
    """
    found = {}
    files = sorted(path for path in Path(folder, split).rglob("*") if path.suffix in (".csv", ".jsonl"))
    for path in files:
        subject = path.stem.removesuffix(f"_{split}")
        if subject in found:
            raise ValueError(f"{path}: {subject} occurs twice in {split}. Keep one of the files.")
        found[subject] = (read_csv if path.suffix == ".csv" else read_jsonl)(path, labelled=split != "test")
        if not found[subject]:
            raise ValueError(f"{path}: no questions.")
    if not found:
        raise ValueError(f"{Path(folder, split)} has no csv and no jsonl file. Give the folder that contains {split}.")
    return found


# ---- the model ------------------------------------------------------------------------------------------------------


class Judge:
    """Answers with a letter: the most likely of A, B, C and D as the next token of a chat's answer."""

    def __init__(self, model, tokenizer, batch_size=8, max_new_tokens=512):
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        spellings = [tokenizer.convert_tokens_to_ids([letter, "▁" + letter]) for letter in LETTERS]
        self.letter_ids = torch.tensor(spellings, device=model.device)  # (4, 2): an answer can start with either
        if tokenizer.convert_tokens_to_ids("<unk>") in self.letter_ids:
            raise ValueError(f"tokenizer.model has no piece for one of {', '.join(LETTERS)}: {spellings}")

    def prompt(self, question, examples=(), reserved=0):
        """The ids of the prompt, with as many of the last examples as leave `reserved` tokens of seq_length free."""
        limit, chat = self.model.config.seq_length - reserved, self.tokenizer.conversation
        for start in range(len(examples) + 1):
            history = chat.from_rounds([(example.text, example.answer) for example in examples[start:]])
            ids = chat.prompt(self.tokenizer, question.text, history)
            if len(ids) <= limit:
                return ids
        raise ValueError(f"{question.place}: {len(ids)} tokens, and {limit} fit.")

    def inputs(self, prompts):
        return self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.model.device)

    @torch.no_grad()
    def letters(self, questions, examples=()):
        """The model's letter for each question, where the text of an answer begins."""
        opening = self.tokenizer.conversation.opening(self.tokenizer)
        prompts = [self.prompt(question, examples, len(opening)) + opening for question in questions]
        letters = []
        for start in range(0, len(prompts), self.batch_size):
            inputs = self.inputs(prompts[start : start + self.batch_size])
            logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()  # (B, V)
            logits = ScoreCheck(self.model)(None, logits)
            scores = logits[:, self.letter_ids].logsumexp(dim=-1)  # (B, 4)
            letters += [LETTERS[i] for i in scores.argmax(dim=-1).tolist()]
        return letters

    @torch.no_grad()
    def reasoned_letters(self, questions, examples=()):
        """The same in two steps: the model answers at length, then is asked again with that answer in the prompt."""
        reserved = self.max_new_tokens + len(self.tokenizer(f"\n{CONCLUSION}")["input_ids"])
        prompts = [self.prompt(question, examples, reserved) for question in questions]
        answered = []
        for start in range(0, len(prompts), self.batch_size):
            inputs = self.inputs(prompts[start : start + self.batch_size])
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
            answers = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for question, answer in zip(questions[start:], answers):
                text = f"{question.text}{answer}\n{CONCLUSION}"
                answered.append(Question(question.id, text, question.answer, question.place))
        return self.letters(answered, examples)


# ---- the result -----------------------------------------------------------------------------------------------------


def average(subjects):
    """Questions, correct answers and accuracy in percent over `subjects`; every question has the same weight."""
    questions, correct = (sum(subject[key] for subject in subjects) for key in ("questions", "correct"))
    return {"questions": questions, "correct": correct, "accuracy": round(100 * correct / questions, 2)}


def averages(subjects):
    """`average` of each of C-Eval's categories that has a subject in the data, and of all subjects."""
    result = {}
    for category, names in CATEGORIES.items():
        if members := [subjects[name] for name in names.split() if name in subjects]:
            result[category] = average(members)
    return {**result, "All": average(list(subjects.values()))}


def write_row(name, row):
    print(f"{name:<42}{row['correct']:>6} of {row['questions']:<6}{row['accuracy']:>7.2f}%", flush=True)


def read_all(folder, split, shots, names=None):
    """(questions, examples), each {subject: rows}. Raises ValueError for an invalid row, a missing subject or shot."""
    questions = read_split(folder, split)
    examples = read_split(folder, "dev") if shots else {}
    if unknown := set(names or ()) - set(questions):
        raise ValueError(f"{split} has no subject {', '.join(sorted(unknown))}; it has {', '.join(questions)}.")
    for subject in names or questions:
        if (rows := len(examples.get(subject, ()))) < shots:
            raise ValueError(f"--shots {shots}: {subject} has only {rows} rows in dev.")
    return {name: questions[name] for name in names or questions}, examples


def evaluate(judge, questions, examples, split="val", shots=0, reasoning=False):
    """The result of a split: the scores of val, or {subject: {id: letter}} of test. Prints a line per subject."""
    choose = judge.reasoned_letters if reasoning else judge.letters
    answers, scores = {}, {}
    for subject, rows in questions.items():
        letters = choose(rows, examples.get(subject, ())[:shots])
        answers[subject] = {row.id: letter for row, letter in zip(rows, letters)}
        if split == "test":
            print(f"{subject:<42}{len(rows):>6} answered", flush=True)
            continue
        scores[subject] = average([{"questions": 1, "correct": int(a == row.answer)} for row, a in zip(rows, letters)])
        write_row(subject, scores[subject])
    if split == "test":
        return answers
    overall = averages(scores)
    print()
    for category, row in overall.items():
        write_row(category, row)
    return {"averages": overall, "subjects": scores, "answers": answers}


def parse_arguments(arguments=None):
    parser = model_parser(__doc__)
    parser.add_argument("data", help="folder with val, and optionally dev and test")
    parser.add_argument("--split", default="val", choices=["val", "test"], help="val is scored (default)")
    parser.add_argument("--shots", type=int, default=0, help="examples from dev, as earlier rounds (default: 0)")
    parser.add_argument(
        "--reasoning", action="store_true", help="let the model answer at length, then ask for the letter"
    )
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of a long answer (default: 512)")
    parser.add_argument("--subjects", nargs="+", metavar="SUBJECT", help="only these (default: all)")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at a time (default: 8)")
    parser.add_argument("--output", default="ceval.json", help="scores, or the submission (default: ceval.json)")
    args = parser.parse_args(arguments)
    for name, least in (("shots", 0), ("batch_size", 1), ("max_new_tokens", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give {least} or more")
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    try:
        data = read_all(args.data, args.split, args.shots, args.subjects)  # before the model loads
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        judge = Judge(*load_or_exit(args), args.batch_size, args.max_new_tokens)
        result = evaluate(judge, *data, args.split, args.shots, args.reasoning)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    if args.split == "val":
        result = {"settings": vars(args), **result}
    Path(args.output).write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {args.output}")


if __name__ == "__main__":
    main()
