"""What the original offers to other people's code: each name is kept, or dropped on purpose, with the reason.

Names, signatures and values are those of its newest files on transformers 4.30.2.
"""

import importlib
import inspect

import pytest
import torch
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMModel,
    PrefixEncoder,
)
from chatglm2.quantization import quantize
from conftest import TINY
from model_helpers import CLOSE, GREEDY, logits, some_ids

MODULES = {
    "configuration_chatglm": "ChatGLMConfig",
    "modeling_chatglm": "ChatGLMForConditionalGeneration ChatGLMForSequenceClassification ChatGLMModel "
    "ChatGLMPreTrainedModel GLMTransformer GLMBlock SelfAttention CoreAttention MLP RMSNorm Embedding PrefixEncoder "
    "RotaryEmbedding InvalidScoreLogitsProcessor",
    "tokenization_chatglm": "ChatGLMTokenizer SPTokenizer",
    "quantization": "QuantizedLinear quantize compress_int4_weight extract_weight_to_half W8A16Linear",
}
DROPPED = {
    "CoreAttention": "attention is a function, chosen by attn_implementation",
    "RotaryEmbedding": "the angles are computed in forward; inv_freq is ignored when a state dict is loaded",
    "compress_int4_weight": "quantization_format.pack",
    "extract_weight_to_half": "quantization_format.dequantize_weight",
    "W8A16Linear": "an autograd function of its own; the op has a backward pass",
}
METHODS = {  # the parameters that callers pass, in the original's order
    "__init__": "config empty_init device",
    "forward": "input_ids position_ids attention_mask past_key_values inputs_embeds labels use_cache output_attentions "
    "output_hidden_states return_dict return_last_logit",
    "quantize": "bits empty_init device",
    "process_response": "response",
    "build_inputs": "tokenizer query history",
    "build_stream_inputs": "tokenizer query history",
    "chat": "tokenizer query history max_length num_beams do_sample top_p temperature logits_processor",
    "stream_chat": "tokenizer query history past_key_values max_length do_sample top_p temperature logits_processor "
    "return_past_key_values",
    "stream_generate": "input_ids generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn "
    "return_past_key_values",
    "get_masks": "input_ids past_key_values padding_mask",
    "get_position_ids": "input_ids device",
}


@pytest.mark.parametrize("module", MODULES)
def test_names_of_the_modules(module):
    """Every name is importable from its module, unless DROPPED says what takes its place."""
    found = importlib.import_module(f"chatglm2.{module}")
    missing = {name for name in MODULES[module].split() if not hasattr(found, name)}
    assert missing == DROPPED.keys() & set(MODULES[module].split())


@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_the_methods(method):
    """The original's parameters come first, in its order."""
    parameters = list(inspect.signature(getattr(ChatGLMForConditionalGeneration, method)).parameters)
    parameters = [name for name in parameters if name != "self"]
    assert parameters[: len(METHODS[method].split())] == METHODS[method].split()


def test_attributes_of_the_network(make_model):
    """What converters, device maps and wrapping policies read of ChatGLMModel and its parts."""
    model, ids = make_model(pre_seq_len=5), some_ids()
    network = model.transformer
    values = {name: getattr(network, name) for name in ("num_layers", "kv_channels", "seq_length", "pre_seq_len")}
    assert values == {"num_layers": 3, "kv_channels": 16, "seq_length": 256, "pre_seq_len": 5}
    assert network.multi_query_group_num == 2 and network.encoder.num_layers == len(network.encoder.layers) == 3
    assert network.embedding(ids).shape == (2, 12, 64)
    assert network.encoder.final_layernorm.weight.shape == (64,)
    assert type(network.encoder.layers[0]).__name__ == "GLMBlock" and list(model._no_split_modules) == ["GLMBlock"]


def test_prefix_encoder_and_get_prompt(make_model):
    """prefix_encoder(ids [B, P]) is [B, P, 2 L G D]; get_prompt holds the same values as the cache wants them."""
    model = make_model(pre_seq_len=5, prefix_projection=True)
    network = model.transformer
    rows = network.prefix_encoder(torch.arange(5).expand(2, -1))
    assert rows.shape == (2, 5, 3 * 2 * 2 * 16)
    prompt = network.get_prompt(2, device="cpu", dtype=torch.float32)
    assert len(prompt) == 3
    for i, pair in enumerate(prompt):
        for j, got in enumerate(pair):
            want = rows.view(2, 5, 6, 2, 16)[:, :, 2 * i + j].transpose(1, 2)  # (B, G, P, D)
            torch.testing.assert_close(got, want)


def test_masks_and_positions(make_model, padded_batch):
    """get_masks is full_attention_mask: what is passed on gives the logits of attention_mask, with a cache, too."""
    model, (ids, mask, _) = make_model(cls=ChatGLMModel), padded_batch
    assert torch.equal(model.get_position_ids(ids, "cpu"), torch.arange(9).expand(3, -1))
    full = model.get_masks(ids, None, padding_mask=mask)
    assert full.shape == (3, 1, 9, 9) and full.dtype == torch.bool
    positions = model.default_positions(mask, 0, ids)
    got = model(ids, positions, full_attention_mask=full, use_cache=True)
    want = model(ids, attention_mask=mask, use_cache=True)
    real = mask.bool()
    torch.testing.assert_close(got.last_hidden_state[real], want.last_hidden_state[real])
    longer = torch.cat((mask, torch.ones(3, 2, dtype=torch.long)), dim=1)
    full = model.get_masks(ids[:, :2], got.past_key_values, padding_mask=longer)
    positions = model.default_positions(longer, 9, ids[:, :2])
    got = model(ids[:, :2], positions, past_key_values=got.past_key_values, full_attention_mask=full)
    want = model(ids[:, :2], attention_mask=longer, past_key_values=want.past_key_values)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state)


def test_build_stream_inputs(make_model, tokenizer):
    """The new round alone, without [gMASK] sop and without the space that a text begins with."""
    model = make_model(padded_vocab_size=1664)
    first = model.build_stream_inputs(tokenizer, "你好")
    assert torch.equal(first["input_ids"], model.build_inputs(tokenizer, "你好")["input_ids"])
    inputs = model.build_stream_inputs(tokenizer, "再见", [("你好", "你好！")])
    text = "\n\n[Round 2]\n\n问：再见\n\n答："
    assert tokenizer.decode(inputs["input_ids"][0].tolist()) == text
    assert inputs["input_ids"].tolist() == [tokenizer.encode(text, add_special_tokens=False)[1:]]
    assert inputs["attention_mask"].all() and inputs.keys() == first.keys()


def test_load_state_dict_of_an_old_file(make_model):
    """Strict, with the buffer that the original's files hold; any other unknown name is still an error."""
    for cls, prefix in ((ChatGLMForConditionalGeneration, "transformer."), (ChatGLMModel, "")):
        model = make_model(cls=cls)
        state = dict(model.state_dict())
        state[prefix + "rotary_pos_emb.inv_freq"] = torch.ones(4)
        model.load_state_dict(state, strict=True)
        assert prefix + "rotary_pos_emb.inv_freq" in state
        with pytest.raises(RuntimeError, match="Unexpected.*rotary_pos_emb.other"):
            model.load_state_dict({**state, prefix + "rotary_pos_emb.other": torch.ones(4)}, strict=True)


# `device` and `empty_init`


@pytest.mark.parametrize("cls", [ChatGLMModel, ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification])
def test_device_and_empty_init_of_the_constructors(make_config, cls):
    """device="meta" builds there; empty_init leaves the values out; by default every parameter gets one."""
    config = make_config(pre_seq_len=3)
    assert {p.device.type for p in cls(config, device="meta").parameters()} == {"meta"}
    with pytest.MonkeyPatch.context() as patch:  # `normal_` may be called, but on a device without memory
        patch.setattr(
            torch.Tensor, "normal_", lambda x, *args, **kwargs: x if x.is_meta else pytest.fail("initialized")
        )
        empty = cls(config, empty_init=True, device="cpu")
    assert {p.device.type for p in empty.parameters()} == {"cpu"}
    full = cls(config)
    assert all(p.std() > 0 for name, p in full.named_parameters() if p.dim() == 2)
    empty.load_state_dict(full.state_dict())
    with pytest.raises(ValueError, match="device='nonsense' is not a device: use 'cpu', 'cuda'"):
        cls(config, device="nonsense")


def test_device_of_from_pretrained():
    """The original's quick start: device= is where the model is loaded, never an argument that disappears."""
    load = ChatGLMForConditionalGeneration.from_pretrained
    assert {p.device.type for p in load(TINY, device="meta").parameters()} == {"meta"}
    assert load(TINY, device=torch.device("cpu"), empty_init=False).device.type == "cpu"
    with pytest.raises(ValueError, match="'nonsense' is not a device"):
        load(TINY, device="nonsense")
    with pytest.raises(ValueError, match="device='cpu' and device_map='auto' were given: pass one"):
        load(TINY, device="cpu", device_map="auto")
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError, ValueError), match="(?i)cuda|nvidia"):
            load(TINY, device="cuda")


def test_device_of_quantize(make_model):
    """quantize(bits, device=) moves what it has quantized, as a method, and as the function on the encoder."""
    model, ids = make_model(), some_ids()
    want = logits(make_model().quantize(8), ids)
    assert torch.equal(logits(model.quantize(bits=8, empty_init=False, device="cpu"), ids), want)
    assert make_model().quantize(4, device="meta").transformer.encoder.layers[0].mlp.dense_h_to_4h.weight.is_meta
    other = make_model()
    assert quantize(other.transformer.encoder, 8, empty_init=False, device="cpu") is other.transformer.encoder
    assert torch.equal(logits(other, ids), want)


def test_device_map_of_the_original_recipe():
    """The map that the original's utils.py wrote for several GPUs, with names that this package does not have."""
    device_map = {
        "transformer.embedding.word_embeddings": "cpu",
        "transformer.encoder.final_layernorm": "cpu",
        "transformer.output_layer": "cpu",
        "transformer.rotary_pos_emb": "cpu",
        "lm_head": "cpu",
        **{f"transformer.encoder.layers.{i}": "cpu" for i in range(4)},
    }
    model = ChatGLMForConditionalGeneration.from_pretrained(TINY, device_map=device_map)
    assert torch.equal(
        logits(model, some_ids()), logits(ChatGLMForConditionalGeneration.from_pretrained(TINY), some_ids())
    )


# Values of a new module, and facts in the configuration's dictionary


def test_initial_values_of_new_modules(make_config):
    """A prefix starts from N(0, 1), its projection and a classifier as nn.Linear does; other weights are narrow."""
    torch.manual_seed(0)
    model = ChatGLMForSequenceClassification(make_config(pre_seq_len=64, prefix_projection=True, num_labels=64))
    encoder = model.transformer.prefix_encoder
    assert 0.97 < encoder.embedding.weight.std() < 1.03
    for linear in (encoder.trans[0], encoder.trans[2], model.classifier_head):
        limit = linear.in_features**-0.5
        assert 0.95 * limit < linear.weight.abs().max() <= limit and 0.5 * limit < linear.bias.abs().max() <= limit
    assert 0.018 < model.transformer.output_layer.weight.std() < 0.022
    assert isinstance(encoder, PrefixEncoder)


def test_config_dictionary_has_the_key_value_heads(make_config):
    """Tools read num_key_value_heads from config.to_dict() and config.json; it follows the other values."""
    config = make_config()
    assert config.to_dict()["num_key_value_heads"] == 2
    assert ChatGLMConfig.from_dict({**config.to_dict(), "multi_query_attention": False}).num_key_value_heads == 4
    assert '"num_key_value_heads": 2' in config.to_json_string()


# How other programs call it


def test_calls_of_an_api_server(make_model, tokenizer):
    """The original's api.py and openai_api.py: a history of lists, max_length, and a round with an empty message."""
    model = make_model(padded_vocab_size=1664, seq_length=512)
    response, history = model.chat(tokenizer, "你好", history=[], max_length=60, top_p=0.7, temperature=0.95)
    assert history == [("你好", response)]
    response, _ = model.chat(tokenizer, "", history=[["你好", None]], max_length=60)
    pieces = list(model.stream_chat(tokenizer, "你好", [["你", "好"]], max_length=60, top_p=0.7, temperature=0.95))
    assert isinstance(response, str) and [query for query, _ in pieces[-1][1]] == ["你", "你好"]


def test_calls_of_a_model_worker(make_model, tokenizer):
    """FastChat's way: tokenizer([prompt]), stream_generate with keywords, decode what follows the prompt."""
    model = make_model(padded_vocab_size=1664, seq_length=512)
    inputs = tokenizer(["[Round 1]\n\n问：你好\n\n答："], return_tensors="pt").to(model.device)
    settings = {"max_length": 60, "do_sample": True, "top_p": 0.7, "repetition_penalty": 1.0, "temperature": 0.95}
    steps = list(model.stream_generate(**inputs, **settings, logits_processor=[]))
    length = inputs["input_ids"].shape[1]
    text = model.process_response(tokenizer.decode(steps[-1].tolist()[0][length:]))
    assert isinstance(text, str) and steps[0].shape == (1, length + 1)


def test_calls_of_a_training_template(tokenizer):
    """LLaMA-Factory's way: special tokens by name, text by encode, a bos in front of every round if there is one."""

    def encode(*elements):
        ids = []
        for element in elements:
            if isinstance(element, dict):
                ids.append(tokenizer.convert_tokens_to_ids(element["token"]))
            else:
                ids += tokenizer.encode(element, add_special_tokens=False)
        return ids

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt = bos + encode({"token": "[gMASK]"}, {"token": "sop"}, "[Round 1]\n\n问：你好\n\n答：")
    assert prompt == tokenizer(tokenizer.build_prompt("你好"))["input_ids"]
    assert encode("你好！") + [tokenizer.eos_token_id] == tokenizer.encode("你好！", add_special_tokens=False) + [2]
    assert tokenizer.add_special_tokens({"additional_special_tokens": []}) == 0 and tokenizer.pad_token_id == 0


@pytest.mark.parametrize("projection", [False, True])
def test_published_p_tuning_loop(make_model, tmp_path, projection):
    """Its trainer's way: checkpointing, inputs that require grad, only the prefix saved, and loaded by its names."""
    model = make_model(pre_seq_len=6, prefix_projection=projection)
    model.transformer.prefix_encoder.dropout.p = 0.0
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    ids = some_ids()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = {name: p for name, p in model.state_dict().items() if "prefix_encoder" in name}
    torch.save(state, tmp_path / "pytorch_model.bin")
    other = make_model(pre_seq_len=6, prefix_projection=projection)
    before = logits(other, ids, use_cache=False)
    start = "transformer.prefix_encoder."
    loaded = torch.load(tmp_path / "pytorch_model.bin")
    other.transformer.prefix_encoder.load_state_dict(
        {name[len(start) :]: value for name, value in loaded.items() if name.startswith(start)}
    )
    after = logits(other, ids, use_cache=False)
    torch.testing.assert_close(after, logits(model.eval(), ids, use_cache=False), **CLOSE)
    assert (after - before).abs().max() > 0.1


def test_peft_prefix_tuning(make_model):
    """PEFT's own prefix tuning trains and generates: it reads from the configuration how many keys a token has."""
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8, inference_mode=False)
    model = peft.get_peft_model(make_model(), config)
    ids = some_ids()
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    got, slow = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY), ids
    for _ in range(12):
        slow = torch.cat((slow, logits(model, slow, attention_mask=torch.ones_like(slow))[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(got, slow)
