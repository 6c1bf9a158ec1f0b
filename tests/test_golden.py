"""The original implementation's figures (float32, CPU): `golden/NAME.json` with its tensors in `NAME.safetensors`.

A case holds a configuration, a state dict (`sd.` keys), and calls with their inputs and outputs. The original keeps
sequences first; this package keeps batches first and returns a Cache of (B, G, S, D).
"""

import copy
import json

import pytest
import torch
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMForSequenceClassification
from conftest import ROOT
from safetensors.torch import load_file

GOLDEN = ROOT / "tests" / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json") if "calls" in json.loads(path.read_text()))


def load(name):
    """(case, tensors, model with the case's weights)."""
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    classifies = case.get("model_class", "").endswith("Classification")
    model = (ChatGLMForSequenceClassification if classifies else ChatGLMForConditionalGeneration)(
        ChatGLMConfig(**{key: value for key, value in case["config"].items() if key not in ("auto_map", "model_type")})
    )
    state = {key[3:]: value for key, value in tensors.items() if key.startswith("sd.") and "inv_freq" not in key}
    model.load_state_dict(state)
    return case, tensors, model.float().eval()


def layer_pair(cache, i):
    if hasattr(cache, "layers"):
        return cache.layers[i].keys, cache.layers[i].values
    return cache.key_cache[i], cache.value_cache[i]


def assert_close(got, want, rows=None):
    assert got.shape == want.shape
    if rows is not None:
        got, want = got[rows], want[rows]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4, equal_nan=True)


def real_rows(call, inputs):
    """[B, T], True for real tokens, or None without padding: the original's rows of padding are undefined."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.all():
        return None
    return mask[:, -inputs["input_ids"].shape[1] :].bool()


@pytest.mark.parametrize("name", CASES)
def test_case_matches_the_original(name):
    """Logits, loss, hidden states, cache, generated ids and streams of every call that the original gets right."""
    case, tensors, model = load(name)
    caches, checked = {}, 0
    for call in case["calls"]:
        if "quirk" in call or "raises" in call:
            continue  # a defect of the original, or an error that this package does not share
        inputs = {key: tensors[value] for key, value in call["inputs"].items()}
        checked += 1
        if call["object"] == "model.generate":
            assert model.generate(**inputs, **call["kwargs"]).tolist() == call["output_ids"]
            continue
        if call["object"] == "model.stream_generate":
            steps = list(model.stream_generate(**inputs, **call["kwargs"]))
            assert len(steps) == call["yields"] and steps[-1].tolist() == call["last"]
            continue
        kwargs = dict(call["kwargs"])
        if kwargs.pop("return_last_logit", False):
            kwargs["logits_to_keep"] = 1
        past = copy.deepcopy(caches.get(call["past_from"]))
        with torch.no_grad():
            out = (model if call["object"] == "model" else model.transformer)(**inputs, past_key_values=past, **kwargs)
        rows = real_rows(call, inputs)
        if kwargs.get("return_dict") is False:
            assert_close(out[0], tensors[call["outputs"]["logits"]], rows)
            continue
        caches[call["name"]] = out.past_key_values
        for key, want in call["outputs"].items():
            if key == "past_key_values":
                cached = None
                if rows is not None:
                    prefix = rows.new_ones(len(rows), case["config"].get("pre_seq_len") or 0)
                    cached = torch.cat((prefix, inputs["attention_mask"].bool()), dim=1)
                for i, names in enumerate(want):
                    for got, tensor in zip(layer_pair(out.past_key_values, i), names):
                        assert_close(got.transpose(1, 2), tensors[tensor].transpose(0, 1), cached)
            elif key == "hidden_states":  # the original's last one stands before the final norm, by another convention
                for got, tensor in list(zip(out.hidden_states, want))[:-1]:
                    assert_close(got, tensors[tensor].transpose(0, 1), rows)
            elif key == "last_hidden_state":
                assert_close(out.last_hidden_state, tensors[want].transpose(0, 1), rows)
            elif key == "logits":
                assert_close(out.logits, tensors[want], rows if out.logits.dim() == 3 and rows is not None else None)
            elif key == "loss" and rows is None:  # with padding, the first real token's loss hangs on a row of padding
                assert_close(out.loss, tensors[want])
    assert checked


def test_released_int4_checkpoint_matches_the_original():
    """A checkpoint in the released int4 packing loads on a CPU and computes with float32 weights q * scale."""
    case = json.loads((GOLDEN / "int4_checkpoint.json").read_text())
    tensors = load_file(GOLDEN / "int4_checkpoint.safetensors")
    config = {key: value for key, value in case["config"].items() if key not in ("auto_map", "model_type")}
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**config))
    state = {key[3:]: value for key, value in tensors.items() if key.startswith("sd.") and "inv_freq" not in key}
    model.load_state_dict(state)
    with torch.no_grad():
        out = model.float().eval()(input_ids=tensors["in.input_ids"], position_ids=tensors["in.position_ids"])
    assert_close(out.logits, tensors["out.logits"])


def test_gradients_match_the_original():
    """Backward of the loss case gives the original's gradients."""
    case, tensors, model = load("loss")
    call = next(call for call in case["calls"] if call["name"] == "loss")
    model(**{key: tensors[value] for key, value in call["inputs"].items()}).loss.backward()
    gradients = {key: value for key, value in tensors.items() if ".grad." in key}
    parameters = dict(model.named_parameters())
    assert gradients
    for key, want in gradients.items():
        assert_close(parameters[key.split(".grad.")[1]].grad, want)
