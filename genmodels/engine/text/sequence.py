"""TODO"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from genmodels.nn.sampling import Sampler


class Text:
    """One answer under way. What is called is called in the engine's thread; an exception there ends this text alone.

    Args:
        prompt: at least one token.
        take: gets each token and the logits (vocab_size,) that it was chosen from; false if that is enough.
        end: called once, at the end: with an error if that was the reason.
        on_read: gets, part by part, the place of a token in the prompt and the logits after it and after those that
            follow, (n, vocab_size): all of the prompt's that the network sees, but perhaps for its last token.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        sampler: Sampler,
        take: Callable[[int, Tensor], bool],
        end: Callable[[Exception | None], None],
        on_read: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        self.window, self.prompt_tokens = list(prompt), len(prompt)
        self.read = 0  # tokens of the window that the network has read
        self.sampler, self.take, self.end, self.on_read = sampler, take, end, on_read
        self.unwanted = False  # to be set by whoever no longer waits for it
        self.written: float | None = None  # when its latest token was chosen; kept where that is measured
