"""Configuration of ChatGLM2: the keys of the released `config.json`, and the standard names of transformers."""

import math
from typing import TYPE_CHECKING, Callable, NamedTuple

import torch
from transformers import PretrainedConfig

from .family_chatglm import FAMILIES, config_family, find_rope_ratio_type
from .transformers_compat import ConfigFallbacks, register_for_serve

if TYPE_CHECKING:  # the Hugging Face loader copies only the files named here, not what those import
    from .torch_compat import is_compiling  # noqa: F401

# What config.json may hold: {key: (which values, in words)}


class Rule(NamedTuple):
    allows: Callable
    limit: str


def integer(least, step=1):
    limit = f"an integer from {least} on" + (f", a multiple of {step}" if step > 1 else "")
    return Rule(lambda value: type(value) is int and value >= least and value % step == 0, limit)


def number(allows, limit):
    return Rule(lambda value: type(value) in (int, float) and math.isfinite(value) and allows(value), limit)


def one_of(*values):
    choices = ", ".join(map(repr, values[:-1])) + f" or {values[-1]!r}"
    return Rule(lambda value: type(value) in map(type, values) and value in values, choices)


def optional(rule):
    return Rule(lambda value: value is None or rule.allows(value), f"{rule.limit}, or null")


def many(rule, limit, least=1):
    """A value that `rule` allows, or a list of them."""

    def allows(value):
        if isinstance(value, (list, tuple)):
            return len(value) >= least and all(map(rule.allows, value))
        return rule.allows(value)

    return Rule(allows, limit)


def is_float_dtype(value):
    dtype = getattr(torch, value.split(".")[-1], None) if isinstance(value, str) else value
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


COUNT, FLAG = integer(1), Rule(lambda value: type(value) is bool, "true or false")
PROBABILITY = number(lambda value: 0 <= value <= 1, "a number from 0 to 1")
POSITIVE = number(lambda value: value > 0, "a finite number above 0")
TEXTS = many(Rule(lambda value: isinstance(value, str), ""), "a text or a list of texts", least=0)
COUNTS = ("num_layers", "padded_vocab_size", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length")
FLAGS = ("rmsnorm", "apply_residual_connection_post_layernorm", "post_layer_norm", "add_bias_linear", "add_qkv_bias")
FLAGS += ("multi_query_attention", "fp32_residual_connection", "prefix_projection", "use_cache", "original_rope")
FLAGS += ("attention_softmax_in_fp32", "apply_query_key_layer_scaling", "bias_dropout_fusion", "cuda_graphs")
UNSUPPORTED = Rule(lambda value: value is None, "null: rope_ratio and rope_ratio_type extend the context here")

RULES = {
    **dict.fromkeys((*COUNTS, "multi_query_group_num"), COUNT),
    **dict.fromkeys(FLAGS, FLAG),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), PROBABILITY),
    **dict.fromkeys(("layernorm_epsilon", "rope_ratio"), POSITIVE),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), optional(integer(0))),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), UNSUPPORTED),
    "kv_channels": integer(4, step=4),  # half of a head's channels are rotated, in pairs
    "classifier_dropout": optional(PROBABILITY),
    "initializer_range": number(lambda value: value >= 0, "a finite number from 0 on"),
    "model_family": one_of(*FAMILIES),
    "rope_ratio_type": one_of("linear", "base"),  # "linear": ChatGLM2-6B-32K, "base": ChatGLM3-6B-32K
    "quantization_bit": optional(one_of(0, 4, 8)),
    "pre_seq_len": optional(integer(0)),
    "eos_token_id": optional(many(integer(0), "an integer from 0 on, or a list of them")),
    "tie_word_embeddings": Rule(lambda value: value is False, "false: ChatGLM2 has a separate output layer"),
    **dict.fromkeys(("torch_dtype", "dtype"), optional(Rule(is_float_dtype, '"float16", "bfloat16" or "float32"'))),
}
CHATGLM3_STOPS = [2, 64795, 64797]  # </s>, and the roles that speak after an answer; its config.json says 2 alone
QUANTIZATION_OPTIONS = {
    "group_size": optional(integer(2, step=2)),
    "skip": TEXTS,
    "embedding": FLAG,
    "output_layer": FLAG,
}


class ChatGLMConfig(ConfigFallbacks, PretrainedConfig):
    """Configuration of a ChatGLM2 model; the defaults are those of ChatGLM2-6B.

    Values are stored under the released names (left); transformers' standard names (right) read and write the same
    values: num_layers = num_hidden_layers, ffn_hidden_size = intermediate_size, kv_channels = head_dim,
    padded_vocab_size = vocab_size, seq_length = max_position_embeddings, layernorm_epsilon = rms_norm_eps.
    `num_key_value_heads` is derived.

    Args:
        num_layers: number of blocks.
        padded_vocab_size: V, rows of the embedding and of the output layer; the tokenizer may use fewer.
        hidden_size: C, size of the residual stream.
        ffn_hidden_size: size of the MLP's hidden layer, after the gate.
        kv_channels: D, size of an attention head.
        num_attention_heads: H, number of query heads.
        seq_length: context length of the training; chat rejects what exceeds it.
        multi_query_attention, multi_query_group_num: if True, G key/value groups serve the H query heads; if False,
            every head has its own key and value, and the rows of `query_key_value` are interleaved per head.
        rmsnorm: RMSNorm if True, LayerNorm if False; layernorm_epsilon is added to the variance.
        post_layer_norm: add a final norm after the blocks.
        apply_residual_connection_post_layernorm: take the residual after the norm instead of before it.
        fp32_residual_connection: keep the residual stream in float32 whatever the dtype of the weights.
        add_qkv_bias: bias on `query_key_value`; add_bias_linear: bias on every linear layer of a block.
        hidden_dropout, attention_dropout, classifier_dropout: dropout probabilities for training.
        rope_ratio, rope_ratio_type: extend the context. "linear" (ChatGLM2-6B-32K) divides the positions by rope_ratio;
            "base" (ChatGLM3-6B-32K) multiplies the base 10000 by it. By default the other keys tell which.
        model_family: "chatglm2", "chatglm3" or "codegeex2"; by default the other keys tell which.
        pre_seq_len, prefix_projection: P-Tuning v2: length of the learned prefix, and whether it passes through an MLP.
        quantization_bit: 4 or 8 if the checkpoint's linear layers are quantized, else 0.
        initializer_range: standard deviation of newly initialized weights.
        cuda_graphs: False leaves eager decoding on a GPU to the modules, kernel by kernel; see blocks_cuda.
        original_rope, attention_softmax_in_fp32, apply_query_key_layer_scaling, bias_dropout_fusion: accepted and
            saved because released files have them; they have no effect.

    Raises:
        ValueError: an unsupported value; the message gives the value, the limit and the remedy.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    use_cache = cuda_graphs = True
    quantization_options = {}  # of `quantize`, with which the weights were quantized
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "head_dim": "kv_channels",
        "vocab_size": "padded_vocab_size",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layernorm_epsilon",
    }

    # The rows of query_key_value ([32 query | 2 key | 2 value heads]) and of dense_h_to_4h ([gate | up]) do not split
    # into equal contiguous shares of heads and channels: each rank computes some rows, and all gather the whole output.
    base_model_tp_plan = {
        "encoder.layers.*.self_attention.query_key_value": "colwise_rep",
        "encoder.layers.*.self_attention.dense": "rowwise_rep",
        "encoder.layers.*.mlp.dense_h_to_4h": "colwise_rep",
        "encoder.layers.*.mlp.dense_4h_to_h": "rowwise_rep",
        "output_layer": "colwise_rep",
    }
    base_model_pp_plan = {
        "embedding": (["input_ids"], ["inputs_embeds"]),
        "encoder.layers": (["x", "attention_mask"], ["x"]),
        "encoder.final_layernorm": (["x"], ["x"]),
        "output_layer": (["x"], ["logits"]),
    }

    def __init__(
        self, num_layers=28, padded_vocab_size=65024, hidden_size=4096, ffn_hidden_size=13696, kv_channels=128,
        num_attention_heads=32, seq_length=32768, hidden_dropout=0.0, classifier_dropout=None, attention_dropout=0.0,
        layernorm_epsilon=1e-5, rmsnorm=True, apply_residual_connection_post_layernorm=False, post_layer_norm=True,
        add_bias_linear=False, add_qkv_bias=True, multi_query_attention=True, multi_query_group_num=2,
        fp32_residual_connection=False, rope_ratio=1.0, rope_ratio_type=None, model_family=None, quantization_bit=0,
        pre_seq_len=None, prefix_projection=False, initializer_range=0.02, use_cache=True, original_rope=True,
        attention_softmax_in_fp32=True, apply_query_key_layer_scaling=True, bias_dropout_fusion=True,
        bos_token_id=None, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False, **kwargs,
    ):  # fmt: skip
        kwargs.pop("num_key_value_heads", None)  # derived
        self.num_layers = num_layers
        self.padded_vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.kv_channels = kv_channels
        self.num_attention_heads = num_attention_heads
        self.seq_length = seq_length
        self.hidden_dropout = hidden_dropout
        self.classifier_dropout = classifier_dropout
        self.attention_dropout = attention_dropout
        self.layernorm_epsilon = layernorm_epsilon
        self.rmsnorm = rmsnorm
        self.apply_residual_connection_post_layernorm = apply_residual_connection_post_layernorm
        self.post_layer_norm = post_layer_norm
        self.add_bias_linear = add_bias_linear
        self.add_qkv_bias = add_qkv_bias
        self.multi_query_attention = multi_query_attention
        self.multi_query_group_num = multi_query_group_num
        self.fp32_residual_connection = fp32_residual_connection
        self.rope_ratio = 1.0 if rope_ratio is None else rope_ratio
        told_by = {**kwargs, "seq_length": seq_length, "rope_ratio": rope_ratio, "model_family": model_family}
        self.rope_ratio_type = rope_ratio_type or find_rope_ratio_type(told_by)
        self.model_family = config_family(told_by)
        if self.model_family == "chatglm3" and eos_token_id == 2 and padded_vocab_size > CHATGLM3_STOPS[-1]:
            eos_token_id = CHATGLM3_STOPS
        self.quantization_bit = quantization_bit or 0
        self.pre_seq_len = pre_seq_len or None
        self.prefix_projection = prefix_projection
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.original_rope = original_rope
        self.attention_softmax_in_fp32 = attention_softmax_in_fp32
        self.apply_query_key_layer_scaling = apply_query_key_layer_scaling
        self.bias_dropout_fusion = bias_dropout_fusion
        kwargs.update(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
        kwargs.update(tie_word_embeddings=tie_word_embeddings)
        for key, value in {**vars(self), **kwargs}.items():  # before transformers stumbles over them
            check_value(self.attribute_map.get(key, key), value)
        kwargs.pop("rope_scaling", None)  # null; transformers 5.23 deprecates setting it
        super().__init__(**kwargs)
        self.check()
        register_for_serve(("ChatGLMModel", "ChatGLMForConditionalGeneration"))

    @property
    def num_key_value_heads(self):
        """G, the number of key/value heads in the cache."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    def to_dict(self):
        """As in transformers, with `num_key_value_heads`, which PEFT's prefix tuning reads there."""
        return {**super().to_dict(), "num_key_value_heads": self.num_key_value_heads}

    def check(self):
        """Raise ValueError for the first value that no model can have."""
        for key in RULES:
            check_value(key, getattr(self, key, None))
        if type(self.quantization_options) is not dict:
            raise ValueError(f"quantization_options={self.quantization_options!r} must be a dict: leave it out.")
        for key, value in self.quantization_options.items():
            if key not in QUANTIZATION_OPTIONS:
                known = ", ".join(QUANTIZATION_OPTIONS)
                raise ValueError(f"quantization_options has no {key!r}, only {known}. Correct it in config.json.")
            check_value(key, value, QUANTIZATION_OPTIONS, "quantization_options: ")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"multi_query_group_num={self.multi_query_group_num}: all groups serve the same number of query "
                "heads. Choose a multi_query_group_num that divides num_attention_heads."
            )
        ends = self.eos_token_id if isinstance(self.eos_token_id, (list, tuple)) else [self.eos_token_id]
        if any(i is not None and i >= self.padded_vocab_size for i in ends):
            raise ValueError(
                f"eos_token_id={self.eos_token_id} must be below padded_vocab_size={self.padded_vocab_size}: no answer "
                "would end. Correct it in config.json."
            )


def check_value(key, value, rules=RULES, place=""):
    if key in rules and not rules[key].allows(value):
        released = RELEASED.get(key)
        example = "" if released is None else f" ChatGLM2-6B has {released!r}."
        raise ValueError(f"{place}{key}={value!r} must be {rules[key].limit}. Correct it in config.json.{example}")


RELEASED = vars(ChatGLMConfig())
