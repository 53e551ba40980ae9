"""One sequence of tokens that the batcher continues."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from genmodels.nn.sampling import Sampler


class Sequence:
    """A prompt and the tokens generated after it.

    The batcher calls the callbacks in its own thread. An exception in a callback ends this sequence only.

    Args:
        prompt: at least one token.
        on_token: called with each new token and, with `wants_logits`, the logits (vocab_size,) that it was drawn
            from, on the host; returns False to finish the sequence.
        on_finish: called once, at the end; its argument is the error if there was one.
        on_prompt_logits: called for each part of the prompt with the position of its first token in the prompt, and
            the logits (n, vocab_size) after each of its tokens, on the host. The parts cover all tokens of the prompt
            that fit into the network's window, possibly except the last token.
    """

    def __init__(
        self,
        prompt: Iterable[int],
        sampler: Sampler,
        on_token: Callable[[int, Tensor | None], bool],
        on_finish: Callable[[Exception | None], None],
        on_prompt_logits: Callable[[int, Tensor], None] | None = None,
        *,
        wants_logits: bool = False,
    ) -> None:
        self.window = list(prompt)  # the tokens that the network sees
        self.num_prompt_tokens = len(self.window)
        self.num_computed_tokens = 0  # tokens of the window whose keys and values are in the cache
        self.sampler, self.on_token, self.on_finish = sampler, on_token, on_finish
        self.on_prompt_logits, self.wants_logits = on_prompt_logits, wants_logits
        self.cancelled = False  # set by the caller when the result is no longer needed
        self.last_token_time: float | None = None  # monotonic seconds; set only while metrics are counted
