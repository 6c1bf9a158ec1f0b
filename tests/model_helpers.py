"""Helpers shared by the tests of the model: random ids, logits, and logits processors."""

import torch
from transformers import LogitsProcessor

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
GREEDY = {"do_sample": False, "max_new_tokens": 12}


def some_ids(rows=2, length=12, seed=3):
    return torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


class Forbid(LogitsProcessor):
    """Gives some ids (by default all) the score `fill`, and counts its calls."""

    def __init__(self, ids=(), fill=-float("inf")):
        self.ids, self.fill, self.calls = list(ids), fill, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, self.ids or slice(None)] = self.fill
        return scores


class Spell(LogitsProcessor):
    """Makes the model generate the given ids."""

    def __init__(self, ids):
        self.left = list(ids)

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -1e4)
        scores[:, self.left.pop(0)] = 0.0
        return scores
