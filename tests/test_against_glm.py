"""An implementation that no one here wrote: transformers' GlmForCausalLM is this network under other names."""

import pytest
import torch
from chatglm2.transformers_compat import CACHE, DynamicCache

pytestmark = pytest.mark.needs_transformers("4.46", "GlmForCausalLM")


def glm_twin(model):
    """GlmForCausalLM in float32, with eager attention and a copy of the model's weights."""
    from glm import glm_config, glm_state_dict
    from transformers import GlmForCausalLM

    config = glm_config(model.config)
    config._attn_implementation = "eager"
    twin = GlmForCausalLM(config)
    twin.load_state_dict(glm_state_dict(model))
    return twin.float().eval()


@torch.no_grad()
def test_prefill_and_cached_decode_match_glm(make_model):
    """The same weights give the same logits to 1e-4: 20 tokens at once, then 8 one by one."""
    model = make_model()
    twin = glm_twin(model)
    ids = torch.randint(3, 320, (2, 28), generator=torch.Generator().manual_seed(5))
    caches = DynamicCache(), DynamicCache()
    for part in (ids[:, :20], *ids[:, 20:].split(1, dim=1)):
        ours = model(input_ids=part, cache=caches[0]).logits
        theirs = twin(input_ids=part, use_cache=True, **{CACHE: caches[1]}).logits
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padded_batch_matches_glm(make_model, padded_batch):
    """Greedy ids of a left-padded batch are those of GlmForCausalLM."""
    model, (ids, mask, _) = make_model(), padded_batch
    twin = glm_twin(model)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), twin.generate(ids, **settings))
