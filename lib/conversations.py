"""Conversations as files: {"messages": [{"role": "user", "content": "..."}, ...]}, which fine-tuning reads, too."""

import json

from chatglm2.tokenization_chatglm import check_unicode


def read_conversation(text):
    """(the system prompt or "", [(role, content)]) of a file's text.

    Raises:
        ValueError: it is not a conversation: at most one system message, first, then text by user and assistant.
    """
    try:
        messages = json.loads(text)["messages"]
        turns = [(message["role"], message["content"]) for message in messages]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f'Not a conversation, as {{"messages": [{{"role": ..., "content": ...}}]}}: {error}'
        ) from error
    for i, (role, content) in enumerate(turns):
        if role not in ("user", "assistant") and (role, i) != ("system", 0):
            raise ValueError(f"messages[{i}]: the role {role!r} where user or assistant is expected.")
        if not isinstance(content, str):
            raise ValueError(f"messages[{i}]: the content must be text, got {content!r:.80}")
        check_unicode(content, f"messages[{i}]")
    if turns and turns[0][0] == "system":
        return turns[0][1], turns[1:]
    return "", turns


def rounds_of(turns):
    """[(query, answer)] of [(role, content)], without questions that have no answer, and answers without a question."""
    pairs = zip(turns, turns[1:])
    return [(query, answer) for (a, query), (b, answer) in pairs if (a, b) == ("user", "assistant")]
