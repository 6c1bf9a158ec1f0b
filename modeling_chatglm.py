"""The ChatGLM2 network.

Shapes:
    B batch size, T new tokens, S cached and new tokens, C hidden size, V vocabulary size,
    H query heads, G key/value groups, D head size, R = D / 2 rotated channels, P prefix tokens.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention_chatglm import causal_mask, check_arguments, choose_attention
from .blocks_cpu import BlocksInC
from .blocks_cuda import BlocksInGraph
from .generation_chatglm import ChatMixin, InvalidScoreLogitsProcessor  # noqa: F401 (other code imports it from here)
from .inference_cpu import gated_in_c, linear, rotate_in_c
from .inference_triton import gated_in_triton, rms_norm, rotate_in_triton
from .prefix_chatglm import PrefixEncoder
from .pretrained_chatglm import ChatGLMPreTrainedModel, OriginalAttributes, checkpointed
from .quantization import quantize
from .torch_compat import is_compiling, without_cudnn_attention
from .transformers_compat import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    DynamicCache,
    GenerationMixin,
    SequenceClassifierOutputWithPast,
    cache_kwargs,
    grow_in_place,
    is_paged,
    is_static,
    take_cache,
    update_paged,
)

if TYPE_CHECKING:  # the Hugging Face loader copies only the files named here, not what those import
    from .attention_cpu_source import TILE  # noqa: F401
    from .attention_triton import kernels  # noqa: F401
    from .blocks_chatglm import PlainBlocks  # noqa: F401
    from .blocks_cpu_source import BODY  # noqa: F401
    from .c_library import load  # noqa: F401
    from .chat_template_chatglm import ChatTemplateMixin  # noqa: F401
    from .checkpoint_chatglm import read_checkpoint  # noqa: F401
    from .configuration_chatglm import ChatGLMConfig  # noqa: F401
    from .family_chatglm import find_rope_ratio_type  # noqa: F401
    from .inference_cpu_source import PANEL  # noqa: F401
    from .quantization_calibration import calibrate  # noqa: F401
    from .quantization_cpm import linear as linear_cpm  # noqa: F401
    from .quantization_cpu import linear as linear_cpu  # noqa: F401
    from .quantization_cpu_avx2 import strip_source  # noqa: F401
    from .quantization_cpu_source import source  # noqa: F401
    from .quantization_format import pack  # noqa: F401
    from .quantization_loading import ChatGLMQuantizer  # noqa: F401
    from .quantization_stock import linear as linear_stock  # noqa: F401
    from .quantization_triton import linear as linear_triton  # noqa: F401
    from .streaming_chatglm import stream  # noqa: F401

# Rotary position embedding (Su et al., 2021, arXiv:2104.09864), over the first half of a head's channels


def rotary_cos_sin(config, position_ids):
    """Cosine and sine of the rotation angles: cos, sin [B, T, 1, R / 2], float32.

    theta_i = base^(-2i / R) with base 10000. float16 cannot tell positions above 2,048 apart (bfloat16: 256), so the
    angles are float32 whatever the dtype of the weights.
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


@rotate_in_triton
@rotate_in_c
def rotate(x, cos, sin):
    """Rotate the channel pairs (2i, 2i + 1) in the first half of each head; the second half is unchanged."""
    rotated, unchanged = x.chunk(2, dim=-1)  # (B, T, heads, R) each
    even, odd = rotated.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, heads, R / 2)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated.to(x.dtype), unchanged), dim=-1)


class Linear(nn.Linear):
    """nn.Linear. In eager inference on a CPU, C code that reads the weight once multiplies few tokens."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight in float32, cast at the end (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32, cast at the end; used if `rmsnorm` is False."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps).to(
            x.dtype
        )


def make_norm(config):
    norm = RMSNorm if config.rmsnorm else LayerNorm
    return norm(config.hidden_size, eps=config.layernorm_epsilon)


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary embedding: one fused projection to H query heads and G keys and values."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_groups  # H / G, as attention functions call it
        self.interleaved = not config.multi_query_attention
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.query_key_value = Linear(
            config.hidden_size,
            (self.num_heads + 2 * self.num_groups) * self.head_dim,
            bias=config.add_qkv_bias or config.add_bias_linear,
        )
        self.dense = Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x, rotary, attention_mask, attend, cache=None, cache_kwargs=None, prefix=None, **kwargs):
        B, T, _ = x.shape
        heads, groups = self.num_heads, self.num_groups
        mixed = self.query_key_value(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 G, D)
        if self.interleaved:  # rows are q, k, v of head 0, then of head 1, ...
            mixed = mixed.unflatten(2, (heads, 3)).transpose(2, 3).flatten(2, 3)
        rotated = rotate(mixed[:, :, : heads + groups], *rotary)  # query and key together
        query, key = rotated.transpose(1, 2).split((heads, groups), dim=1)  # (B, H, T, D), (B, G, T, D)
        value = mixed[:, :, heads + groups :].transpose(1, 2)  # (B, G, T, D)

        if prefix is not None:
            key, value = (torch.cat((p, new), dim=2) for p, new in zip(prefix, (key, value)))
        if is_paged(cache):  # continuous batching
            key, value = update_paged(cache, key, value, self.layer_idx, kwargs)
        elif cache is not None:
            key, value = cache.update(key, value, self.layer_idx, cache_kwargs)  # (B, G, S, D)

        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.dense(output.reshape(B, T, -1)), weights  # (B, T, C), (B, H, T, S)


@gated_in_triton
@gated_in_c
def gated(x):
    """silu(gate) * up, for x (..., 2 ffn_hidden_size), gate and up side by side."""
    gate, up = x.chunk(2, dim=-1)
    if torch.is_grad_enabled():
        return F.silu(gate) * up
    return F.silu(gate).mul_(up)  # in place: a long prompt's memory peaks here


class MLP(nn.Module):
    """SwiGLU: dense_4h_to_h(silu(gate) * up), gate and up from one projection (Shazeer, 2020, arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, x):
        return self.dense_4h_to_h(gated(self.dense_h_to_4h(x)))


class GLMBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    gradient_checkpointing = False

    def __init__(self, config, layer_idx):
        super().__init__()
        self.residual_after_norm = config.apply_residual_connection_post_layernorm
        self.input_layernorm = make_norm(config)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    @checkpointed
    def forward(self, x, dtype, rotary, attention_mask, **kwargs):
        normed = self.input_layernorm(x)
        update, weights = self.self_attention(normed.to(dtype), rotary, attention_mask, **kwargs)
        x = self.add(x, normed, update)
        del update  # free it before the MLP
        normed = self.post_attention_layernorm(x)
        return self.add(x, normed, self.mlp(normed.to(dtype))), weights  # (B, T, C), (B, H, T, S) or None

    def add(self, x, normed, update):
        if self.dropout.training:  # otherwise a no-op, and every call slows a decode step
            update = self.dropout(update)
        return (normed if self.residual_after_norm else x) + update  # (B, T, C)


class Embedding(nn.Module):
    """Token ids [B, T] to embeddings (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size, config.hidden_size)

    def forward(self, input_ids):
        try:
            return self.word_embeddings(input_ids)
        except IndexError as error:
            raise ValueError(
                f"input_ids range from {input_ids.min().item()} to {input_ids.max().item()}, but the vocabulary has "
                f"ids 0 to {self.word_embeddings.num_embeddings - 1}: was the text encoded by another tokenizer?"
            ) from error


classes = globals(), GLMBlock, SelfAttention, MLP, RMSNorm, Linear
blocks_at_once = {"cpu": BlocksInC(*classes), "cuda": BlocksInGraph(*classes)}  # a few new tokens through all blocks


class GLMTransformer(nn.Module):
    """The blocks and the final norm."""

    def __init__(self, config):
        super().__init__()
        self.num_layers = config.num_layers
        self.fp32_residual = config.fp32_residual_connection
        self.layers = nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = make_norm(config) if config.post_layer_norm else nn.Identity()

    def forward(self, x, rotary, attention_mask, attend, cache=None, cache_kwargs=None, prefix=None,
                output_hidden_states=False, output_attentions=False, **kwargs):  # fmt: skip
        """Run x (B, T, C) through all blocks; return it with the requested hidden states and attention weights."""
        at_once = blocks_at_once.get(x.device.type)
        if at_once and not (output_hidden_states or prefix or self.fp32_residual or kwargs):
            y = at_once(self.layers, x, rotary, attention_mask, attend, cache)
            if y is not None:
                return self.final_layernorm(y).to(x.dtype), None, None
        dtype, hidden_states, attentions = x.dtype, (), ()
        x = x.float() if self.fp32_residual else x
        for i, block in enumerate(self.layers):
            if output_hidden_states:
                hidden_states += (x,)
            x, weights = block(
                x, dtype, rotary, attention_mask, attend=attend, cache=cache, cache_kwargs=cache_kwargs,
                prefix=prefix[i] if prefix else None, **kwargs,
            )  # fmt: skip
            if output_attentions:
                attentions += (weights,)
        x = self.final_layernorm(x).to(dtype)  # (B, T, C)
        if output_hidden_states:
            hidden_states += (x,)
        return x, hidden_states or None, attentions or None


class ChatGLMModel(OriginalAttributes, ChatGLMPreTrainedModel):
    """The network up to the final norm. It also owns the output layer, as in the released checkpoints."""

    def __init__(self, config, empty_init=False, device=None):
        super().__init__(config)
        with self.building(empty_init, device):
            self.embedding = Embedding(config)
            self.encoder = GLMTransformer(config)
            self.output_layer = Linear(config.hidden_size, config.padded_vocab_size, bias=False)
            if config.quantization_bit:  # empty int8 or int4 layers, filled from the checkpoint
                quantize(self, config.quantization_bit, empty_init=True, **config.quantization_options)
            if config.pre_seq_len:
                self.prefix_encoder = PrefixEncoder(config)
        self.freeze_all_but_prefix()

    def freeze_all_but_prefix(self):
        """P-Tuning trains only the prefix."""
        if self.config.pre_seq_len:
            self.requires_grad_(False)
            self.prefix_encoder.requires_grad_(True)

    def get_input_embeddings(self):
        return self.embedding.word_embeddings

    def set_input_embeddings(self, embeddings):
        self.embedding.word_embeddings = embeddings

    def forward(
        self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
        full_attention_mask=None, cache=None, cache_position=None, **kwargs,
    ):  # fmt: skip
        """Compute the hidden states of new tokens.

        Args:
            input_ids: int [B, T]; alternatively `inputs_embeds`, float [B, T, C].
            position_ids: int [B, T]; by default derived from `attention_mask` and the length of the cache. With
                use_cache=False, a jump in them starts another packed sequence.
            attention_mask: [B, S] over cached and new tokens, without the P-Tuning prefix: 1 for real tokens, 0 for
                padding. A 4D mask is passed to the attention function unchanged.
            output_attentions: return the attention weights, for which this call uses eager attention in place of sdpa.
            full_attention_mask: boolean [B, T, S] or [B, 1, T, S], True where a query may *not* attend; replaces the
                causal mask and the padding of attention_mask, and covers the P-Tuning prefix, too.
            cache, past_key_values: two names of the key/value cache, (B, G, S, D) per layer, updated in place.
            **kwargs: passed to the attention function, see `attention_chatglm.KEYWORDS`.

        Returns:
            BaseModelOutputWithPast: last_hidden_state [B, T, C]; hidden_states, num_layers + 1 tensors [B, T, C], the
            last one after the final norm; attentions, num_layers tensors [B, H, T, S]; the cache, under both names.

        Raises:
            TypeError: an unknown keyword argument.
            ValueError: both or neither of input_ids and inputs_embeds, an id outside the vocabulary (on a CPU), a mask
                of the wrong length, two caches, or output_attentions with an attention function of transformers.
        """
        config = self.config
        cache = take_cache(kwargs, cache, past_key_values)
        check_arguments(cache, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        cache, use_cache = self._resolve_cache(cache, use_cache)
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states

        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        T, seen = x.shape[1], self.count_cached_tokens(cache)
        self._check_mask(attention_mask, cache, seen, T)
        positions = self.default_positions(attention_mask, seen, x) if position_ids is None else position_ids
        rotary = rotary_cos_sin(config, positions)

        if full_attention_mask is not None:
            attention_mask = ~full_attention_mask.bool().reshape(-1, 1, *full_attention_mask.shape[-2:])
        prefix = None
        if config.pre_seq_len:
            prefix, attention_mask = self.prefix_encoder.prepend(x, attention_mask, cache)
            cache_position = None  # generate does not count the prefix
        update_kwargs = cache_kwargs(cache, T, x.device, cache_position)
        mask = causal_mask(config, x, attention_mask, cache, position_ids, prefix=prefix, **update_kwargs)

        lengths_vary = x.is_cuda and not (torch.is_grad_enabled() or is_compiling() or is_static(cache))
        with without_cudnn_attention(lengths_vary):
            x, hidden_states, attentions = self.encoder(
                x,
                rotary,
                mask,
                choose_attention(config, x, mask, is_paged(cache), self.training, output_attentions),
                cache=cache,
                cache_kwargs=update_kwargs,
                prefix=prefix,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                **kwargs,
            )
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            cache=cache if use_cache else None,
            hidden_states=hidden_states,
            attentions=attentions,
        )
        return self.to_requested_type(output, return_dict)

    def _resolve_cache(self, cache, use_cache):
        """Return (cache or None, whether to return it to the caller)."""
        checkpointed = self.training and torch.is_grad_enabled() and self.is_activation_checkpointing
        if checkpointed:  # recomputed blocks would update the cache twice
            if cache is not None and cache.get_seq_length():
                raise ValueError(
                    "The cache holds tokens, but activation checkpointing cannot update it: train without a cache, or "
                    "call activation_checkpointing_disable()."
                )
            return None, False
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache()
        if not self.training:
            grow_in_place(cache)
        return cache, use_cache

    def count_cached_tokens(self, cache):
        """Number of tokens in the cache, excluding the P-Tuning prefix."""
        seen = 0 if cache is None or is_paged(cache) else cache.get_seq_length()
        return max(seen - self.config.pre_seq_len, 0) if self.config.pre_seq_len else seen

    @staticmethod
    def default_positions(attention_mask, seen, x):
        """Positions [B or 1, T] of x: 0 for padding, 0, 1, 2, ... for real tokens, continuing from the cache."""
        if attention_mask is not None and attention_mask.dim() == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :].to(x.device)
        return torch.arange(x.shape[1], device=x.device)[None] + seen

    @staticmethod
    def _check_mask(attention_mask, cache, seen, length):
        if attention_mask is None or attention_mask.dim() != 2 or is_static(cache) or is_paged(cache):
            return
        if attention_mask.shape[1] != seen + length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, but there are {seen} cached and {length} new "
                f"tokens. Pass a mask with {seen + length} columns, or None."
            )


class ChatGLMForConditionalGeneration(ChatMixin, ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM2 with `generate` and chat; AutoModel, AutoModelForCausalLM and AutoModelForSeq2SeqLM load this class."""

    def __init__(self, config, empty_init=False, device=None):
        super().__init__(config)
        with self.building(empty_init, device):
            self.transformer = ChatGLMModel(config)

    def get_output_embeddings(self):
        return self.transformer.output_layer

    def set_output_embeddings(self, embeddings):
        self.transformer.output_layer = embeddings

    def forward(
        self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
        return_last_logit=False, cache=None, logits_to_keep=0, num_items_in_batch=None, **kwargs,
    ):  # fmt: skip
        """Compute next-token logits.

        Args:
            labels: int [B, T], input_ids with -100 at positions to ignore; shifted by one inside.
            logits_to_keep: compute logits only for this many last positions, or for an index tensor; 0 means all.
            return_last_logit: the original's name for logits_to_keep=1.
            num_items_in_batch: divisor of the summed loss, set by Trainer for gradient accumulation; by default the
                number of labels that are not ignored.
            For the other arguments see `ChatGLMModel.forward`.

        Returns:
            CausalLMOutputWithPast: loss, a float32 scalar; logits [B, T or logits_to_keep, V].
        """
        outputs = self.transformer(
            input_ids, position_ids, attention_mask, past_key_values=past_key_values, inputs_embeds=inputs_embeds,
            use_cache=use_cache, output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            return_dict=True, cache=cache, **kwargs,
        )  # fmt: skip
        logits_to_keep = 1 if return_last_logit else logits_to_keep
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.transformer.output_layer(outputs.last_hidden_state[:, kept])  # (B, kept, V)
        loss = None if labels is None else causal_lm_loss(logits, labels, num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return self.to_requested_type(output, return_dict)


LOSS_CHUNK = 1024  # positions whose logits are converted to float32 at a time


def causal_lm_loss(logits, labels, num_items_in_batch=None):
    """Mean cross entropy of the next token, in float32: logits [B, T, V], labels [B, T] with -100 ignored.

    Logits are converted to float32 chunk by chunk, and again in the backward pass, so that no full copy exists.
    """
    if logits.shape[1] != labels.shape[1]:
        raise ValueError(f"{labels.shape[1]} labels for {logits.shape[1]} logits: set logits_to_keep=0 with labels.")
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)  # the last position has no next token
    targets = targets.flatten().to(logits.device)  # (B T)
    chunks = zip(logits.flatten(0, 1).split(LOSS_CHUNK), targets.split(LOSS_CHUNK))
    total = sum(checkpoint(summed_cross_entropy, *chunk, use_reentrant=False) for chunk in chunks)
    return total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def summed_cross_entropy(logits, targets):
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


class ChatGLMForSequenceClassification(ChatGLMPreTrainedModel):
    """A linear classifier on the hidden state of the last real token."""

    def __init__(self, config, empty_init=False, device=None):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        with self.building(empty_init, device):
            self.transformer = ChatGLMModel(config)
            self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
            self.classifier_head.torch_init = True

    def forward(
        self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
        full_attention_mask=None, cache=None, **kwargs,
    ):  # fmt: skip
        """Compute classification logits.

        Args:
            labels: [B] class indices, [B, num_labels] floats for multi-label classification, or [B] floats for
                regression (num_labels=1); config.problem_type overrides this.
            For the other arguments see `ChatGLMModel.forward`.

        Returns:
            SequenceClassifierOutputWithPast: loss, a float32 scalar; logits [B, num_labels].
        """
        outputs = self.transformer(
            input_ids, position_ids, attention_mask, past_key_values=past_key_values, inputs_embeds=inputs_embeds,
            use_cache=use_cache, output_attentions=output_attentions, output_hidden_states=output_hidden_states,
            return_dict=True, full_attention_mask=full_attention_mask, cache=cache, **kwargs,
        )  # fmt: skip
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
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return self.to_requested_type(output, return_dict)

    def _loss(self, logits, labels):
        kind = self.config.problem_type
        if kind == "regression" or kind is None and self.num_labels == 1:
            return F.mse_loss(logits, labels.float().reshape(logits.shape))
        if kind == "multi_label_classification" or kind is None and (labels.is_floating_point() or labels.dim() > 1):
            return F.binary_cross_entropy_with_logits(logits, labels.float())
        return F.cross_entropy(logits, labels.view(-1))
