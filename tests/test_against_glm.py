"""An implementation that no one here wrote: transformers' GlmForCausalLM is this network under other names."""

import pytest
import torch
from chatglm2.transformers_compat import DynamicCache

pytestmark = pytest.mark.needs_transformers("4.46", "GlmForCausalLM")


def glm_config(config):
    """GlmConfig of the network that `config` describes."""
    from transformers import GlmConfig

    return GlmConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.multi_query_group_num,
        head_dim=config.kv_channels,
        rms_norm_eps=config.layernorm_epsilon,
        attention_bias=True,
        rope_theta=10000.0,
        partial_rotary_factor=0.5,
        max_position_embeddings=config.seq_length,
        pad_token_id=0,
        eos_token_id=2,
    )


def glm_state_dict(model):
    """The model's tensors under GlmForCausalLM's names: the fused query_key_value is split, the rest is renamed."""
    names = {
        "transformer.embedding.word_embeddings": "model.embed_tokens",
        "transformer.encoder.final_layernorm": "model.norm",
        "transformer.encoder.layers": "model.layers",
        "transformer.output_layer": "lm_head",
        "self_attention.dense": "self_attn.o_proj",
        "dense_h_to_4h": "gate_up_proj",
        "dense_4h_to_h": "down_proj",
    }
    config = model.config
    heads, groups, size = config.num_attention_heads, config.multi_query_group_num, config.kv_channels
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "query_key_value" in name:
            parts = tensor.split([heads * size, groups * size, groups * size])
            for letter, part in zip("qkv", parts):
                state[name.replace("self_attention.query_key_value", f"self_attn.{letter}_proj")] = part
        else:
            state[name] = tensor
    return state


def glm_twin(model):
    """GlmForCausalLM in float32, with eager attention and a copy of the model's weights."""
    from transformers import GlmForCausalLM

    config = glm_config(model.config)
    config._attn_implementation = "eager"
    twin = GlmForCausalLM(config)
    twin.load_state_dict(glm_state_dict(model))
    return twin.float().eval()


@torch.no_grad()
def test_prefill_and_cached_decode_equal_glms(make_model):
    """The same weights give the same logits to 1e-4: 20 tokens at once, then 8 one by one."""
    model = make_model()
    twin = glm_twin(model)
    ids = torch.randint(3, 320, (2, 28), generator=torch.Generator().manual_seed(5))
    caches = DynamicCache(), DynamicCache()
    for part in (ids[:, :20], *ids[:, 20:].split(1, dim=1)):
        ours = model(input_ids=part, past_key_values=caches[0]).logits
        theirs = twin(input_ids=part, past_key_values=caches[1], use_cache=True).logits
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padded_batch_generates_glms_ids(make_model, padded_batch):
    """Greedy ids of a left-padded batch are those of GlmForCausalLM."""
    model, (ids, mask, _) = make_model(), padded_batch
    twin = glm_twin(model)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), twin.generate(ids, **settings))
