"""Which model of the family a released folder holds, and how each of them writes a conversation.

ChatGLM2 and CodeGeeX2 write numbered rounds of text, ChatGLM3 messages that begin with the token of a role. All share
the network. No released file names its model in one key, so that it is told from several; what was found is saved as
`model_family` in config.json and tokenizer_config.json, where it can also be set by hand.
"""

import ast
import json
import os
import re

FAMILIES = ("chatglm2", "chatglm3", "codegeex2")
COMMANDS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLES = ("system", "user", "assistant", "observation")
PLACEHOLDER, TRAINING_DATE = "[[训练时间]]", "2023年"  # the released models write this for the date of their training


# ---- which model it is ----------------------------------------------------------------------------------------------


def checked_family(name):
    """Return `name`. Raises ValueError if it is not a model of the family."""
    if name not in FAMILIES:
        raise ValueError(
            f"model_family={name!r} in config.json or tokenizer_config.json must be one of {FAMILIES}. Without "
            "the key the model is told from the others."
        )
    return name


def named_family(name):
    """The family in the last part of a path or of a name on the Hub, or None."""
    last = re.split(r"[/\\]", str(name or "").rstrip("/\\"))[-1].lower()
    return next((family for family in FAMILIES if family in last), None)


def config_family(config):
    """The family of a config.json, given as a dictionary."""
    if config.get("model_family") is not None:
        return checked_family(config["model_family"])
    short = config.get("seq_length") == 8192 and "rotary_percent" not in config  # CodeGeeX2 has both
    return named_family(config.get("_name_or_path")) or ("chatglm3" if short else "chatglm2")


def find_rope_ratio_type(config):
    """How a config.json, given as a dictionary, means its `rope_ratio`: "base" multiplies, "linear" divides."""
    if config.get("rope_ratio_type") is not None:
        return config["rope_ratio_type"]
    family = config.get("model_family") or named_family(config.get("_name_or_path"))
    if family:
        return "base" if family == "chatglm3" else "linear"
    return "linear" if config.get("rope_ratio") in (None, 1, 16) else "base"


def tokenizer_family(folder, settings):
    """The family of a tokenizer, from its `settings` and from the files in `folder`, where `settings` came from.

    The files are read again: the settings have lost the name, and hold a chat template that may be another model's.
    """
    stored = read_json(folder, "tokenizer_config.json") or settings
    if settings.get("model_family") is not None:
        return checked_family(settings["model_family"])
    telling = [stored.get(key) for key in ("added_tokens_decoder", "additional_special_tokens")]
    roles = json.dumps([*telling, stored.get("chat_template"), settings.get("chat_template")], default=str)
    if "encode_special_tokens" in stored or any(f"<|{role}|>" in roles for role in ROLES):
        return "chatglm3"
    return named_family(stored.get("name_or_path")) or config_family(read_json(folder, "config.json"))


def read_json(folder, name):
    """The JSON object in a file, or {} if there is none: whoever needs it reports what is wrong with it."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


# ---- conversations --------------------------------------------------------------------------------------------------


def check_rounds(history):
    """Raise ValueError for what is no history of rounds: a message, too, would unpack into a query and a response."""
    if history is not None and not isinstance(history, (list, tuple)):
        raise ValueError(f"history must be a list of (query, response), got a {type(history).__name__}")
    for i, turn in enumerate(history or []):
        pair = isinstance(turn, (list, tuple)) and len(turn) == 2
        if not pair or not all(isinstance(text, (str, type(None))) for text in turn):
            raise ValueError(f"history[{i}] must be (query, response), two strings, got {turn!r}")


class Rounds:
    """ChatGLM2 and CodeGeeX2: numbered rounds of text. A history is a list of (query, response)."""

    commands = COMMANDS
    roles = ()  # a question and its answer take turns
    shown = ()  # commands whose names are part of decoded text
    stops = ()  # commands that end an answer, besides </s>
    template = None  # chat_template.jinja
    response_template = None  # how transformers' server and pipelines read an answer: as text

    def checked(self, query, history, role="user"):
        """Copy `history`. Raises ValueError for what is neither text nor None, which is written as "None"."""
        if role != "user":
            raise ValueError(f"role={role!r}: only ChatGLM3 has roles. For a system prompt pass system=.")
        if not isinstance(query, (str, type(None))):
            raise ValueError(f"query must be a string, got {query!r}")
        check_rounds(history)
        return [tuple(turn) for turn in history or []]

    def offer(self, tools, content=""):
        """The history that offers tools."""
        raise ValueError("only ChatGLM3 calls tools.")

    def prompt(self, tokenizer, query, history, role="user", system=None):
        """The ids of a whole prompt."""
        return tokenizer(tokenizer.build_prompt(query, history, system))["input_ids"]

    def next_round(self, tokenizer, query, history, role="user"):
        """The ids of the new round alone, to follow those of `history`."""
        check_rounds(history)
        return tokenizer.encode_continuation("\n\n" + tokenizer.build_round(len(history) + 1, query))

    def from_rounds(self, rounds):
        """A history of these rounds, (query, text of the answer)."""
        return rounds

    def to_rounds(self, history):
        """The inverse of `from_rounds`."""
        return history

    def next_role(self, history):
        """Whose turn it is: the user's, or that of a tool that the last message calls."""
        return "user"

    def after(self, tokenizer, query, rounds, known):
        """The ids behind the response of round `known` of a prompt: of the later rounds, and of `query`."""
        last, response = rounds[known - 1]
        past = tokenizer.build_prompt(last, rounds[: known - 1]) + response
        return tokenizer.encode_continuation(tokenizer.build_prompt(query, rounds)[len(past) :])

    def opening(self, tokenizer):
        """The ids in front of the text of an answer."""
        return []

    def learned(self, tokenizer, answer, metadata="", next_role=None):
        """(the ids of an answer as it is generated, the id that ends it)."""
        return tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id

    def split(self, history):
        """(what to keep of a long `history`, its rounds, of which the oldest may be dropped)."""
        return [], [[turn] for turn in history]

    def answered(self, process_response, text, query, history, role="user"):
        """(response, history with the new round) for the text of an answer."""
        response = process_response(text)
        return response, [*history, (query, response)]

    def is_undecided(self, text, history):
        """Whether more text could still change what the text so far is."""
        return False


# key=value in a call of a tool, for `Roles.response_template`: nested brackets and strings are part of a value
STRING = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
NESTED = rf"(?<nested>[\[{{(](?:{STRING}|(?&nested)|[^'\"\[\]{{}}()])*[\]}})])"
ARGUMENT = rf"(?P<key>\w+)\s*=\s*(?P<value>(?:{STRING}|{NESTED}|[^'\"\[\]{{}}(),])+)"


class Roles:
    """ChatGLM3: messages that begin with the token of a role. A history is a list of {"role", "content"}.

    An assistant's message may have "metadata", the name of a tool that it calls with its content; a system message may
    have "tools", their descriptions.
    """

    commands = (*COMMANDS, *(f"<|{role}|>" for role in ROLES))
    roles = ROLES  # in any order
    shown = commands
    stops = ("<|user|>", "<|observation|>")
    template = (
        "{{ '[gMASK]sop' }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n ' + message['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    response_template = {
        "start_anchor_pattern": r"\Z",  # the prompt holds nothing of the answer
        "fields": {
            "no_metadata": {"open_pattern": r"\A\s*\n\s*", "close_pattern": r"(?=\S)"},
            "tool_calls": {
                "open_pattern": r"(?:<\|assistant\|>)?(?P<name>[^\s<]+)\s*\n\s*```python\s*\n\s*tool_call\(",
                "close_pattern": r"\)\s*```",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": ARGUMENT,
                    "value_parser": {"name": "json", "args": {"string_delims": [["'", "'"]], "allow_non_json": True}},
                },
                "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close_pattern": r"<\|(?:user|observation|assistant)\|>", "content": "text"},
        },
    }

    def checked(self, query, history, role="user"):
        """Copy `history`. Raises ValueError for an unknown role, and for what is not text."""
        if history is not None and not isinstance(history, (list, tuple)):
            raise ValueError(f'history must be a list of {{"role", "content"}}, got a {type(history).__name__}')
        messages = [*(history or []), {"role": role, "content": query}]
        for i, message in enumerate(messages):
            place = f"history[{i}]" if i < len(messages) - 1 else "the message"
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise ValueError(f'{place} must be {{"role": ..., "content": ...}}, got {message!r}')
            check_role(message["role"])
            for key in ("content", "metadata"):
                if not isinstance(message.get(key, ""), str):
                    raise ValueError(f"{key} of {place} must be a string, got {message[key]!r}")
        return [dict(message) for message in messages[:-1]]

    def message(self, tokenizer, role, metadata, content):
        """The ids of one message: the role's token, the first line with its metadata, the content."""
        check_role(role)
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in (f"{metadata}\n", content)]
        return [tokenizer.get_command(f"<|{role}|>"), *ids[0], *ids[1]]

    def messages(self, tokenizer, messages):
        """The ids of several messages."""
        ids = []
        for message in messages:
            content = message["content"]
            if message["role"] == "system" and "tools" in message:
                content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
            ids += self.message(tokenizer, message["role"], message.get("metadata", ""), content)
        return ids

    def offer(self, tools, content=""):
        """The history that offers tools, descriptions in the form of OpenAI's API or the functions alone."""
        tools = [tool.get("function", tool) for tool in tools]
        return [{"role": "system", "content": content or OFFER, "tools": tools}]

    def prompt(self, tokenizer, query, history, role="user", system=None):
        """The ids of a whole prompt."""
        first = [{"role": "system", "content": system}] if system else []
        ids = self.messages(tokenizer, [*first, *history])
        return tokenizer.get_prefix_tokens() + ids + self.next_round(tokenizer, query, history, role)

    def next_round(self, tokenizer, query, history, role="user"):
        """The ids of the new message, and the assistant's token."""
        return self.message(tokenizer, role, "", query) + [tokenizer.get_command("<|assistant|>")]

    def from_rounds(self, rounds):
        """A history of these rounds, (query, text of the answer). What follows the call of a tool is its result."""
        history = []
        for query, text in rounds:
            history.append({"role": self.next_role(history), "content": query})
            for part in text.split("<|assistant|>"):
                name, _, code = part.strip().partition("\n")
                called = parameters_in(code) is not None or name == INTERPRETER and code.strip().startswith("```")
                content = {"metadata": name.strip(), "content": code.strip()} if called else {"content": part.strip()}
                history.append({"role": "assistant", **content})
        return history

    def to_rounds(self, history):
        """The inverse of `from_rounds`: a tool's result is a query, too, and the system message belongs to no round."""
        rounds = []
        for message in history:
            name, content = message.get("metadata"), message["content"]
            if message["role"] == "assistant":
                rounds = rounds or [("", [])]
                rounds[-1][1].append(as_generated(content, name))
            elif message["role"] != "system":
                rounds.append((content, []))
        return [(query, "<|assistant|>".join(parts)) for query, parts in rounds]

    def next_role(self, history):
        """Whose turn it is: the user's, or that of a tool that the last message calls."""
        return "observation" if history and history[-1].get("metadata") else "user"

    def after(self, tokenizer, query, rounds, known):
        """The ids behind the response of round `known` of a prompt: of the later rounds, and of `query`."""
        history, first = self.from_rounds(rounds), len(self.from_rounds(rounds[:known]))
        return self.messages(tokenizer, history[first:]) + self.next_round(
            tokenizer, query, [], self.next_role(history)
        )

    def opening(self, tokenizer):
        """The ids in front of the text of an answer: its first line, which names no tool."""
        return tokenizer.encode("\n", add_special_tokens=False)

    def learned(self, tokenizer, answer, metadata="", next_role=None):
        """(the ids of an answer as it is generated, the id that ends it)."""
        end = tokenizer.get_command(f"<|{next_role}|>") if next_role else tokenizer.eos_token_id
        return self.message(tokenizer, "assistant", metadata, answer)[1:], end

    def from_openai(self, messages, tools=None):
        """Messages of OpenAI's API, or of ChatGLM3, as those of ChatGLM3. Raises ValueError for what is not text.

        The role "tool" is ChatGLM3's "observation", "developer" its "system"; `tool_calls` become a message each, and
        `tools` part of the system message.
        """
        messages = [part for message in messages for part in from_openai(message)]
        if tools:
            first = messages.pop(0) if messages and messages[0]["role"] == "system" else {"content": ""}
            messages = self.offer(tools, first["content"]) + messages
        return self.checked("", messages)

    def encoded(self, tokenizer, messages, add_generation_prompt=False, tools=None):
        """(ids, mask) of messages for `from_openai`; the mask is 1 where an answer is to be learned.

        The token behind an answer belongs to it: </s>, or the next role's, which ends it when the model speaks.
        """
        messages, ids, mask = self.from_openai(messages, tools), tokenizer.get_prefix_tokens(), [0, 0]
        for message in messages:
            own = self.messages(tokenizer, [message])
            learned = int(message["role"] == "assistant")
            ids, mask = ids + own, mask + [mask[-1]] + [learned] * (len(own) - 1)
        if add_generation_prompt:
            return [*ids, tokenizer.get_command("<|assistant|>")], [*mask, 0]
        ends = [tokenizer.eos_token_id] if messages and messages[-1]["role"] == "assistant" else []
        return ids + ends, mask + [1] * len(ends)

    def split(self, history):
        """(what to keep of a long `history`, its rounds, of which the oldest may be dropped)."""
        first = 1 if history and history[0]["role"] == "system" else 0
        rounds = []
        for message in history[first:]:
            if message["role"] == "user" or not rounds:
                rounds.append([])
            rounds[-1].append(message)
        return list(history[:first]), rounds

    def answered(self, process_response, text, query, history, role="user"):
        """(response, history with the new messages) for the text of an answer."""
        return process_response(text, [*history, {"role": role, "content": query}])

    def response(self, text, history):
        """(response, history with the messages of `text`); the response is a dictionary if it calls a tool.

        Where the system message offers tools, the call's parameters are read, as literals: nothing is evaluated. If
        that fails, and where no tools are offered, the response is {"name", "content"}.
        """
        history = list(history)
        for part in text.split("<|assistant|>"):
            metadata, newline, content = part.partition("\n")
            metadata, content = (metadata.strip(), content.strip()) if newline else ("", part.strip())
            history.append({"role": "assistant", "metadata": metadata, "content": content})
        if not metadata:
            return with_date(content), history
        parameters = parameters_in(content) if offers_tools(history) else None
        kind, value = ("content", content) if parameters is None else ("parameters", parameters)
        return {"name": metadata, kind: value}, history

    def is_undecided(self, text, history):
        """Whether the first line could still become the name of a tool."""
        return offers_tools(history) and "\n" not in text.rpartition("<|assistant|>")[2]


INTERPRETER = "interpreter"  # the tool whose call is code
OFFER = "Answer the following questions as best as you can. You have access to the following tools:"  # as trained


def from_openai(message):
    """A message of OpenAI's API as messages of ChatGLM3. Raises ValueError for what is not text."""
    if not isinstance(message, dict):
        raise ValueError(f'a message must be {{"role": ..., "content": ...}}, got {message!r:.80}')
    role = {"tool": "observation", "developer": "system"}.get(message.get("role"), message.get("role"))
    content = message.get("content") or ""
    if isinstance(content, (list, tuple)):  # parts
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f'content must be text, or parts {{"type": "text", "text": ...}}, got {content!r:.80}')
        content = "".join(part["text"] for part in content)
    calls = message.get("tool_calls") or []
    if content or not calls:
        kept = {key: message[key] for key in ("metadata", "tools") if key in message}
        yield {**kept, "role": role, "content": content}
    for call in calls:
        function = call.get("function", call)
        written = ", ".join(f"{key}={value!r}" for key, value in arguments_of(function).items())
        content = f"```python\ntool_call({written})\n```"
        yield {"role": "assistant", "metadata": function["name"], "content": content}


def arguments_of(function):
    """The arguments of a call in OpenAI's API, a dictionary or its JSON. Raises ValueError for anything else."""
    given = arguments = function.get("arguments") or {}
    if isinstance(given, str):
        try:
            arguments = json.loads(given)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of {function.get('name')!r} must be a JSON object, got {given!r:.80}")
    return arguments


def as_generated(content, name):
    """An answer's text as ChatGLM3 writes it: the name of a tool that it calls is the first line."""
    return f"{name}\n {content}" if name else content


def offers_tools(history):
    return bool(history) and history[0]["role"] == "system" and "tools" in history[0]


def check_role(role):
    if role not in ROLES:
        raise ValueError(f"role={role!r} is unknown: use one of {ROLES}.")


def parameters_in(content):
    """The parameters of the call between the first and the last line of a message; None if that is no call."""
    return called_with("\n".join(content.split("\n")[1:-1]))


def called_with(code):
    """The parameters of `tool_call(key=value, ...)`, whose values are literals; None for any other code."""
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or getattr(call.func, "id", None) != "tool_call" or call.args:
            return None
        if any(keyword.arg is None for keyword in call.keywords):  # **other
            return None
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # all that a broken text can cause
        return None


def with_date(text):
    return text.replace(PLACEHOLDER, TRAINING_DATE)


def conversation(family):
    """How the models of this family write a conversation."""
    return Roles() if family == "chatglm3" else Rounds()
