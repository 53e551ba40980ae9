"""Text without HTTP: the engine, and other implementations with the same weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from genmodels.engine.text import completion
from genmodels.engine.text.choices import TextDelta
from genmodels.engine.text.model import TextModel
from genmodels.engine.text.request import CompletionRequest
from genmodels.models.minigpt import MiniGPT
from genmodels.sizing.memory import HOST_MEMORY
from genmodels.sizing.placement import Placement
from services.gateway.model_host import SMALL_SHARE

try:
    import transformers
except ImportError:  # of the extra `bench`
    transformers = None

GPT2: dict[str, Any] = {  # GPT-2's architecture, as large as the model of jobs/quickstart.yaml
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 4,
    "block_size": 128,
    "positions": "learned",
    "norm": "layer",
    "mlp": "gelu",
    "qk_norm": False,
    "tied_head": True,
    "bias": True,
}
OF_A_HOST = Placement(small=HOST_MEMORY // SMALL_SHARE)  # as many slots as a model host gives the model
PROMPT = 16  # characters; transformers' GPT-2 cannot continue beyond block_size
SIXTEEN = "O Romeo, Romeo! "


def engine(model: TextModel, streams: int, tokens: int, batches: int = 1) -> float:
    """Return the tokens per second of the engine alone."""
    request = CompletionRequest.model_validate({"prompt": SIXTEEN, "max_tokens": tokens, "seed": 1})
    started = time.perf_counter()
    for _ in range(batches):
        _write(model, request, streams)
    return batches * streams * tokens / (time.perf_counter() - started)


def _write(model: TextModel, request: CompletionRequest, streams: int) -> None:
    unfinished = streams

    def take(delta: TextDelta | Exception) -> None:
        nonlocal unfinished
        assert isinstance(delta, TextDelta), delta
        unfinished -= delta.finish_reason is not None

    for _ in range(streams):
        completion.complete(model, request).start(take)
    while unfinished:
        model.batcher.step()


def reference(family: MiniGPT, tokens: int) -> float:
    """Return the tokens per second of one sequence: one after the other is as fast for any number of them."""
    options = family.Request(max_tokens=tokens)
    started = time.perf_counter()
    assert len(list(family.generate(_prompt(), 1, options))) == tokens
    return tokens / (time.perf_counter() - started)


def nanogpt(family: MiniGPT, streams: int, tokens: int) -> float:
    """Write as nanoGPT does (https://github.com/karpathy/nanoGPT): it reads the whole window again for each token."""
    window = torch.tensor([_prompt()] * streams)
    started = time.perf_counter()
    for _ in range(tokens):
        logits = family.logits(window[:, -family.block_size :])[:, -1] / 0.8
        window = torch.cat((window, torch.multinomial(logits.softmax(-1), 1)), dim=1)
    return streams * tokens / (time.perf_counter() - started)


def huggingface(gpt2: Any, streams: int, tokens: int) -> float:
    """Write all streams in one batch of transformers' `generate`."""
    prompt: Tensor = torch.tensor([_prompt()] * streams)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": tokens, "pad_token_id": 0}
    started = time.perf_counter()
    generated = gpt2.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert generated.shape == (streams, PROMPT + tokens)
    return streams * tokens / (time.perf_counter() - started)


def equal_gpt2(family: MiniGPT) -> Any:
    """Build transformers' GPT-2 with this model's weights; None if transformers is not installed.

    Raises:
        AssertionError: the logits of the two models differ.
    """
    if transformers is None:
        return None
    transformers.logging.set_verbosity_error()
    config, ours = family.config, family.network
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=family.data.vocab_size,
            n_positions=family.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function="gelu",
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    body = gpt2.transformer
    with torch.no_grad():
        assert ours.position_embedding is not None
        body.wte.weight.copy_(ours.token_embedding.weight)
        body.wpe.weight.copy_(ours.position_embedding.weight)
        body.ln_f.load_state_dict(ours.norm.state_dict())
        for theirs, block in zip(body.h, ours.blocks, strict=True):
            _copy_block(theirs, block)
        tokens = torch.arange(family.block_size).remainder(family.data.vocab_size)[None]
        torch.testing.assert_close(gpt2(tokens).logits, family.logits(tokens), atol=1e-4, rtol=1e-4)
    return gpt2


def _copy_block(theirs: Any, block: Any) -> None:
    theirs.ln_1.load_state_dict(block.attention_norm.state_dict())
    theirs.ln_2.load_state_dict(block.mlp_norm.state_dict())
    attention = block.attention
    parts = [attention.query.weight, attention.key.weight, attention.value.weight]
    theirs.attn.c_attn.weight.copy_(torch.cat(parts).T)  # GPT-2 has its matrices transposed
    theirs.attn.c_attn.bias.zero_()
    for target, source in (
        (theirs.attn.c_proj, attention.output),
        (theirs.mlp.c_fc, block.mlp.input),
        (theirs.mlp.c_proj, block.mlp.output),
    ):
        target.weight.copy_(source.weight.T)
        target.bias.copy_(source.bias)


def _prompt() -> Sequence[int]:
    return list(range(PROMPT))
