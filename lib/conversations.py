"""Conversations as files: {"messages": [{"role": "user", "content": "..."}, ...]}, which fine-tuning reads, too.

ChatGLM3's have the role observation, a system message that offers "tools", and "metadata" where a message calls one.
"""

import json

from chatglm2.family_chatglm import OFFER, as_generated
from chatglm2.tokenization_chatglm import check_unicode


def written(form, history, system="", question=None):
    """The file's text for a history in `form`, a tokenizer's `conversation`, and a message without an answer."""
    messages = [{"role": "system", "content": system}] if system else []
    if form.roles:
        messages += [{key: value for key, value in message.items() if value or key == "content"} for message in history]
    else:
        for query, answer in history:
            messages += [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
    if question is not None:
        messages.append({"role": form.next_role(history), "content": question})
    return json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n"


def read_conversation(text):
    """(the system prompt or "", [(role, content)]) of a file's text; a tool's result is the user's, for `from_rounds`.

    Raises:
        ValueError: it is not a conversation: at most one system message, first, then text by the other roles.
    """
    try:
        messages = json.loads(text)["messages"]
        found = [(message["role"], message["content"], message.get("metadata", "")) for message in messages]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f'Not a conversation, as {{"messages": [{{"role": ..., "content": ...}}]}}: {error}'
        ) from error
    system, turns = "", []
    for i, (role, content, name) in enumerate(found):
        if role not in ("user", "assistant", "observation") and (role, i) != ("system", 0):
            raise ValueError(f"messages[{i}]: the role {role!r} where user, assistant or observation is expected.")
        for key, value in ("content", content), ("metadata", name):
            if not isinstance(value, str):
                raise ValueError(f"messages[{i}]: the {key} must be text, got {value!r:.80}")
        check_unicode(content, f"messages[{i}]")
        content = as_generated(content, name)
        if role == "system":
            system = "" if content == OFFER and "tools" in messages[0] else content
        elif name and turns and turns[-1][0] == "assistant":  # text in front of a call belongs to the same answer
            turns[-1] = ("assistant", f"{turns[-1][1]}<|assistant|>{content}")
        else:
            turns.append(("user" if role == "observation" else role, content))
    return system, turns


def rounds_of(turns):
    """[(query, answer)] of [(role, content)], without questions that have no answer, and answers without a question."""
    pairs = zip(turns, turns[1:])
    return [(query, answer) for (a, query), (b, answer) in pairs if (a, b) == ("user", "assistant")]
