"""Log-probabilities of tokens: the log-softmax of the network's own logits, before penalties, biases and filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from genmodels.data.text import Tokenizer
from genmodels.nn.sampling import not_finite


@dataclass(frozen=True)
class TokenLogprob:
    """A token of a choice's text. `logprob` and `top` are None if the network has seen no token before it."""

    text: str
    offset: int  # of its first character in the choice's text
    logprob: float | None = None  # nats, at temperature 1
    top: dict[str, float] | None = None  # log-probabilities of the most probable tokens and of this token


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], offset: int, num_top: int, tokenizer: Tokenizer
) -> list[TokenLogprob]:
    """Return the log-probabilities of consecutive tokens, computed in float64.

    Args:
        logits: (n, vocab_size); row i is the network's prediction for token i.
        offset: of the first token in the text.
        num_top: number of most probable tokens to list at each position, in addition to the token itself.

    Raises:
        RequestError: a logit is not finite.
    """
    if not logits.isfinite().all():
        raise not_finite()
    values = logits.double().log_softmax(-1)
    best, order = values.sort(dim=-1, descending=True, stable=True)
    best_values, best_ids = best[:, :num_top].tolist(), order[:, :num_top].tolist()
    logprobs = []
    for token, row, top, ids in zip(tokens, values, best_values, best_ids, strict=True):
        text, own = tokenizer.decode([token]), float(row[token])
        named = {tokenizer.decode([other]): value for other, value in zip(ids, top, strict=True)}
        logprobs.append(TokenLogprob(text, offset, own, {**named, text: own}))
        offset += len(text)
    return logprobs
