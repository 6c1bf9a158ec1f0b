"""Read dialogues from jsonl files and tokenize them: prompt, answer and </s>, with labels on the last two.

One JSON object a line, in either form:

    {"prompt": "…", "response": "…", "history": [["…", "…"]]}    the original's; columns of any name, history optional
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

The first form learns `response`; the second every assistant message, with everything before it as context. A system
message may come first. Examples are those of the original's scripts: [gMASK] sop and the chat prompt, the answer
tokenized separately (it starts with SentencePiece's space, as the released models' answers do), </s>.

ChatGLM3's messages come in any order: the roles are system, with "tools", user, assistant, with "metadata", the tool
that it calls, and observation, or those of OpenAI's API with `tool_calls`. What ends an answer is the role that speaks
next, and </s> behind the last.
"""

import sys
from pathlib import Path
from typing import List, NamedTuple, Optional

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from chatglm2.family_chatglm import from_openai
from chatglm2.tokenization_chatglm import check_unicode
from jsonl import SHORT, json_lines

IGNORED = -100  # the label of tokens without a loss


class Round(NamedTuple):
    """One answer to learn."""

    line: int
    messages: List[dict]  # everything before it; the last is the user's
    answer: str
    metadata: str = ""
    next_role: Optional[str] = None


def read_rounds(path, prompt_column=None, response_column=None, history_column=None, messages_column="messages",
                roles=()):  # fmt: skip
    """The answers to learn from a jsonl file, in order; in the messages form unless other columns are named.

    `roles` are those of the tokenizer's `conversation`, in any order; without any, user and assistant take turns.

    Raises:
        ValueError: an invalid line; the message gives the file, the line number, the value and the fix.
    """
    if (prompt_column is None) != (response_column is None) or (history_column and prompt_column is None):
        raise ValueError(
            f"prompt_column={prompt_column!r}, response_column={response_column!r}, history_column={history_column!r}: "
            "give prompt_column and response_column for the original's form, or none of the three for messages."
        )
    rounds = []
    for number, record in json_lines(path):
        try:
            if prompt_column is None:
                rounds += rounds_of_messages(number, column(record, messages_column), roles)
            else:
                history = column(record, history_column) if history_column else []
                query, answer = column(record, prompt_column), column(record, response_column)
                rounds.append(round_of_columns(number, query, answer, history, prompt_column, response_column))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not rounds:
        raise ValueError(f"{path} holds no dialogue: give a file with one JSON object a line.")
    return rounds


def column(record, name):
    if name not in record:
        raise ValueError(f"there is no column {name!r}, only {', '.join(map(repr, record))}: add it, or name another.")
    return record[name]


def check_text(value, what):
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {SHORT.repr(value)}: give a non-empty string.")
    check_unicode(value, what)


def round_of_columns(number, query, answer, history, prompt_column, response_column):
    check_text(query, prompt_column)
    check_text(answer, response_column)
    messages = []
    if not isinstance(history, (list, type(None))):
        raise ValueError(f"history is {SHORT.repr(history)}: give a list of [query, response] pairs.")
    for i, turn in enumerate(history or []):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"history[{i}] is {SHORT.repr(turn)}: give [query, response], a pair of strings.")
        for j, text in enumerate(turn):
            check_unicode(text, f"history[{i}][{j}]")
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn)]
    return Round(number, [*messages, {"role": "user", "content": query}], answer)


def rounds_of_messages(number, messages, roles=()):
    """Every assistant message, with everything before it."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {SHORT.repr(messages)}: give a list of messages.")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"messages[{i}] is {SHORT.repr(message)}: give an object with role and content.")
    if roles:
        messages = [part for message in messages for part in from_openai(message)]
    rounds, wanted = [], "user"
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        check_text(content, f"messages[{i}]['content']")
        if i == 0 and role == "system":
            continue
        if roles and role not in roles:
            raise ValueError(f"messages[{i}] has the role {SHORT.repr(role)}: give one of {', '.join(roles)}.")
        if not roles and role != wanted:
            raise ValueError(
                f"messages[{i}] has the role {SHORT.repr(role)} where {wanted!r} is expected: "
                "user and assistant take turns, and a system message may only come first."
            )
        if role == "assistant":
            next_role = messages[i + 1]["role"] if i + 1 < len(messages) else None
            rounds.append(Round(number, messages[:i], content, message.get("metadata", ""), next_role))
        wanted = "user" if role == "assistant" else "assistant"
    if wanted == "assistant" or not rounds:
        raise ValueError("the last message is not the assistant's, so there is no answer to learn: add one.")
    return rounds


class Examples(NamedTuple):
    """Rows of `input_ids` and `labels` (lists of one length), and how many prompts and answers were cut."""

    rows: List[dict]
    cut_prompts: int
    cut_answers: int


def make_examples(tokenizer, rounds, max_source_length, max_target_length, progress=True):
    """Tokenize `rounds`.

    A prompt over `max_source_length` is cut after [gMASK] sop: old rounds go, the question stays. An answer over
    `max_target_length` loses its end, and gets no </s>: the model must not learn to stop there.
    """
    rows, cut_prompts, cut_answers = [], 0, 0
    prefix = tokenizer.get_prefix_tokens()
    kept = max_source_length - len(prefix)
    if kept < 1 or max_target_length < 1:
        raise ValueError(
            f"max_source_length={max_source_length}, max_target_length={max_target_length}: give at least "
            f"{len(prefix) + 1} and 1."
        )
    for item in tqdm(rounds, desc="Tokenizing", disable=not progress):
        prompt = tokenizer.apply_chat_template(item.messages, add_generation_prompt=True, return_dict=False)
        answer, end = tokenizer.conversation.learned(tokenizer, item.answer, item.metadata, item.next_role)
        if len(prompt) > max_source_length:
            prompt = [*prefix, *prompt[-kept:]]
            cut_prompts += 1
        if len(answer) > max_target_length:
            answer = answer[:max_target_length]
            cut_answers += 1
        else:
            answer.append(end)
        rows.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    return Examples(rows, cut_prompts, cut_answers)
