"""What `transformers serve` asks of a model whose code comes with the checkpoint."""

import sys

from tokenizers import AddedToken, Tokenizer, decoders, models

ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")


def lend_architectures():
    """Within `transformers serve`, let it find the model: it looks `architectures` up among its own classes alone.

    AutoModelForCausalLM, under each of our names, follows the checkpoint's `auto_map` and asks for
    `--trust-remote-code` as ever. Any other process is left as it is.
    """
    server = sys.modules.get("transformers.cli.serving.model_manager")
    if server is None:
        return
    from transformers import AutoModelForCausalLM

    for name in ARCHITECTURES:
        if not hasattr(server.transformers, name):
            setattr(server.transformers, name, AutoModelForCausalLM)


def rust_decoder(vocab, special_tokens):
    """A `tokenizers.Tokenizer` that turns ids into text as SentencePiece does; it has no merges to go the other way.

    Args:
        vocab: token -> id; pieces with "▁" for a space and "<0xE4>" for a byte.
        special_tokens: the tokens of `vocab` that give no text with `skip_special_tokens`.

    Ids beyond `vocab`, of tokens that a user added, give no text.
    """
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special_tokens])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
