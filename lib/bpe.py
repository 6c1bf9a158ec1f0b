"""Tokenizers for models that are trained from scratch, of the released tokenizer's kind."""

import io

import sentencepiece


def train_bpe(lines, vocab_size, character_coverage):
    """The bytes of a tokenizer.model: BPE, byte fallback, split digits, no normalization, as in the released one."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=character_coverage,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
