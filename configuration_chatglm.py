"""Configuration of ChatGLM2: the keys of the released `config.json`, and the standard names of transformers."""

from typing import TYPE_CHECKING

from transformers import PretrainedConfig

from .transformers_compat import ConfigFallbacks, register_for_serve

if TYPE_CHECKING:  # the Hugging Face loader copies only the files named here, not what those import
    from .torch_compat import is_compiling  # noqa: F401

ROPE_RATIO_TYPES = ("linear", "base")
QUANTIZATION_BITS = (0, 4, 8)


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
            "base" (ChatGLM3-6B-32K) multiplies the base 10000 by it.
        pre_seq_len, prefix_projection: P-Tuning v2: length of the learned prefix, and whether it passes through an MLP.
        quantization_bit: 4 or 8 if the checkpoint's linear layers are quantized, else 0.
        initializer_range: standard deviation of newly initialized weights.
        original_rope, attention_softmax_in_fp32, apply_query_key_layer_scaling, bias_dropout_fusion: accepted and
            saved because released files have them; they have no effect.

    Raises:
        ValueError: an unsupported value; the message gives the value, the limit and the remedy.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    use_cache = True
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
        self,
        num_layers=28,
        padded_vocab_size=65024,
        hidden_size=4096,
        ffn_hidden_size=13696,
        kv_channels=128,
        num_attention_heads=32,
        seq_length=32768,
        hidden_dropout=0.0,
        classifier_dropout=None,
        attention_dropout=0.0,
        layernorm_epsilon=1e-5,
        rmsnorm=True,
        apply_residual_connection_post_layernorm=False,
        post_layer_norm=True,
        add_bias_linear=False,
        add_qkv_bias=True,
        multi_query_attention=True,
        multi_query_group_num=2,
        fp32_residual_connection=False,
        rope_ratio=1.0,
        rope_ratio_type="linear",
        quantization_bit=0,
        pre_seq_len=None,
        prefix_projection=False,
        initializer_range=0.02,
        use_cache=True,
        original_rope=True,
        attention_softmax_in_fp32=True,
        apply_query_key_layer_scaling=True,
        bias_dropout_fusion=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        **kwargs,
    ):
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
        self.rope_ratio_type = rope_ratio_type
        self.quantization_bit = quantization_bit or 0
        self.pre_seq_len = pre_seq_len or None
        self.prefix_projection = prefix_projection
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.original_rope = original_rope
        self.attention_softmax_in_fp32 = attention_softmax_in_fp32
        self.apply_query_key_layer_scaling = apply_query_key_layer_scaling
        self.bias_dropout_fusion = bias_dropout_fusion
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self._check()
        register_for_serve(("ChatGLMModel", "ChatGLMForConditionalGeneration"))

    @property
    def num_key_value_heads(self):
        """G, the number of key/value heads in the cache."""
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    def to_dict(self):
        """As in transformers, with `num_key_value_heads`, which PEFT's prefix tuning reads there."""
        return {**super().to_dict(), "num_key_value_heads": self.num_key_value_heads}

    def _check(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"multi_query_group_num={self.multi_query_group_num}: all groups serve the same number of query "
                "heads. Choose a multi_query_group_num that divides num_attention_heads."
            )
        if self.kv_channels % 4:
            raise ValueError(
                f"kv_channels={self.kv_channels} is not a multiple of 4: half of a head's channels are rotated, "
                "in pairs. Choose a multiple of 4."
            )
        if self.rope_ratio_type not in ROPE_RATIO_TYPES:
            raise ValueError(
                f"rope_ratio_type={self.rope_ratio_type!r} is unknown. Choose one of {ROPE_RATIO_TYPES}: 'linear' "
                "divides the positions (ChatGLM2-6B-32K), 'base' multiplies the base (ChatGLM3-6B-32K)."
            )
        if not self.rope_ratio > 0:
            raise ValueError(f"rope_ratio={self.rope_ratio} must be above 0; 1 leaves the positions unchanged.")
        if self.quantization_bit not in QUANTIZATION_BITS:
            raise ValueError(f"quantization_bit={self.quantization_bit} is unknown. Choose one of {QUANTIZATION_BITS}.")
        if self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings=True: ChatGLM2 has a separate output layer. Set it to false in config.json."
            )
