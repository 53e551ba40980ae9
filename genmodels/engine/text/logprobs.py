"""How probable tokens were: the log-softmax of the network's own logits, before penalties, biases and filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from genmodels.data.text import Tokenizer
from genmodels.nn.sampling import not_finite


@dataclass(frozen=True)
class TokenLogprob:
    """A token of a choice's text. Both figures are None where the network has read nothing before the token."""

    text: str
    offset: int  # of its first character in the choice's text
    logprob: float | None = None  # nats, at temperature 1
    top: dict[str, float] | None = None  # the most probable tokens in its place, and itself


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], offset: int, most: int, tokenizer: Tokenizer
) -> list[TokenLogprob]:
    """Of tokens that follow each other; computed in float64.

    Args:
        logits: (n, vocab_size); row i is what the network expected in the place of token i.
        offset: of the first token in the text.
        most: how many of the most probable tokens to name in each place, beside the token itself.

    Raises:
        RequestError: a logit is not finite.
    """
    if not logits.isfinite().all():
        raise not_finite()
    values = logits.double().log_softmax(-1)
    best, order = values.sort(dim=-1, descending=True, stable=True)
    found = []
    for token, row, top, ids in zip(tokens, values, best[:, :most].tolist(), order[:, :most].tolist(), strict=True):
        text, own = tokenizer.decode([token]), float(row[token])
        named = {tokenizer.decode([other]): value for other, value in zip(ids, top, strict=True)}
        found.append(TokenLogprob(text, offset, own, {**named, text: own}))
        offset += len(text)
    return found
