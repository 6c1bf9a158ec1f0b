"""The network as transformers' own GlmForCausalLM: its config, and its tensors under GLM's names (4.46 and newer)."""

import torch
from chatglm2.quantization_format import dequantize_weight
from transformers import GlmConfig, GlmForCausalLM

NAMES = {  # GLM's modules and ours; q_proj, k_proj and v_proj are rows of query_key_value
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm",
    "model.layers": "transformer.encoder.layers",
    "lm_head": "transformer.output_layer",
    "self_attn.o_proj": "self_attention.dense",
    "self_attn.q_proj": "self_attention.query_key_value",
    "self_attn.k_proj": "self_attention.query_key_value",
    "self_attn.v_proj": "self_attention.query_key_value",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def refusals(config):
    """What GLM cannot express of a ChatGLMConfig: a list of messages, each with the value and the reason."""
    retrain = "the model cannot be exported"
    checks = [
        ("rmsnorm", True, f"GLM has only RMSNorm: {retrain}"),
        ("post_layer_norm", True, f"GLM always has a last norm: {retrain}"),
        ("apply_residual_connection_post_layernorm", False, f"GLM takes the residual before the norm: {retrain}"),
        ("add_bias_linear", False, f"GLM has biases only on query, key and value: {retrain}"),
        (
            "fp32_residual_connection",
            False,
            "GLM adds in the weights' dtype: set it to false if that suffices",
        ),
        ("pre_seq_len", None, "GLM has no P-Tuning prefix: export the model it was trained on, without pre_seq_len"),
    ]
    return [f"{k}={getattr(config, k)}: {cure}." for k, allowed, cure in checks if getattr(config, k) != allowed]


def tokenizer_refusals(tokenizer):
    """What an exported tokenizer cannot express of a ChatGLMTokenizer: a list of messages."""
    problems = []
    if tokenizer.conversation.roles:
        problems.append(
            f"model_family={tokenizer.model_family}: the exported tokenizer has no tokens for roles, and its prompt is "
            "ChatGLM2's. Use the folder as it is."
        )
    if not tokenizer.tokenizer.sp_model.EncodeAsPieces("x")[0].startswith("▁"):
        problems.append(
            "tokenizer.model puts no space in front of a text, as CodeGeeX2's: the exported tokenizer would. Use the "
            "folder as it is."
        )
    return problems


def glm_config(config):
    """GlmConfig of the network that the ChatGLMConfig `config` describes.

    Raises:
        ValueError: GLM cannot express it; the message has each value and the reason.
    """
    if problems := refusals(config):
        raise ValueError("\n".join(problems))
    linear = config.rope_ratio_type == "linear" and config.rope_ratio != 1
    return GlmConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.kv_channels,
        rms_norm_eps=config.layernorm_epsilon,
        attention_bias=config.add_qkv_bias,
        attention_dropout=config.attention_dropout,
        rope_theta=10000.0 * (config.rope_ratio if config.rope_ratio_type == "base" else 1),
        rope_scaling={"rope_type": "linear", "factor": float(config.rope_ratio)} if linear else None,
        partial_rotary_factor=0.5,
        max_position_embeddings=config.seq_length,
        initializer_range=config.initializer_range,
        pad_token_id=config.pad_token_id,
        bos_token_id=None,
        eos_token_id=config.eos_token_id,
        architectures=["GlmForCausalLM"],
    )


def our_name(name):
    """The name of the tensor that holds what GLM calls `name`."""
    for glm, chatglm in NAMES.items():
        name = name.replace(glm, chatglm)
    return name


def glm_tensor(name, config, get):
    """The tensor that GLM calls `name`. `get(name)` returns ours: a parameter, dequantized if need be."""
    ours = our_name(name)
    tensor = get(ours)
    letter = name.rpartition("_proj")[0][-1:]
    if "query_key_value" not in ours:
        return tensor
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.kv_channels
    if config.multi_query_attention:
        parts = tensor.split([heads * size, groups * size, groups * size])
    else:  # rows interleaved per head: q, k, v of head 0, of head 1, ...
        parts = [part.flatten(0, 1) for part in tensor.unflatten(0, (heads, 3, size)).unbind(1)]
    return parts["qkv".index(letter)]


def dequantized(state, bits):
    """A function of a name that returns this tensor of a state dict; weights of int8 and of `bits` are dequantized."""

    def get(name):
        scale = state.get(name + "_scale")
        if scale is None:
            return state[name]
        return dequantize_weight(state[name], scale, bits if ".layers." in name else 8)

    return get


def empty_glm(config):
    """GlmForCausalLM of a ChatGLMConfig, on the meta device."""
    with torch.device("meta"):
        return GlmForCausalLM(glm_config(config))


def glm_state_dict(model):
    """The model's tensors under GlmForCausalLM's names; float tensors share memory with the model."""
    get = dequantized(model.state_dict(), model.config.quantization_bit)
    return {name: glm_tensor(name, model.config, get) for name in empty_glm(model.config).state_dict()}
