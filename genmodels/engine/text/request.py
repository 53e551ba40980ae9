"""What a client asks of a completion, in the fields of OpenAI's API and some of our own."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from genmodels.engine.requests import MAX_N, ByForm, Count, Request, Seeds, is_list
from genmodels.schema.field_errors import field_error

MAX_PROMPT = 65_536  # characters and token ids of all prompts of a request
MAX_STOPS = 16
MAX_LOGPROBS = 5


def _are_several(prompt: Any) -> bool:
    """Tell a list of prompts from a text and from a list of token ids."""
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
    """Continue prompts. Options of the family (`max_tokens`, `temperature`, ...) stand beside these fields."""

    prompt: Annotated[Prompt | Prompts, ByForm(_are_several)] = Field(
        description="text to continue, a list of token ids, or a list of such prompts, each with n choices; the "
        "choices of prompt i begin at index i * n. GET /v1/models/{model}/vocabulary lists the token ids"
    )
    n: Count = Field(1, description="choices for each prompt")
    best_of: Count | None = Field(
        None,
        description="write this many answers for each prompt and return the n with the most probable tokens on "
        "average; default: n",
    )
    seed: Seeds | None = Field(
        None,
        description="each prompt is answered as if it had been sent alone with this seed; a list has one seed for each "
        "prompt. Default: a random seed for each prompt; the answer contains the seeds",
    )
    stop: Annotated[list[Stop], BeforeValidator(_one_is_a_list, json_schema_input_type=Stop | list[Stop])] = Field(
        [], max_length=MAX_STOPS, description="texts that end an answer; they are not part of it"
    )
    echo: bool = Field(False, description="return the prompt before the answer; max_tokens may then be 0")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="return the log-probability of each token, and of this many of the most probable tokens in its "
        "place. They are the log-softmax of the model's logits, before temperature, penalties, biases and filters. "
        "With echo, tokens of the prompt have them too, except the first token that the model reads and those "
        "before it. Of a prompt longer than block_size the model reads the last block_size/2 tokens",
    )

    @field_validator("prompt")
    @classmethod
    def _fits_in_all(cls, prompt: Prompt | Prompts) -> Prompt | Prompts:
        size = sum(map(len, _as_list(prompt)))
        if size > MAX_PROMPT:
            raise field_error(
                f"got {size} characters and token ids in all prompts together, expected at most {MAX_PROMPT}"
            )
        return prompt

    @field_validator("best_of")
    @classmethod
    def _there_are_n_to_give(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n", 1)
        if best_of is not None and best_of < n:
            raise field_error(f"got {best_of}, expected at least n, which is {n}")
        return best_of

    @field_validator("seed")
    @classmethod
    def _each_prompt_has_one(cls, seed: Seeds | None, info: ValidationInfo) -> Seeds | None:
        prompts = len(_as_list(info.data["prompt"])) if "prompt" in info.data else None
        if isinstance(seed, list) and prompts not in (None, len(seed)):
            raise field_error(f"got {len(seed)} seeds, expected one, or one for each prompt: {prompts}")
        return seed

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt: a text or token ids."""
        return _as_list(self.prompt)

    def param_of(self, place: int) -> str:
        """Name one of the prompts as an error does."""
        return f"prompt[{place}]" if _are_several(self.prompt) else "prompt"

    @property
    def texts(self) -> int:
        """How many are written for each prompt."""
        return self.best_of or self.n

    @property
    def choices(self) -> int:
        """How many are given for all prompts."""
        return len(self.prompts) * self.n


def _as_list(prompt: Any) -> list[str | list[int]]:
    return prompt if _are_several(prompt) else [prompt]
