"""lib/sessions.py: a turn encodes only itself, and is answered as without a cache."""

import json
from contextlib import closing, contextmanager
from itertools import islice

import pytest
from conftest import TINY
from sessions import Sessions

TURNS = next(
    turns
    for turns in (json.loads(line)["turns"] for line in (TINY / "dialogues.jsonl").open(encoding="utf-8"))
    if len(turns) == 3
)
TURNS = [tuple(turn) for turn in TURNS]


@pytest.fixture
def sessions(tiny_model, tokenizer):
    return Sessions(tiny_model, tokenizer)


@contextmanager
def tokens_seen(model):
    """A list of the number of tokens that each forward gets."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    try:
        yield seen
    finally:
        hook.remove()


def new_round(tokenizer, number, query):
    """The number of tokens that a round adds, without the space that every text begins with."""
    return len(tokenizer.encode("\n\n" + tokenizer.build_round(number, query), add_special_tokens=False)) - 1


def ask(sessions, query, history=(), stop_after=None, key="a", **settings):
    """The last Progress, after which the stream was closed if `stop_after` texts have come."""
    settings = {"temperature": 0, "max_new_tokens": 60, **settings}
    with closing(sessions.stream(key, query, list(history), **settings)) as steps:
        return list(islice(steps, stop_after))[-1]


def as_without_cache(sessions, query, history=(), system=None, **settings):
    settings = {"do_sample": False, "max_new_tokens": 60, **settings}
    return sessions.model.chat(sessions.tokenizer, query, history=list(history), system=system, **settings)[0]


def test_a_turn_encodes_only_itself(sessions):
    """The network sees the new round once, then one token a step; the answers are those learned."""
    for n, (query, answer) in enumerate(TURNS):
        with tokens_seen(sessions.model) as seen:
            progress = ask(sessions, query, TURNS[:n])
        assert progress.text == answer
        if n:
            assert seen[0] == progress.encoded == new_round(sessions.tokenizer, n + 1, query)
        assert set(seen[1:]) == {1}
    assert progress.context == len(sessions.idle["a"].ids) - 1 < 200 and progress.rate > 0 and progress.first > 0


@pytest.mark.parametrize("number", [0, 1, 2])
def test_retry_and_edit(sessions, number):
    """A round that is asked again, as it was or edited, is encoded alone, and answered as without a cache."""
    for n, (query, _) in enumerate(TURNS):
        ask(sessions, query, TURNS[:n])
    for query in (TURNS[number][0], "谢谢"):
        progress = ask(sessions, query, TURNS[:number])
        assert progress.text == as_without_cache(sessions, query, TURNS[:number])
        assert progress.encoded <= new_round(sessions.tokenizer, number + 1, query)


@pytest.mark.needs_transformers("4.42", "prompt lookup with any cache")
def test_prompt_lookup_leaves_the_cache_right(sessions):
    """With drafts from the conversation: the same answers, also after one that was stopped among drafted tokens."""
    lookup, asked = {"prompt_lookup_num_tokens": 10}, "早上好"
    repeated = [(asked, "早上好！愿你今天一切顺利，记得吃早餐。")]
    for stop_after in (None, 2, 5):
        ask(sessions, asked, repeated, stop_after, **lookup)
        progress = ask(sessions, "谢谢", [*repeated, (asked, "早上好！")], **lookup)
        assert progress.text == as_without_cache(sessions, "谢谢", [*repeated, (asked, "早上好！")])


@pytest.mark.parametrize("how", ["stop", "limit"])
def test_an_answer_that_was_cut(sessions, how):
    """Stopped, or cut by max_new_tokens: the next turn encodes one token more, the one that the cache lacks."""
    query, cut = TURNS[0][0], {"stop": {"stop_after": 5}, "limit": {"max_new_tokens": 5}}[how]
    said = ask(sessions, query, **cut).text
    assert said and TURNS[0][1].startswith(said) and said != TURNS[0][1]
    history = [(query, said)]
    progress = ask(sessions, "谢谢", history)
    assert progress.text == as_without_cache(sessions, "谢谢", history)
    assert progress.encoded == new_round(sessions.tokenizer, 2, "谢谢") + 1


def test_what_the_cache_does_not_hold_is_encoded(sessions):
    """An imported conversation, another system prompt, an answer that was changed, a session that was lost."""
    ask(sessions, *TURNS[0][:1])
    other = [("你好", "你好！"), ("谢谢", "不客气。")]
    for history, system in (
        (other, ""),
        (other, "请简短回答。"),
        (TURNS[:1], "请简短回答。"),
        ([(TURNS[0][0], "不知道。")], ""),
    ):
        assert ask(sessions, "再见", history, system=system).text == as_without_cache(
            sessions, "再见", history, system=system
        )
    progress = ask(sessions, TURNS[1][0], TURNS[:1])
    assert progress.text == TURNS[1][1]
    sessions.drop("a")
    again = ask(sessions, TURNS[1][0], TURNS[:1])
    whole = sessions.tokenizer(sessions.tokenizer.build_prompt(TURNS[1][0], TURNS[:1]))["input_ids"]
    assert again.text == TURNS[1][1] and again.encoded == len(whole) > progress.encoded


def test_users_keep_their_own(sessions):
    """Two users in turns, and one who asks twice at once, as from two scripts: each is answered as if alone."""
    ask(sessions, TURNS[0][0], key="a")
    ask(sessions, "你好", key="b")
    with closing(sessions.stream("a", TURNS[1][0], TURNS[:1], temperature=0, max_new_tokens=60)) as first:
        next(first)
        assert ask(sessions, "你好", key="a").text == as_without_cache(sessions, "你好")
        assert [progress.text for progress in first][-1] == TURNS[1][1]
    assert ask(sessions, TURNS[2][0], TURNS[:2], key="a").text == TURNS[2][1]
    assert not sessions.busy and list(sessions.idle) == ["b", "a"]


def test_limits(sessions):
    """The sessions used last stay, as many as `most` and `most_bytes` allow; 0 keeps none."""
    sessions.most = 2
    for key in "abac":
        ask(sessions, "你好", key=key)
    assert list(sessions.idle) == ["a", "c"]
    sessions.most_bytes = sessions.idle["c"].nbytes()
    config = sessions.model.config
    assert sessions.most_bytes >= 30 * 2 * 4 * config.num_layers * config.multi_query_group_num * config.kv_channels
    ask(sessions, "你好", key="d")
    assert list(sessions.idle) == ["d"]
    sessions.most = 0
    assert ask(sessions, "你好", key="d").text == as_without_cache(sessions, "你好") and not sessions.idle


def test_a_dropped_or_broken_session_is_not_kept(sessions):
    """Dropped during its answer, or ended by an error of the network. A prompt that is too long leaves it as it was."""
    with closing(sessions.stream("a", "你好", [], max_new_tokens=60)) as steps:
        next(steps)
        sessions.drop("a")
    assert not sessions.idle and not sessions.busy
    ask(sessions, TURNS[0][0])
    with pytest.raises(ValueError, match="exceed seq_length"):
        ask(sessions, "sun " * 1100, TURNS[:1])
    assert ask(sessions, TURNS[1][0], TURNS[:1]).encoded == new_round(sessions.tokenizer, 2, TURNS[1][0])

    def out_of_memory(*args):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        ask(sessions, "再见", TURNS[:2], logits_processor=[out_of_memory])
    assert not sessions.idle and not sessions.busy
