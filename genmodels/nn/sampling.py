"""Choose the next token from a network's logits: the settings of a request, and keyed randomness.

Penalty on repetition: Keskar et al. 2019 (CTRL), https://arxiv.org/abs/1909.05858
Nucleus (top_p): Holtzman et al. 2019, https://arxiv.org/abs/1904.09751
min_p: Nguyen et al. 2024, https://arxiv.org/abs/2407.01082
Presence and frequency penalties: as OpenAI's API defines them, over the tokens of the answer.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from genmodels.errors import RequestError
from genmodels.nn.transfer import to_device
from genmodels.schema.base import Section
from genmodels.schema.field_errors import field_error, show

TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]
MAX_BIASES = 1024

MAX_INT = 2**31 - 1  # of integers that are compared with tensors


class SamplingOptions(Section):
    """Options of a completion: how many tokens, and how they are chosen."""

    max_tokens: int = Field(200, ge=0, le=4096, description="largest number of tokens in the answer")
    temperature: float = Field(
        0.8, ge=0, le=100, description="0 always takes the most probable token; higher is more varied"
    )
    top_k: int | None = Field(None, ge=1, le=MAX_INT, description="choose among the k most probable tokens only")
    top_p: float = Field(
        1.0, gt=0, le=1, description="choose among the most probable tokens whose probabilities add up to p"
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="drop tokens less probable than this fraction of the most probable token"
    )
    repetition_penalty: float = Field(
        1.0, ge=0.01, le=10, description="above 1: make tokens of the prompt and the answer less probable"
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="subtracted from the logits of tokens that are in the answer"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="subtracted once for each time that the token is in the answer"
    )
    logit_bias: dict[TokenId, Bias] = Field({}, max_length=MAX_BIASES, description="added to logits, by token id")

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _ids_are_text_in_json(cls, bias: Any) -> Any:
        if not isinstance(bias, dict):
            return bias
        if len(bias) > MAX_BIASES:  # before the check of each entry
            raise field_error(f"got {len(bias)} entries, expected at most {MAX_BIASES}")
        for key in bias:
            if isinstance(key, str) and not re.fullmatch("0|[1-9][0-9]{0,8}", key):
                raise field_error(f"got the key {show(key)}, expected the id of a token, as in {{'11': -100}}")
        return {int(key) if isinstance(key, str) else key: value for key, value in bias.items()}


class Sampler:
    """Choose the tokens of one answer. The randomness depends on `seed` and a token's number in the answer alone.

    Raises:
        RequestError: `prompt` or `logit_bias` names a token that does not exist.
    """

    def __init__(self, options: SamplingOptions, seed: int, prompt: Sequence[int], vocab_size: int) -> None:
        _check_tokens("prompt", prompt, vocab_size)
        _check_tokens("logit_bias", options.logit_bias, vocab_size)
        self.options, self.seed, self.count = options, seed, 0
        self._device = torch.device("cpu")  # of the tensors below: from the first token on, that of the logits
        self._bias: Tensor | None = None
        if options.logit_bias:
            self._bias = torch.zeros(vocab_size, dtype=torch.float64)
            self._bias[list(options.logit_bias)] = torch.tensor(list(options.logit_bias.values()), dtype=torch.float64)
        self._penalises = (
            options.repetition_penalty != 1 or options.presence_penalty != 0 or options.frequency_penalty != 0
        )
        if self._penalises:
            self._read = torch.zeros(vocab_size, dtype=torch.bool)
            self._read[list(prompt)] = True
            self._written = torch.zeros(vocab_size, dtype=torch.float64)

    @property
    def adjusts(self) -> bool:
        """Return whether `adjust` changes anything."""
        return self._penalises or self._bias is not None

    def adjust(self, logits: Tensor) -> Tensor:
        """Apply penalties and biases to logits (vocab_size,), float64."""
        if logits.device != self._device:
            self._move_to(logits.device)
        options = self.options
        if self._penalises:
            repeated = torch.where(logits > 0, logits / options.repetition_penalty, logits * options.repetition_penalty)
            logits = torch.where(self._read, repeated, logits)
            logits = logits - options.frequency_penalty * self._written
            logits = logits - options.presence_penalty * (self._written > 0)
        return logits if self._bias is None else logits + self._bias

    @property
    def done(self) -> bool:
        """Return True if the answer has `max_tokens` tokens."""
        return self.count >= self.options.max_tokens

    def accept(self, token: int) -> None:
        """Append this token to the answer."""
        self.count += 1
        if self._penalises:
            self._read[token] = True
            self._written[token] += 1

    def _move_to(self, device: torch.device) -> None:
        self._device = device
        if self._bias is not None:
            self._bias = to_device(self._bias, device)
        if self._penalises:
            self._read, self._written = to_device(self._read, device), to_device(self._written, device)


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Draw the next token of each of n answers and let its sampler accept it: logits (n, vocab_size).

    Raises:
        RequestError: a number of a row is not finite; then no sampler has accepted a token.
    """
    tokens = []
    for token in draw(logits, samplers):
        if isinstance(token, Exception):
            raise token
        tokens.append(token)
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.accept(token)
    return tokens


def draw(logits: Tensor, samplers: Sequence[Sampler], rows: int | None = None) -> list[int | Exception]:
    """Draw the next token of each of n answers, or return the error of a row: logits (n, vocab_size).

    All is computed on the device of the logits, and then the tokens are copied to the host at once. A row's token does
    not depend on the other rows. No sampler changes: a second call gives the same tokens. Each token is checked here,
    so that `Sampler.accept` cannot fail.

    Args:
        rows: the largest n. A GPU computes with so many rows each time, because it adds up in an order that depends on
            their number.
    """
    size = logits.shape[-1]
    stacked, errors = logits.double(), dict[int, Exception]()
    if any(sampler.adjusts for sampler in samplers):
        stacked, errors = _all_adjusted(stacked, samplers)
    spare = (rows or 0) - len(samplers) if logits.device.type == "cuda" else 0
    drawn = _drawn(F.pad(stacked, (0, 0, 0, spare)) if spare > 0 else stacked, samplers)[: len(samplers)]
    tokens = torch.where(stacked.isfinite().all(-1), drawn, -1).cpu().tolist()
    return [
        errors[row] if row in errors else token if 0 <= token < size else not_finite()
        for row, token in enumerate(tokens)
    ]


def not_finite() -> RequestError:
    """Return the error of an answer whose logits are not finite."""
    message = "the model's numbers are no longer finite for this text; try another prompt or version"
    return RequestError(message, status=500, code="not_finite")


def _all_adjusted(logits: Tensor, samplers: Sequence[Sampler]) -> tuple[Tensor, dict[int, Exception]]:
    """Return the adjusted rows, and the errors by row; a row with an error is NaN."""
    rows, errors = [], {}
    for row, (own, sampler) in enumerate(zip(logits, samplers, strict=True)):
        try:
            rows.append(sampler.adjust(own))
        except Exception as error:
            rows.append(torch.full_like(own, math.nan))
            errors[row] = error
    return torch.stack(rows), errors


def _drawn(rows: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Return the token of each row (n, vocab_size) -> (n,); any number for a row that is not finite or has no sampler.

    The settings of all rows are one tensor, for one copy to the device.
    """
    size, options = rows.shape[-1], [sampler.options for sampler in samplers]
    settings = [
        (uniform(sampler.seed, sampler.count), one.temperature or 1.0, one.top_k or size, one.top_p, one.min_p)
        for sampler, one in zip(samplers, options, strict=True)
    ]
    settings += [(0.0, 1.0, size, 1.0, 0.0)] * (len(rows) - len(samplers))
    columns = to_device(torch.tensor(settings, dtype=torch.float64), rows.device).split(1, dim=-1)
    draws, temperature, top_k, top_p, min_p = columns
    probabilities = ((rows - rows.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if any(one.top_k is not None or one.top_p < 1 or one.min_p > 0 for one in options):
        probabilities = _dropped(probabilities, top_k, top_p, min_p)
    # add up in the order of ids: then rounding that swaps two equally probable tokens hardly changes the sums
    cumulative = probabilities.cumsum(-1)
    drawn = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)[:, 0]
    greedy = [one.temperature == 0 for one in options] + [False] * (len(rows) - len(samplers))
    return torch.where(to_device(torch.tensor(greedy), rows.device), rows.argmax(-1), drawn) if any(greedy) else drawn


def _dropped(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Set the tokens that the options (n, 1) exclude to 0: (n, vocab_size); the sum is then below 1."""
    descending, order = probabilities.sort(dim=-1, descending=True, stable=True)
    mass_before = descending.cumsum(-1) - descending
    ranks = torch.arange(probabilities.shape[-1], device=probabilities.device)
    dropped = (ranks >= top_k) | (descending < min_p * descending[:, :1])
    dropped |= (mass_before >= top_p) & (top_p < 1)
    return probabilities.scatter(-1, order, descending.masked_fill(dropped, 0.0))


def _check_tokens(param: str, tokens: Collection[int], vocab_size: int) -> None:
    for token in (min(tokens, default=0), max(tokens, default=0)):
        if not 0 <= token < vocab_size:
            message = f"{param}: token {token} does not exist; this model's are 0 to {vocab_size - 1}"
            raise RequestError(message, param=param, code="invalid_value")


def uniform(seed: int, index: int) -> float:
    """Return a random number in [0, 1) that depends on the arguments alone, in each process and on each device."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48  # 48 bits: products with it stay below the other factor
