"""A GPT-2 and its training step as nanoGPT has them, in our own words: what our training loop is compared with.

nanoGPT: A. Karpathy 2022, github.com/karpathy/nanoGPT. Without biases, with a tied head, GELU and LayerNorm; AdamW with
weight decay for matrices only and torch's default implementation on a CPU; gradients clipped at norm 1. Its loop draws
each window at random, computes the learning rate, takes the step, and reads the loss every ten steps.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WARMUP, DECAY_STEPS, PEAK, LOWEST = 100, 2000, 1e-3, 1e-4
READ_EVERY = 10  # steps


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.attention_in, self.attention_out = (nn.Linear(width, n * width, bias=False) for n in (3, 1))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        parts = self.attention_in(self.norms[0](x)).split(width, dim=2)
        query, key, value = (part.view(n, t, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).contiguous().view(n, t, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT2(nn.Module):
    """Token ids (n, t) and targets (n, t) -> mean loss in nats."""

    def __init__(self, vocab_size: int, width: int, layers: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, vocab_size, bias=False)
        self.tokens.weight = self.head.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)


class Trainer:
    """Train a GPT-2 on the tokens of a text, step by step."""

    def __init__(self, text: np.ndarray, model: GPT2, block_size: int, batch_size: int) -> None:
        """Args:
        text: tokens, uint16 (n,).
        """
        self.text, self.model, self.block_size, self.batch_size = text, model, block_size, batch_size
        parameters = list(model.parameters())
        groups = [
            {"params": [one for one in parameters if one.dim() >= 2], "weight_decay": 0.1},
            {"params": [one for one in parameters if one.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99))
        self.done = 0
        self.batch = self._batch()

    def steps(self, count: int) -> list[float]:
        """Take steps; return the seconds of each."""
        seconds, began = [], time.perf_counter()
        for _ in range(count):
            for group in self.optimizer.param_groups:
                group["lr"] = _learning_rate(self.done)
            loss = self.model(*self.batch)
            self.batch = self._batch()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.done % READ_EVERY == 0:
                loss.item()
            self.done += 1
            ended = time.perf_counter()
            seconds.append(ended - began)
            began = ended
        return seconds

    def _batch(self) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self.text) - self.block_size, (self.batch_size,))
        windows = [self.text[start : start + self.block_size + 1].astype(np.int64) for start in starts]
        tokens = torch.stack([torch.from_numpy(window[:-1]) for window in windows])
        return tokens, torch.stack([torch.from_numpy(window[1:]) for window in windows])


def _learning_rate(step: int) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    share = min(1.0, (step - WARMUP) / (DECAY_STEPS - WARMUP))
    return LOWEST + 0.5 * (1 + math.cos(math.pi * share)) * (PEAK - LOWEST)
