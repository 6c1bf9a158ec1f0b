"""configuration_chatglm: standard names, and values that are rejected."""

import json

import pytest
from chatglm2.configuration_chatglm import ChatGLMConfig
from chatglm2.modeling_chatglm import ChatGLMModel
from conftest import ROOT


def test_standard_config_names(make_config):
    """transformers' names read and write the released values."""
    config = make_config()
    assert config.num_hidden_layers == 3 and config.num_key_value_heads == 2 and config.head_dim == 16
    assert config.intermediate_size == 96 and config.max_position_embeddings == 256 and config.vocab_size == 320
    assert make_config(multi_query_attention=False).num_key_value_heads == 4
    config.num_hidden_layers = 2
    assert config.num_layers == 2 and config.to_dict()["num_layers"] == 2


BAD = {
    "integer": [-1, 1.5, float("inf"), "28", None, [28], {}, True],
    "number": [-1, float("inf"), float("nan"), "1e-5", None, [1.0], True],
    "flag": [0, 1, 2.0, "true", None, []],
}
KINDS = {
    "integer": [
        "num_layers", "padded_vocab_size", "hidden_size", "ffn_hidden_size", "kv_channels", "num_attention_heads",
        "seq_length", "multi_query_group_num",
    ],
    "number": ["hidden_dropout", "attention_dropout", "layernorm_epsilon", "rope_ratio", "initializer_range"],
    "flag": [
        "rmsnorm", "apply_residual_connection_post_layernorm", "post_layer_norm", "add_bias_linear", "add_qkv_bias",
        "multi_query_attention", "fp32_residual_connection", "prefix_projection", "use_cache", "original_rope",
        "attention_softmax_in_fp32", "apply_query_key_layer_scaling", "bias_dropout_fusion", "tie_word_embeddings",
    ],
}  # fmt: skip
CASES = [(key, value) for kind, keys in KINDS.items() for key in keys for value in BAD[kind]]
CASES = [case for case in CASES if case != ("rope_ratio", None)]  # null is the default there
CASES += [(key, 0) for key in [*KINDS["integer"], "layernorm_epsilon", "rope_ratio"]]
CASES += [("hidden_dropout", 1.5), ("attention_dropout", 2), ("classifier_dropout", -0.1), ("classifier_dropout", "no")]
CASES += [("kv_channels", 6), ("rope_ratio_type", "ntk"), ("model_family", "chatglm4"), ("tie_word_embeddings", True)]
CASES += [("quantization_bit", value) for value in (3, -4, 16, "4", 4.0, True, [4])]
CASES += [("pre_seq_len", value) for value in (-1, 1.5, "128", True, float("inf"))]
CASES += [("eos_token_id", value) for value in (-1, 320, 2.0, "</s>", [], [2, -1], [2, 320], [None], True)]
CASES += [(key, value) for key in ("pad_token_id", "bos_token_id") for value in (-1, "0", 0.5, [0])]
CASES += [("torch_dtype", value) for value in ("nonsense", "int8", 16, "bool", ["float16"])]
CASES += [("rope_scaling", {"type": "linear", "factor": 4.0}), ("quantization_options", None)]
CASES += [("quantization_options", value) for value in ({"groupsize": 32}, {"skip": 3}, {"embedding": 1}, [])]
CASES += [("quantization_options", {"group_size": value}) for value in (0, -2, 31, "32", 32.0)]


@pytest.mark.parametrize(("key", "value"), CASES, ids=[f"{key}={value!r}" for key, value in CASES])
def test_invalid_values_are_rejected(make_config, tmp_path, key, value):
    """Read from config.json, passed to from_pretrained, or set later: one error with key, value and limit."""
    with pytest.raises(ValueError, match=rf"^{key}.*(must be|has no) .*"):
        make_config(**{key: value})
    config = make_config()
    config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**text, key: value}))
    with pytest.raises(ValueError, match=f"^{key}"):
        type(config).from_pretrained(tmp_path)
    if key in ("torch_dtype", "rope_scaling"):  # transformers converts the one and deprecates setting the other
        return
    setattr(config, key, value)
    with pytest.raises(ValueError, match=f"^{key}"):
        ChatGLMModel(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": "28"}, "num_layers='28' must be an integer from 1 on. Correct .*ChatGLM2-6B has 28."),
        ({"num_hidden_layers": 0}, "num_layers=0 must be an integer from 1 on"),
        ({"kv_channels": 6}, "kv_channels=6 must be an integer from 4 on, a multiple of 4"),
        ({"rope_ratio": float("inf")}, "rope_ratio=inf must be a finite number above 0"),
        ({"rope_ratio_type": "ntk"}, "rope_ratio_type='ntk' must be 'linear' or 'base'"),
        ({"quantization_bit": 3}, "quantization_bit=3 must be 0, 4 or 8"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True must be false: ChatGLM2 has a separate output layer"),
        (
            {"quantization_options": {"groups": 2}},
            "quantization_options has no 'groups', only group_size, skip, embedd",
        ),
        ({"multi_query_group_num": 3}, "num_attention_heads=4 is not a multiple of multi_query_group_num=3"),
        ({"rope_scaling": {"factor": 2}}, "must be null: rope_ratio and rope_ratio_type extend the context here"),
    ],
)
def test_errors_name_the_limit(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


FAMILY = [
    {},
    {"rope_ratio": 16, "_name_or_path": "THUDM/chatglm2-6b-32k"},
    {"rope_ratio": 500, "seq_length": 131072, "rope_ratio_type": "base"},
    {"interleaved_qkv": False, "rotary_percent": 0.5, "seq_length": 8192, "torch_dtype": "bfloat16"},  # CodeGeeX2
    {"quantization_bit": 4, "classifier_dropout": None, "pre_seq_len": None},
    {"quantization_bit": None, "rope_ratio": None, "pre_seq_len": 0, "bos_token_id": None, "pad_token_id": None},
    {"eos_token_id": [2, 64795, 64797], "rope_scaling": None, "quantization_options": {"skip": [], "group_size": None}},
    {"pre_seq_len": 128, "prefix_projection": True, "classifier_dropout": 0.1, "hidden_dropout": 0},
]


@pytest.mark.parametrize("changes", FAMILY, ids=str)
def test_released_configurations_are_valid(tmp_path, changes):
    """Those of the family, and null where it means the default; saved and read again."""
    released = json.loads((ROOT / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**released, **changes}))
    config = ChatGLMConfig.from_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    ChatGLMConfig.from_pretrained(tmp_path).check()
