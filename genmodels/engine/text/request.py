"""The request of a completion: the fields of OpenAI's API and additional ones."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from genmodels.engine.requests import MAX_N, ByForm, Count, Request, Seeds, is_list
from genmodels.schema.field_errors import field_error

MAX_PROMPT = 65_536  # characters and token ids of all prompts of a request
MAX_STOPS = 16
MAX_LOGPROBS = 5


def _are_several(prompt: Any) -> bool:
    """Return True for a list of prompts, False for a text or a list of token ids."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


PromptText: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_PROMPT)]
PromptToken: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
PromptTokens: TypeAlias = Annotated[list[PromptToken], Field(min_length=1, max_length=MAX_PROMPT, fail_fast=True)]
Prompt: TypeAlias = Annotated[PromptText | PromptTokens, ByForm()]
Prompts: TypeAlias = Annotated[list[Prompt], Field(min_length=1, max_length=MAX_N, fail_fast=True)]

Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]


def _one_is_a_list(stop: Any) -> Any:
    return stop if is_list(stop) else [stop]


class CompletionRequest(Request):
    """Continue prompts. Options of the family (`max_tokens`, `temperature`, ...) are additional fields."""

    verb = "complete"

    prompt: Annotated[Prompt | Prompts, ByForm(_are_several)] = Field(
        description="text to continue, a list of token ids, or a list of such prompts, each with n choices; the "
        "choices of prompt i begin at index i * n. GET /v1/models/{model}/vocabulary lists the token ids"
    )
    n: Count = Field(1, description="choices for each prompt")
    best_of: Count | None = Field(
        None,
        description="generate this many texts for each prompt and return the n texts with the highest mean "
        "log-probability of a token; default: n",
    )
    seed: Seeds | None = Field(
        None,
        description="a prompt gets the same answer as in a request of its own with this seed; a list has one seed for "
        "each prompt. Default: a random seed for each prompt; the answer contains the seeds",
    )
    stop: Annotated[list[Stop], BeforeValidator(_one_is_a_list, json_schema_input_type=Stop | list[Stop])] = Field(
        [], max_length=MAX_STOPS, description="texts that end an answer; they are not part of it"
    )
    echo: bool = Field(False, description="return the prompt before the answer; max_tokens may then be 0")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="return the log-probability of each token, and of this many of the most probable tokens at its "
        "position. They are the log-softmax of the model's logits, before temperature, penalties, biases and filters. "
        "With echo, tokens of the prompt have them too, except the first token that the model reads and the tokens "
        "before it. The model reads the last block_size/2 tokens of a prompt that is longer than block_size",
    )

    @field_validator("prompt")
    @classmethod
    def _check_total_size(cls, prompt: Prompt | Prompts) -> Prompt | Prompts:
        size = sum(map(len, _as_list(prompt)))
        if size > MAX_PROMPT:
            raise field_error(
                f"got {size} characters and token ids in all prompts together, expected at most {MAX_PROMPT}"
            )
        return prompt

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n", 1)
        if best_of is not None and best_of < n:
            raise field_error(f"got {best_of}, expected at least n, which is {n}")
        return best_of

    @field_validator("seed")
    @classmethod
    def _check_number_of_seeds(cls, seed: Seeds | None, info: ValidationInfo) -> Seeds | None:
        prompts = len(_as_list(info.data["prompt"])) if "prompt" in info.data else None
        if isinstance(seed, list) and prompts not in (None, len(seed)):
            raise field_error(f"got {len(seed)} seeds, expected one, or one for each prompt: {prompts}")
        return seed

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts; each is a text or a list of token ids."""
        return _as_list(self.prompt)

    def param_of(self, place: int) -> str:
        """Return the name of a prompt in error messages."""
        return f"prompt[{place}]" if _are_several(self.prompt) else "prompt"

    @property
    def candidates(self) -> int:
        """Return the number of texts to generate for each prompt."""
        return self.best_of or self.n

    @property
    def choices(self) -> int:
        """Return the number of choices in the answer, of all prompts."""
        return len(self.prompts) * self.n


def _as_list(prompt: Any) -> list[str | list[int]]:
    return prompt if _are_several(prompt) else [prompt]
