"""configuration_chatglm: standard names, and values that are rejected."""

import pytest


def test_standard_config_names(make_config):
    """transformers' names read and write the released values."""
    config = make_config()
    assert config.num_hidden_layers == 3 and config.num_key_value_heads == 2 and config.head_dim == 16
    assert config.intermediate_size == 96 and config.max_position_embeddings == 256 and config.vocab_size == 320
    assert make_config(multi_query_attention=False).num_key_value_heads == 4
    config.num_hidden_layers = 2
    assert config.num_layers == 2 and config.to_dict()["num_layers"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multi_query_group_num": 3}, "num_attention_heads=4 is not a multiple of multi_query_group_num=3"),
        ({"kv_channels": 6}, "kv_channels=6 is not a multiple of 4"),
        ({"rope_ratio_type": "ntk"}, "rope_ratio_type='ntk' is unknown"),
        ({"rope_ratio": 0}, "rope_ratio=0 must be above 0"),
        ({"quantization_bit": 3}, "quantization_bit=3 is unknown"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ],
)
def test_invalid_configurations_are_rejected(make_config, changes, message):
    """The error gives the value, the limit and the remedy."""
    with pytest.raises(ValueError, match=message):
        make_config(**changes)
