"""pretrained_chatglm: activation checkpointing, embeddings, copies and offloading. test_loading.py has loading."""

import copy
import pickle

import pytest
import torch
from model_helpers import CLOSE, logits, some_ids


@pytest.mark.parametrize("changes", [{}, {"pre_seq_len": 5}], ids=["weights", "prefix"])
def test_gradient_checkpointing_preserves_gradients(make_model, changes):
    """Recomputed blocks give the same gradients, for the weights and for the prefix."""
    ids, gradients = some_ids(), []
    for checkpointing in (False, True):
        model = make_model(**changes).train()
        if changes:
            model.transformer.prefix_encoder.dropout.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


@pytest.mark.parametrize("options", [None, {"preserve_rng_state": False}])
def test_gradient_checkpointing_is_non_reentrant(make_model, options):
    """Only non-reentrant checkpointing computes gradients if no input requires one, as with LoRA."""
    model = make_model().train()
    model.requires_grad_(False)
    model.transformer.encoder.layers[0].self_attention.dense.weight.requires_grad_(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    ids = some_ids()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert model.transformer.encoder.layers[0].self_attention.dense.weight.grad.abs().sum() > 0


def test_get_set_and_resize_embeddings(make_model):
    """resize_token_embeddings keeps the old rows and updates the config and the output layer."""
    model, ids = make_model(), some_ids()
    before = logits(model, ids)
    assert model.get_input_embeddings() is model.transformer.embedding.word_embeddings
    assert model.get_output_embeddings() is model.transformer.output_layer
    model.resize_token_embeddings(330)
    after = logits(model, ids)
    assert after.shape[-1] == 330 and model.config.vocab_size == model.config.padded_vocab_size == 330
    torch.testing.assert_close(after[..., :320], before, **CLOSE)


def test_deepcopy_and_pickle(make_model):
    """Copies compute the same and share no memory."""
    model, ids = make_model(), some_ids()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), logits(model, ids))
        assert other.transformer.output_layer.weight.data_ptr() != model.transformer.output_layer.weight.data_ptr()


def test_offloaded_layers(make_model, tmp_path):
    """accelerate's CPU and disk offload do not change the logits."""
    from accelerate import cpu_offload, disk_offload

    ids = some_ids()
    want = logits(make_model(), ids)
    assert torch.equal(logits(cpu_offload(make_model(), torch.device("cpu")), ids), want)
    assert torch.equal(logits(disk_offload(make_model(), str(tmp_path), torch.device("cpu")), ids), want)
