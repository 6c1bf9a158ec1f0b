"""transformers' `generate` on the model: every decoding method and cache gives the ids it should."""

import copy

import pytest
import torch
from chatglm2.tokenization_chatglm import ChatGLMTokenizer
from chatglm2.transformers_compat import DynamicCache
from conftest import SHARED, TINY
from model_helpers import CLOSE, Spell, logits, some_ids
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer


def test_tokenizer_position_ids_match_the_defaults(make_model, padded_batch):
    """`generate` gives the same ids with the tokenizer's position_ids and without."""
    model, (ids, mask, _) = make_model(), padded_batch
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, position_ids=positions, **settings), model.generate(ids, **settings))


@pytest.mark.needs_transformers("4.51", "prefill_chunk_size")
def test_chunked_prefill_matches_full_prefill(make_model):
    """`generate(prefill_chunk_size=...)` gives the same ids."""
    model, ids = make_model(), some_ids(length=23)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    whole = model.generate(ids, **settings)
    chunked = model.generate(ids, prefill_chunk_size=5, past_key_values=DynamicCache(), **settings)  # 5.0.0 makes none
    assert torch.equal(chunked, whole)


@pytest.mark.needs_transformers("4.42", "static caches that any model can use")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_static_cache_matches_dynamic_cache(make_model, padded_batch, attention):
    """`cache_implementation="static"` gives the ids of the dynamic cache, in a padded batch."""
    model, (ids, mask, _) = make_model(attention=attention), padded_batch
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    quick = {"disable_compile": True} if hasattr(GenerationConfig(), "disable_compile") else {}
    static = model.generate(ids, cache_implementation="static", **quick, **settings)
    assert torch.equal(static, model.generate(ids, **settings))


def test_beam_scores_match_recomputed_log_probabilities(make_model):
    """The score of a beam is the log probability of its new tokens, recomputed in one pass."""
    model, ids = make_model(), some_ids(rows=2, length=5)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=3,
        num_return_sequences=3,
        length_penalty=0.0,  # else a mean, over the new tokens or, once, over the prompt, too
        max_new_tokens=5,
        eos_token_id=None,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = logits(model, out.sequences).log_softmax(-1)[:, 4:-1]
    new = out.sequences[:, 5:]
    recomputed = scores.gather(-1, new[..., None]).squeeze(-1).sum(-1)
    torch.testing.assert_close(out.sequences_scores, recomputed, **CLOSE)


@pytest.mark.needs_transformers("4.40", "assisted decoding with a cache that is no tuple")
def test_assisted_decoding_matches_greedy(make_model):
    """A smaller assistant proposes tokens; the ids are those of greedy decoding."""
    model, assistant = make_model(), make_model(num_layers=1, seed=1)
    ids = some_ids(rows=1, length=8).repeat(1, 2)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
    greedy = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **settings), greedy)


@pytest.mark.needs_transformers("4.42", "prompt lookup with any cache")
def test_prompt_lookup_matches_greedy(make_model):
    """`prompt_lookup_num_tokens` gives the ids of greedy decoding."""
    model, ids = make_model(), some_ids(rows=1, length=8).repeat(1, 2)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **settings), model.generate(ids, **settings))


def test_generate_from_embeddings(make_model):
    """inputs_embeds give the logits and the greedy continuation of their ids."""
    model, ids = make_model(), some_ids()
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, logits(model, ids), **CLOSE)
    new = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(new[:, -5:], model.generate(ids, max_new_tokens=5, do_sample=False)[:, -5:])


@pytest.fixture
def compiling():
    """(arguments of generate that compile a step with a static cache, the graphs that it makes)."""
    from transformers import CompileConfig

    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compile_config}, graphs


@pytest.mark.needs_transformers("4.57", "a static cache that counts its own tokens while compiled")
@pytest.mark.parametrize("bits", [0, 4])
def test_static_decoding_compiles_once(make_model, compiling, bits):
    """generate(cache_implementation="static") compiles one full graph and never recompiles as the answer grows."""
    model, ids, (options, graphs) = make_model().quantize(bits), some_ids(), compiling
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    compiled = model.generate(ids, **options, **settings)
    assert len(graphs) == 1
    assert torch.equal(compiled, model.generate(ids, **settings))


@pytest.mark.needs_transformers("4.57", "a static cache that counts its own tokens while compiled")
def test_rounds_of_a_compiled_chat_share_one_graph(tiny_model, tokenizer, compiling):
    """Every round has the room of max_length, so none but the first waits for the compiler."""
    options, graphs = compiling
    first, history = tiny_model.chat(tokenizer, "what is the sun", temperature=0, **options)
    second, _ = tiny_model.chat(tokenizer, "how old is it", history, temperature=0, **options)
    *_, (streamed, _) = tiny_model.stream_chat(tokenizer, "how old is it", history, temperature=0, **options)
    assert len(graphs) == 1
    assert first == tiny_model.chat(tokenizer, "what is the sun", temperature=0)[0]
    assert second == streamed == tiny_model.chat(tokenizer, "how old is it", history, temperature=0)[0]


@torch.no_grad()
@pytest.mark.needs_transformers("5.23.0", "a generate that drops masks which say nothing")
def test_padded_decode_step_never_syncs_with_the_device(make_model, monkeypatch):
    """Reading the mask of a padded batch is allowed before and in prefill, and never in a decode step."""
    model, asked, ask = make_model(), [], torch.Tensor.__bool__
    ids = some_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    steps = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: asked.append(len(steps)) or ask(tensor))
    forward = model.transformer.forward

    def counted(*args, **kwargs):
        steps.append(None)
        asked.clear()
        outputs = forward(*args, **kwargs)
        assert len(steps) == 1 or not asked, "forward read the value of a tensor"
        return outputs

    monkeypatch.setattr(model.transformer, "forward", counted)
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert len(steps) == 6
    monkeypatch.undo()
    alone = model.generate(ids[:1, 3:], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(padded[:1, 3:], alone)


@pytest.mark.needs_transformers("5.23", "continuous batching on a CPU without a paged| prefix")
def test_continuous_batching_matches_single_prompts(tiny_model, tokenizer):
    """`generate_batch` with prompts of different lengths in one paged cache answers each as if alone."""
    from transformers import ContinuousBatchingConfig

    model, queries = copy.deepcopy(tiny_model), ["你好", "早上好", "谢谢"]
    prompts = [tokenizer(tokenizer.build_prompt(query))["input_ids"] for query in queries]
    config = GenerationConfig(max_new_tokens=32, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    results = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    answers = [tokenizer.decode(results[key].generated_tokens) for key in sorted(results)]
    assert answers == [model.chat(tokenizer, query, do_sample=False)[0] for query in queries]


@pytest.mark.needs_transformers("5.23", "continuous batching on a CPU without a paged| prefix")
def test_continuous_batching_encodes_a_prefix_once(tiny_model, tokenizer):
    """A second turn is encoded from its last full block on, and each request has its temperature, top_p and top_k."""
    from transformers import ContinuousBatchingConfig

    model, seen, history = copy.deepcopy(tiny_model), [], []
    model.get_input_embeddings().register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50}  # without, no request may ask for it
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(eos_token_id=2, pad_token_id=0, use_cache=False, **sampled),
        continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=32, per_request_processors=True),
    )
    manager.start()

    def answer(query, **settings):
        ids = tokenizer(tokenizer.build_prompt(query, history))["input_ids"]
        request = manager.add_request(ids, max_new_tokens=40, **settings)
        return len(ids), tokenizer.decode(manager.get_result(request, timeout=30).generated_tokens)

    try:
        for _ in range(3):
            seen.clear()
            length, text = answer("what is the sun", top_k=1)
            assert seen[0] == length if not history else length % 16 <= seen[0] < 60 < length, (length, seen)
            history.append(("what is the sun", text))
        history.clear()
        greedy = model.chat(tokenizer, "what is the sun", do_sample=False)[0]
        everything = {"top_k": model.config.padded_vocab_size, "top_p": 1.0, "temperature": 1.0}
        for one in ({"top_k": 1}, {"top_p": 0.01}, {"temperature": 0.01}):
            assert answer("what is the sun", **{**everything, **one})[1] == greedy
        assert answer("what is the sun", **{**everything, "temperature": 50.0})[1] != greedy
    finally:
        manager.stop(block=True)


FUNCTION = """Here it is:

def sign(x):
    if x < 0:
        return -1
    else:

        return x > 0  # 真
"""


@pytest.mark.parametrize("name", ["tiny", "released"])
def test_streamers_keep_indentation(make_model, name):
    """The lines of a Python function arrive with all their spaces, from TextStreamer and TextIteratorStreamer."""
    file = (TINY if name == "tiny" else SHARED / "chatglm2-6b") / "tokenizer.model"
    if not file.exists():
        pytest.skip("the released tokenizer.model is not part of the project")
    tokenizer = ChatGLMTokenizer(str(file))
    ids = [*tokenizer.encode(FUNCTION, add_special_tokens=False), tokenizer.eos_token_id]
    model = make_model(padded_vocab_size=len(tokenizer), hidden_size=16, ffn_hidden_size=16, num_layers=1)
    inputs = tokenizer("x", return_tensors="pt")
    for _ in range(2):  # the same streamer again
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(
            **inputs, streamer=streamer, do_sample=False, max_new_tokens=len(ids), logits_processor=[Spell(ids)]
        )
        assert "".join(streamer) == FUNCTION


def test_streamer_begins_behind_the_prompt(make_model, tokenizer, capsys):
    """A prompt that ends with a line feed: the first line is indented, too."""
    prompt, more = "def f(x):\n", "    return x\n    # x"
    ids = tokenizer.encode(prompt + more, add_special_tokens=False)
    start = tokenizer(prompt, return_tensors="pt")
    ids = ids[start["input_ids"].shape[1] - 2 :]
    model = make_model(padded_vocab_size=len(tokenizer))
    for skip, want in ((True, more), (False, prompt + more)):
        streamer, spell = TextStreamer(tokenizer, skip_prompt=skip), Spell(ids)
        model.generate(**start, streamer=streamer, do_sample=False, max_new_tokens=len(ids), logits_processor=[spell])
        assert capsys.readouterr().out == want + "\n"
