"""ChatGLM2: the network, read from top to bottom.

Shapes stand at line ends:
    B batch, T new tokens, S cached and new tokens, C hidden channels, V vocabulary,
    H query heads, G key/value groups, D channels of a head, R = D / 2 rotated channels, P prefix tokens.

Hugging Face's loader copies the siblings that this file names, and not what those name in turn. So that it finds the
kernels of `quantization`, and what `configuration_chatglm` needs, they stand here, where it reads too:
    from .quantization_cpm import linear
    from .quantization_cpu import linear
    from .quantization_cpu_source import source
    from .quantization_format import pack
    from .quantization_stock import linear
    from .quantization_triton import linear
    from .serving_chatglm import lend_architectures
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from .cache_chatglm import give_room
from .configuration_chatglm import ChatGLMConfig
from .generation_chatglm import ChatMixin
from .quantization import quantize
from .quantization_loading import missing_quantized_weights_error  # importing it registers quant_method "chatglm"
from .torch_compat import rms_norm
from .transformers_compat import (
    ALL_ATTENTION_FUNCTIONS,
    DynamicCache,
    GenerationMixin,
    GradientCheckpointingLayer,
    ModelFallbacks,
    attention_name,
    cache_update_kwargs,
    causal_mask,
)

# Rotary position embedding (Su et al., 2021, arXiv:2104.09864), over the first half of a head's channels


def rotary_cos_sin(config, position_ids):
    """Cosine and sine of each position's angles: cos, sin [B, T, 1, R / 2], float32.

    theta_i = base^(-2i / R) with base 10000. In half precision positions collapse from 2,048 on (bfloat16: 256), so
    the angles are float32 whatever the weights are.
    """
    rotated = config.kv_channels // 2
    base, positions = 10000.0, position_ids.float()
    if config.rope_ratio_type == "base":
        base *= config.rope_ratio
    else:
        positions = positions / config.rope_ratio
    pairs = torch.arange(0, rotated, 2, dtype=torch.float32, device=position_ids.device)
    angles = positions[..., None, None] * base ** (-pairs / rotated)  # (B, T, 1, R / 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the channel pairs (2i, 2i + 1) of the first half of each head; the other half passes through."""
    turned, passed = x.chunk(2, dim=-1)  # (B, T, heads, R) each
    even, odd = turned.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, heads, R / 2)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), passed), dim=-1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight in float32, cast once at the end (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32, cast once at the end, for configurations with `rmsnorm` false."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(
            x.dtype
        )


def make_norm(config):
    norm = RMSNorm if config.rmsnorm else LayerNorm
    return norm(config.hidden_size, eps=config.layernorm_epsilon)


# Attention back ends: one signature, that of transformers' attention interface


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The reference in plain torch; the only one that returns the weights.

    Args: query (B, H, T, D); key, value (B, G, S, D); attention_mask (B, 1, T, S), additive or boolean, or None.
    Returns: output (B, T, H, D), weights (B, H, T, S).
    """
    query = query.unflatten(1, (key.shape[1], -1))  # (B, G, H / G, T, D)
    scores = query @ key[:, :, None].transpose(-1, -2) * scaling  # (B, G, H / G, T, S)
    if attention_mask is not None:
        attention_mask = attention_mask[:, :, None, :, : key.shape[2]]
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    output = (weights @ value[:, :, None]).flatten(1, 2)  # (B, H, T, D)
    return output.transpose(1, 2), weights.flatten(1, 2)


def sdpa_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, is_causal=None, **kwargs):
    """torch's fused attention, without copying G key/value groups out to H heads.

    Args: query (B, H, T, D); key, value (B, G, S, D); attention_mask boolean, True where a query may look, or None
        for causal; scaling is torch's own, D^-0.5. Returns: output (B, T, H, D), None.
    """
    dtype = query.dtype
    if dtype == torch.float16 and query.device.type == "cpu":  # there torch's attention takes twice as long in float16
        query, key, value = query.float(), key.float(), value.float()
    if attention_mask is not None and attention_mask.is_floating_point():  # a caller's own, of four dimensions
        attention_mask = attention_mask.to(query.dtype)
    length, group_size = query.shape[2], query.shape[1] // key.shape[1]
    causal = attention_mask is None and length > 1 and is_causal is not False
    if causal:
        key, value = key[:, :, :length], value[:, :, :length]  # an empty static cache is longer than the prompt
    attend = partial(F.scaled_dot_product_attention, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal)
    if group_size == 1:
        output = attend(query, key, value).transpose(1, 2)
    elif length == 1:  # one new token: a group's query heads are the rows of one small matrix
        output = attend(query.reshape(*key.shape[:2], group_size, -1), key, value).flatten(1, 2)[:, None]
    else:  # a group at a time; its query heads see the one key and value through a stride of 0
        groups = zip(query.split(group_size, 1), key.split(1, 1), value.split(1, 1))
        output = torch.cat([attend(q, k.expand(-1, group_size, -1, -1), v.expand(-1, group_size, -1, -1))
                            .transpose(1, 2) for q, k, v in groups], dim=2)  # fmt: skip
    return output.to(dtype), None


OWN_ATTENTION = {"eager": eager_attention, "sdpa": sdpa_attention}


class SelfAttention(nn.Module):
    """One fused projection to H query heads and G keys and values, RoPE, the cache, attention, one projection back."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_groups  # the attention interface's name for H / G
        self.interleaved = not config.multi_query_attention
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.query_key_value = nn.Linear(
            config.hidden_size,
            (self.num_heads + 2 * self.num_groups) * self.head_dim,
            bias=config.add_qkv_bias or config.add_bias_linear,
        )
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x, rotary, attention_mask, past_key_values=None, cache_kwargs=None, prefix=None, **kwargs):
        B, T, _ = x.shape
        heads, groups = self.num_heads, self.num_groups
        mixed = self.query_key_value(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 G, D)
        if self.interleaved:  # rows per head: q, k, v of head 0, of head 1, ...
            mixed = mixed.unflatten(2, (heads, 3)).transpose(2, 3).flatten(2, 3)
        rotated = rotate(mixed[:, :, : heads + groups], *rotary)  # query and key in one go
        query, key = rotated.transpose(1, 2).split((heads, groups), dim=1)  # (B, H, T, D), (B, G, T, D)
        value = mixed[:, :, heads + groups :].transpose(1, 2)  # (B, G, T, D)

        if prefix is not None:
            key, value = (torch.cat((p, x), dim=2) for p, x in zip(prefix, (key, value)))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, cache_kwargs)  # (B, G, S, D)

        name = attention_name(self.config)
        paged = kwargs.get("cache") is not None  # continuous batching: transformers' attention brings it up to date
        attend = (None if paged else OWN_ATTENTION.get(name)) or ALL_ATTENTION_FUNCTIONS[name]
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.dense(output.reshape(B, T, -1)), weights  # (B, T, C), (B, H, T, S)


class MLP(nn.Module):
    """dense_4h_to_h(silu(gate) * up), gate and up from one projection (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x):
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)  # (B, T, ffn_hidden_size) each
        if torch.is_grad_enabled():
            return self.dense_4h_to_h(F.silu(gate) * up)
        return self.dense_4h_to_h(F.silu(gate).mul_(up))  # in place: a long prompt's peak is here


class ChatGLMBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.input_layernorm = make_norm(config)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x, dtype, rotary, attention_mask, **kwargs):
        normed = self.input_layernorm(x)
        update, weights = self.self_attention(normed.to(dtype), rotary, attention_mask, **kwargs)
        x = self.add(x, normed, update)
        del update  # or it stays through the MLP
        normed = self.post_attention_layernorm(x)
        return self.add(x, normed, self.mlp(normed.to(dtype))), weights  # (B, T, C), (B, H, T, S) or None

    def add(self, x, normed, update):
        if self.dropout.training:  # it does nothing else, and each call counts in a decode step
            update = self.dropout(update)
        return (normed if self.residual_after_norm else x) + update  # (B, T, C)


class Encoder(nn.Module):
    """The blocks and the last norm."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(ChatGLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = make_norm(config) if config.post_layer_norm else nn.Identity()


class PrefixEncoder(nn.Module):
    """P-Tuning v2's learned keys and values (Liu et al., 2021, arXiv:2110.07602).

    Row p of the embedding holds a key and a value of G heads for every layer; with `prefix_projection` an MLP of
    Linear, Tanh, Linear makes them.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        size = config.num_layers * 2 * config.num_key_value_heads * config.kv_channels
        self.embedding = nn.Embedding(config.pre_seq_len, size)
        self.trans = nn.Identity()
        if config.prefix_projection:
            self.trans = nn.Sequential(
                nn.Linear(size, config.hidden_size), nn.Tanh(), nn.Linear(config.hidden_size, size)
            )
        self.dropout = nn.Dropout(0.1)

    def forward(self, batch_size, dtype):
        """A (key, value) for each layer, both (B, G, P, D)."""
        config = self.config
        prefix = self.trans(self.embedding.weight).to(dtype)  # (P, 2 L G D)
        prefix = prefix.view(config.pre_seq_len, 2 * config.num_layers, config.num_key_value_heads, config.kv_channels)
        prefix = prefix.permute(1, 2, 0, 3)[:, None].expand(-1, batch_size, -1, -1, -1)  # (2 L, B, G, P, D)
        prefix = self.dropout(prefix)
        return list(zip(prefix[0::2], prefix[1::2]))


class ChatGLMPreTrainedModel(ModelFallbacks, PreTrainedModel):
    """What the public classes share: initialisation, and what they tell transformers about themselves."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_pos_emb\.inv_freq"]
    _supports_attention_backend = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_cache_class = True
    _supports_static_cache = True
    _supports_quantized_cache = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_attn_implementation(cls):
        return True  # the attention is looked up at every call

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As in transformers. The weights' own dtype is kept where none is asked for.

        Raises:
            ValueError: besides what transformers raises: the config asks for int8 or int4 layers, and the checkpoint
                holds no such weights.
        """
        try:
            model, report = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except RuntimeError as error:
            config = kwargs.get("config")
            if not hasattr(config, "quantization_bit"):
                config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **kwargs)
            if config.quantization_bit and any(word in str(error) for word in ("mismatch", "held as torch.int8")):
                found = "tensors of other shapes or dtypes"
                raise missing_quantized_weights_error(config.quantization_bit, found) from error
            raise
        unscaled = sorted(name for name in report["missing_keys"] if name.endswith(".weight_scale"))
        if unscaled:  # and float weights, which most releases of transformers have truncated to int8 by now
            raise missing_quantized_weights_error(model.config.quantization_bit, f"no {unscaled[0]}")
        model.base_model.freeze_below_prefix()  # loading may put new parameters in the old ones' place
        return (model, report) if output_loading_info else model

    def quantize(self, bits, **options):
        """Hold the linear layers of every block in `bits` (4 or 8) bits, in place; 0 changes nothing.

        Options are those of `quantization.quantize`. Returns the model.
        """
        return quantize(self, bits, **options)

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """As in transformers; a ValueError where the embedding or the output layer is int8."""
        base = self.base_model
        for option, layer in (("embedding", base.embedding["word_embeddings"]), ("output_layer", base.output_layer)):
            if hasattr(layer, "weight_scale") and new_num_tokens not in (None, len(layer.weight_scale)):
                raise ValueError(
                    f"new_num_tokens={new_num_tokens}: the {option} has {len(layer.weight_scale)} rows in int8, which "
                    f"cannot be resized. Resize the float model, then quantize it, or quantize without {option}=True."
                )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _init_weights(self, module):
        """Normal weights, zero biases, unit norms, for what no checkpoint gives; quantized weights stay."""
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(module, (nn.Linear, nn.Embedding)) and weight.is_floating_point():
            nn.init.normal_(weight, std=self.config.initializer_range)
        elif isinstance(module, (RMSNorm, LayerNorm)):
            nn.init.ones_(weight)
        if bias is not None:
            nn.init.zeros_(bias)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """The network up to the last norm; it also owns the output layer, as the released checkpoints name it."""

    def __init__(self, config, empty_init=True, device=None):
        super().__init__(config)
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(config.padded_vocab_size, config.hidden_size)})
        self.encoder = Encoder(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        if config.quantization_bit:  # empty int8 and int4 layers, for a checkpoint to fill
            quantize(self, config.quantization_bit, empty=True, **getattr(config, "quantization_options", {}))
        if config.pre_seq_len:
            self.prefix_encoder = PrefixEncoder(config)
        self.freeze_below_prefix()
        self.post_init()

    def freeze_below_prefix(self):
        """P-Tuning trains the prefix alone."""
        if self.config.pre_seq_len:
            self.requires_grad_(False)
            self.prefix_encoder.requires_grad_(True)

    def get_input_embeddings(self):
        return self.embedding["word_embeddings"]

    def set_input_embeddings(self, embeddings):
        self.embedding["word_embeddings"] = embeddings

    def forward(
        self,
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache_position=None,
        **kwargs,
    ):
        """Hidden states of new tokens.

        Args:
            input_ids: int [B, T]; or `inputs_embeds` float [B, T, C].
            position_ids: int [B, T]; by default they count the real tokens of `attention_mask` and the cache.
            attention_mask: 1 for real tokens, 0 for padding, [B, S] over cached and new tokens; the prefix of
                P-Tuning is not counted. A four-dimensional mask is handed to the attention as it is.
            past_key_values: a Cache, whose layers hold (B, G, S, D); it is extended in place.
            **kwargs: for the attention function.

        Returns:
            BaseModelOutputWithPast: last_hidden_state [B, T, C]; hidden_states are num_layers + 1 of that shape, the
            last one behind the final norm; attentions are num_layers of [B, H, T, S].

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds, an id outside of the vocabulary, a mask of
                another length, attention weights asked of a fused attention.
        """
        config = self.config
        return_dict = config.return_dict if return_dict is None else return_dict
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = config.use_cache if use_cache is None else use_cache
        if self.training and any(block.gradient_checkpointing for block in self.encoder.layers):
            use_cache = False  # the blocks run twice, and would write twice
        if output_attentions and attention_name(config) != "eager":
            raise ValueError(
                f"output_attentions=True: attn_implementation={attention_name(config)!r} never forms the weights. "
                "Load the model with attn_implementation='eager'."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds: one of the two, not both and not neither.")
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        B, T, _ = inputs_embeds.shape
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if not self.training:
            give_room(past_key_values)

        seen = self.count_cached_tokens(past_key_values)
        self._check_mask(attention_mask, past_key_values, seen, T)
        given_positions = position_ids  # only positions that a caller chose can tell packed sequences apart
        if position_ids is None:
            position_ids = self._default_positions(attention_mask, seen, T, inputs_embeds.device)
        rotary = rotary_cos_sin(config, position_ids)

        prefix, mask_cache = [None] * config.num_layers, past_key_values
        if config.pre_seq_len:
            self._check_prefix(past_key_values)
            cache_position = None  # generate() does not count the prefix
            if attention_mask is not None and attention_mask.dim() == 2:
                attention_mask = torch.cat((attention_mask.new_ones(B, config.pre_seq_len), attention_mask), dim=1)
            if past_key_values is None or past_key_values.get_seq_length() == 0:
                learned = self.prefix_encoder(B, inputs_embeds.dtype)
                mask_cache = DynamicCache() if past_key_values is None else past_key_values
                cache_kwargs = cache_update_kwargs(mask_cache, config.pre_seq_len, inputs_embeds.device)
                for i, (key, value) in enumerate(learned):
                    mask_cache.update(key, value, i, cache_kwargs)
                if past_key_values is None:  # training: the blocks put it in front of their own keys
                    prefix = learned

        cache_kwargs = cache_update_kwargs(mask_cache, T, inputs_embeds.device, cache_position)
        mask = causal_mask(config, inputs_embeds, attention_mask, mask_cache, given_positions, **cache_kwargs)

        x = inputs_embeds.float() if config.fp32_residual_connection else inputs_embeds
        hidden_states, attentions = (), ()
        for block, block_prefix in zip(self.encoder.layers, prefix):
            if output_hidden_states:
                hidden_states += (x,)
            x, weights = block(
                x,
                inputs_embeds.dtype,
                rotary,
                mask,
                past_key_values=past_key_values,
                cache_kwargs=cache_kwargs,
                prefix=block_prefix,
                **kwargs,
            )
            if output_attentions:
                attentions += (weights,)
        x = self.encoder.final_layernorm(x).to(inputs_embeds.dtype)  # (B, T, C)
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=hidden_states + (x,) if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

    def count_cached_tokens(self, past_key_values):
        """Tokens that the cache holds, the prefix of P-Tuning not counted."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        return max(seen - self.config.pre_seq_len, 0) if self.config.pre_seq_len else seen

    def _embed(self, input_ids):
        try:
            return self.embedding["word_embeddings"](input_ids)  # (B, T, C)
        except IndexError as error:
            raise ValueError(
                f"input_ids hold {input_ids.min().item()} to {input_ids.max().item()}, and the vocabulary has the ids "
                f"0 to {self.config.padded_vocab_size - 1}: was the text tokenized by another model's tokenizer?"
            ) from error

    @staticmethod
    def _default_positions(attention_mask, seen, length, device):
        """Positions [B or 1, T]: padding counts 0, real tokens 0, 1, 2, ..., going on from the cache."""
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:].to(device)
        return torch.arange(length, device=device)[None] + seen

    def _check_prefix(self, past_key_values):
        if getattr(past_key_values, "is_compileable", False):
            raise ValueError(
                f"A static cache has no room for the prefix of pre_seq_len={self.config.pre_seq_len}, which generate "
                "does not count: use the dynamic cache."
            )
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        if 0 < held < self.config.pre_seq_len:
            raise ValueError(
                f"The cache holds {held} tokens, fewer than the prefix of pre_seq_len={self.config.pre_seq_len}: it "
                "was cropped (assisted decoding before transformers 5 does so). Generate without assistance."
            )

    @staticmethod
    def _check_mask(attention_mask, past_key_values, seen, length):
        if attention_mask is None or attention_mask.dim() != 2 or getattr(past_key_values, "is_compileable", False):
            return
        if attention_mask.shape[1] != seen + length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, and {seen} cached tokens with {length} new "
                f"ones make {seen + length}. Give a mask over all of them, or none."
            )


class ChatGLMForConditionalGeneration(ChatMixin, ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM2 with `generate` and chat: the class behind AutoModel, AutoModelForCausalLM and AutoModelForSeq2SeqLM."""

    def __init__(self, config, empty_init=True, device=None):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.transformer.output_layer

    def set_output_embeddings(self, embeddings):
        self.transformer.output_layer = embeddings

    def forward(
        self,
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Scores of the next token.

        Args:
            labels: int [B, T], the input ids again, -100 where there is nothing to learn; they are shifted here.
            logits_to_keep: score the last so many positions only, or those of an index tensor; 0 scores all.
            num_items_in_batch: what the loss is divided by (the Trainer's, over accumulated batches); by default the
                number of labels that count.
            For the rest see `ChatGLMModel.forward`.

        Returns:
            CausalLMOutputWithPast: loss, a float32 scalar; logits [B, T or logits_to_keep, V].
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.transformer.output_layer(outputs.last_hidden_state[:, kept])  # (B, kept, V)
        loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()


LOSS_CHUNK = 1024  # positions whose scores are held in float32 at a time


def causal_lm_loss(logits, labels, num_items_in_batch=None):
    """Cross entropy of each next token, in float32: logits [B, T, V], labels [B, T], -100 ignored; a mean.

    The scores are widened chunk by chunk, and again in the backward pass, so that they are never all there in float32.
    """
    if logits.shape[1] != labels.shape[1]:
        raise ValueError(f"{labels.shape[1]} labels for {logits.shape[1]} scored positions: leave logits_to_keep at 0.")
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten().to(logits.device)  # (B T), the last one has no next
    chunks = zip(logits.flatten(0, 1).split(LOSS_CHUNK), targets.split(LOSS_CHUNK))
    total = sum(checkpoint(summed_cross_entropy, *chunk, use_reentrant=False) for chunk in chunks)
    return total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def summed_cross_entropy(scores, targets):
    return F.cross_entropy(scores.float(), targets, ignore_index=-100, reduction="sum")


class ChatGLMForSequenceClassification(ChatGLMPreTrainedModel):
    """A linear classifier on the last real token's hidden state."""

    def __init__(self, config, empty_init=True, device=None):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        """Scores of the labels.

        Args:
            labels: [B] class numbers, [B, num_labels] floats for several labels at once, or [B] floats where
                num_labels is 1; config.problem_type tells otherwise. For the rest see `ChatGLMModel.forward`.

        Returns:
            SequenceClassifierOutputWithPast: loss, a float32 scalar; logits [B, num_labels].
        """
        return_dict = self.config.return_dict if return_dict is None else return_dict
        outputs = self.transformer(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        x = outputs.last_hidden_state  # (B, T, C)
        last = torch.full((len(x),), x.shape[1] - 1, device=x.device)
        if attention_mask is not None:
            steps = torch.arange(x.shape[1], device=x.device)
            last = (attention_mask[:, -x.shape[1] :].to(x.device) * steps).argmax(-1)
        pooled = x[torch.arange(len(x), device=x.device), last]  # (B, C)
        logits = self.classifier_head(self.dropout(pooled))  # (B, num_labels)
        output = SequenceClassifierOutputWithPast(
            loss=None if labels is None else self._loss(logits.float(), labels.to(logits.device)),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict else output.to_tuple()

    def _loss(self, logits, labels):
        kind = self.config.problem_type
        if kind == "regression" or kind is None and self.num_labels == 1:
            return F.mse_loss(logits, labels.float().reshape(logits.shape))
        if kind == "multi_label_classification" or kind is None and (labels.is_floating_point() or labels.dim() > 1):
            return F.binary_cross_entropy_with_logits(logits, labels.float())
        return F.cross_entropy(logits, labels.view(-1))
