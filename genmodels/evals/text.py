"""Evaluate a text model: its exact loss against count tables, and its samples against the validation text.

Count tables: R. Kneser and H. Ney, "Improved backing-off for m-gram language modeling", 1995; S. Chen and J. Goodman,
"An empirical study of smoothing techniques for language modeling", 1999.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genmodels.family import Decoder, EvaluationData, EvaluationMetric, EvaluationResult, Note, TextFamily, slide_window
from genmodels.nn.sampling import Sampler, SamplingOptions, choose
from genmodels.sizing.memory import SERVED_ROWS

IGNORED = -1  # target of the padding in the last window of a text
TABLES = {2: "table of bigrams", 4: "table of 4-grams", 5: "table of 5-grams"}
COUNTED = 2**23  # maximum number of training tokens for count tables and the search for copies
PUBLISHED = 2**17  # first tokens of val for an evaluation in seconds; tiny-shakespeare has fewer
ROWS = 128  # windows of one pass
PROMPT = 16  # tokens of val that a sample continues
REPEATED = 10  # tokens of one repetition


def evaluate_text(family: TextFamily[Any, Any], data: EvaluationData) -> EvaluationResult:
    """Compute the evaluation's metrics; those against count tables only if the codes fit (see `ngram_losses`)."""
    train, val = data.train["tokens"][:COUNTED], data.val["tokens"]
    val = val if data.thorough else val[:PUBLISHED]
    halves = _exact_loss(family, data, val)
    tables = _tables(family, data, train, val)
    loss, second = (_measure(value, tables, part) for part, value in enumerate(halves))
    measures = {
        "loss": loss,
        "second_half_loss": second,
        "bits_per_token": EvaluationMetric(value=loss.value / math.log(2)),
    }
    for n, name in ((2, "nats_below_bigrams"), (4, "nats_below_4grams")):
        if TABLES[n] in loss.baselines:
            measures[name] = EvaluationMetric(value=loss.baselines[TABLES[n]] - loss.value, unit="nats")

    count, length = (64, 1000) if data.thorough else (16, 400)
    notes: dict[str, Note] = {"val_tokens": len(val), "training_tokens_counted": len(train)}
    starts = np.linspace(0, len(val) - PROMPT - length - 1, count).astype(np.int64)
    if starts[-1] < 0:  # a val that is shorter than one sample
        return EvaluationResult(metrics=measures, notes=notes)
    people = val[starts[:, None] + np.arange(PROMPT + length)]
    samples = write(family, people[:, :PROMPT].tolist(), length, data).astype(people.dtype)
    people = people[:, PROMPT:]
    copied, in_val = (longest_shared(part, train, family.data.vocab_size) for part in (samples, people))
    measures["longest_copied"] = EvaluationMetric(value=copied, unit="tokens", baselines={"val": in_val})
    repeated, by_people = (repetition(part, REPEATED) for part in (samples, people))
    measures["repetition"] = EvaluationMetric(value=repeated, baselines={"val": by_people})
    notes |= {"samples": count, "sample_tokens": length, "temperature": SamplingOptions().temperature}
    return EvaluationResult(metrics=measures, notes=notes)


def write(family: TextFamily[Any, Any], prompts: Sequence[list[int]], length: int, data: EvaluationData) -> np.ndarray:
    """Return continuations (n, length) of n prompts of equal length, each drawn with its own seed.

    As many are written at once as on a model host, with its decoder.
    """
    options = SamplingOptions(max_tokens=length)
    samplers = [Sampler(options, seed, prompt, family.data.vocab_size) for seed, prompt in enumerate(prompts)]
    parts = [slice(first, first + SERVED_ROWS) for first in range(0, len(prompts), SERVED_ROWS)]
    return np.concatenate([_write_part(family, prompts[part], samplers[part], length, data) for part in parts])


def _write_part(
    family: TextFamily[Any, Any],
    prompts: Sequence[list[int]],
    samplers: Sequence[Sampler],
    length: int,
    data: EvaluationData,
) -> np.ndarray:
    decoder = family.decoder(len(prompts))
    windows, num_read, written = [list(prompt) for prompt in prompts], 0, []
    for _ in range(length):
        data.report_progress()
        slid = [slide_window(window, family.block_size) for window in windows]
        num_read = num_read if slid[0] is windows[0] else 0  # all windows have one length
        windows = slid
        tokens = choose(_last_logits(decoder, windows, num_read, data), samplers)
        num_read = len(windows[0])
        for window, token in zip(windows, tokens, strict=True):
            window.append(token)
        written.append(tokens)
    return np.array(written).T


def _last_logits(decoder: Decoder, windows: Sequence[list[int]], num_read: int, data: EvaluationData) -> Tensor:
    """Let the decoder read the tokens of each window after the first `num_read`; return the logits after the last."""
    if len(windows[0]) - num_read == 1:
        return decoder.step([window[-1] for window in windows], [num_read] * len(windows))
    rows = []
    for slot, window in enumerate(windows):
        for start in range(num_read, len(window), decoder.chunk):
            data.report_progress()
            logits = decoder.prefill(slot, window[start : start + decoder.chunk], start)
        rows.append(logits[-1])
    return torch.stack(rows)


def ngram_losses(train_tokens: np.ndarray, val_tokens: np.ndarray, n: int, vocab_size: int) -> np.ndarray:
    """Compute the loss in nats of each of `val_tokens[1:]` by a table of n-gram counts: (len - 1,).

    Interpolated Kneser-Ney smoothing with one discount per order: the highest order counts n-grams, the lower ones in
    how many contexts a token occurred, the lowest mixes with the uniform distribution.

    Args:
        train_tokens, val_tokens: token ids, (length,) each; val_tokens longer than n.
        n: length of the n-grams, with the predicted token: 1 to 10 at 65 symbols.

    Raises:
        ValueError: vocab_size ** n does not fit in 63 bits.
    """
    if vocab_size**n >= 2**63:
        raise ValueError(f"n = {n} is too large for {vocab_size} symbols")
    probability = np.full(len(val_tokens) - 1, 1.0 / vocab_size)
    for order in range(1, n + 1):
        first = max(order - 2, 0)  # the first predictions have too few tokens before them for this order
        grams, counts = _counts(train_tokens, order, n, vocab_size)
        contexts, start, kinds = np.unique(grams // vocab_size, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, start)
        ones, twos = np.sum(counts == 1), np.sum(counts == 2)
        discount = ones / (ones + 2 * twos) if ones else 0.5
        targets = _codes(val_tokens, order, vocab_size)[1 if order == 1 else 0 :]
        total = _lookup(contexts, totals, targets // vocab_size)
        mass = np.maximum(_lookup(grams, counts, targets) - discount, 0)
        lower = discount * _lookup(contexts, kinds, targets // vocab_size) * probability[first:]
        probability[first:] = np.where(total > 0, (mass + lower) / np.maximum(total, 1), probability[first:])
    return -np.log(probability)


def longest_shared(passages: np.ndarray, source: np.ndarray, vocab_size: int) -> int:
    """Return the length of the longest run of tokens that is in a passage, (n, t), and in the source, (length,)."""
    order = min(math.floor(62 / math.log2(max(vocab_size, 2))), passages.shape[1], len(source))
    while order:
        codes = np.stack([_codes(passage, order, vocab_size) for passage in passages])
        elsewhere = _codes(source, order, vocab_size)
        places = np.flatnonzero(np.isin(elsewhere, codes))
        if len(places):
            break
        order //= 2
    else:
        return 0
    texts = [passage.tobytes() for passage in passages]
    whole, size = source.astype(passages.dtype).tobytes(), passages.itemsize
    starts = np.argwhere(np.isin(codes, elsewhere[places])).tolist()
    least, most = order, passages.shape[1]
    while least < most:  # what is shared at a length is shared at all smaller ones
        middle = (least + most + 1) // 2
        mine = {texts[row][at * size : (at + middle) * size] for row, at in starts if at + middle <= passages.shape[1]}
        shared = any(whole[at * size : (at + middle) * size] in mine for at in places.tolist())
        least, most = (middle, most) if shared else (least, middle - 1)
    return least


def repetition(passages: np.ndarray, n: int) -> float:
    """Return the share of n-grams that are in the same passage before, (passages, tokens): 0 without repetition.

    As seq-rep-n of Welleck et al. 2019, https://arxiv.org/abs/1908.04319.
    """
    windows = np.lib.stride_tricks.sliding_window_view(passages, n, axis=1)
    different = sum(len(np.unique(grams, axis=0)) for grams in windows)
    return 1 - different / math.prod(windows.shape[:2])


def _exact_loss(family: TextFamily[Any, Any], data: EvaluationData, val: np.ndarray) -> tuple[float, float]:
    """Return nats per token of a text and of its second half; each token except the first is predicted once."""
    inputs, targets = _windows(val, family.block_size)
    half = len(inputs) // 2
    first = _summed(family, inputs[:half], targets[:half], data)
    second = _summed(family, inputs[half:], targets[half:], data)
    whole = {name: value + first.get(name, 0) for name, value in second.items()}
    return family.eval_metrics(whole)["val_loss"], family.eval_metrics(second)["val_loss"]


def _windows(tokens: np.ndarray, block_size: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, (n, block_size) both: adjacent windows from the start, the last one padded."""
    count = (len(tokens) - 2) // block_size + 1
    padded = torch.full((count * block_size + 1,), IGNORED)
    padded[: len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
    return padded[:-1].view(count, -1).clamp(min=0), padded[1:].view(count, -1)


def _summed(family: TextFamily[Any, Any], inputs: Tensor, targets: Tensor, data: EvaluationData) -> dict[str, Tensor]:
    device, sums = next(family.network.parameters()).device, dict[str, Tensor]()
    for tokens, wanted in zip(inputs.split(ROWS), targets.split(ROWS), strict=True):
        data.report_progress()
        with torch.no_grad():
            batch_sums = family.eval_step({"tokens": tokens.to(device), "targets": wanted.to(device)})
        sums = {name: value + sums.get(name, 0) for name, value in batch_sums.items()}
    return sums


def _tables(
    family: TextFamily[Any, Any], data: EvaluationData, train: np.ndarray, val: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Return the losses of count tables by name: over all of val, and over its second half."""
    size, tables = family.data.vocab_size, {}
    for n, name in TABLES.items():
        if size**n >= 2**63 or len(val) <= n:
            continue
        data.report_progress()

        def make(n: int = n) -> bytes:
            losses = ngram_losses(train, val, n, size)
            return json.dumps([losses.mean(), losses[len(losses) // 2 :].mean()]).encode()

        tables[name] = tuple(json.loads(data.cached(f"ngrams-{n}-{size}-{len(train)}-{len(val)}-{data.digest}", make)))
    return tables


def _measure(value: float, tables: dict[str, tuple[float, float]], part: int) -> EvaluationMetric:
    return EvaluationMetric(value=value, unit="nats", baselines={name: losses[part] for name, losses in tables.items()})


def _counts(tokens: np.ndarray, order: int, n: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the n-grams of an order, sorted by code, and their counts.

    The count of order n is the number of occurrences; of a lower order, the number of different tokens before it.
    """
    if order == n:
        return np.unique(_codes(tokens, order, vocab_size), return_counts=True)
    longer = np.unique(_codes(tokens, order + 1, vocab_size))
    return np.unique(longer % vocab_size**order, return_counts=True)


def _codes(tokens: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """Return each n-gram as a number: its tokens are the digits, the last token is the lowest."""
    count = len(tokens) - order + 1
    codes = np.zeros(count, np.int64)
    for place in range(order):
        codes = codes * vocab_size + tokens[place : place + count]
    return codes


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the values of the wanted keys, 0 for a missing key; keys are sorted."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
