"""Completions that a model writes for many prompts at once; each the same whatever it is written beside."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diloco.workloads import sampling
from diloco.workloads.language import evaluating


def key_of(*parts: object) -> int:
    """A random generator's seed for what these parts name: 63 bits."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    *,
    tokens: int,
    temperature: float,
) -> list[list[int]]:
    """At most `tokens` token ids after each prompt, the last one end-of-text where it came to an end.

    Drawn from the model's probabilities at this temperature, with random numbers from the prompt's own key, so that
    neither the other prompts nor their order count. Prompts must not be empty, and leave room for `tokens`.
    Ids that stand for no text are never written. `model`: what transformers made, without a wrapper; its mode stays.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    end = tokenizer.eos_token_id
    longest = max(len(prompt) for prompt in prompts)
    inputs = torch.tensor([[end] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings: Any = GenerationConfig
    config = settings(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=sampling.without_text(model, tokenizer),
        use_cache=True,
    )
    draws = _Draws(keys, tokens, temperature, start=longest)
    with evaluating(model):
        outputs = model.generate(
            inputs.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([draws]),
        )
    return [_until(row, end) for row in outputs[:, longest:].tolist()]


class _Draws:
    """Leaves of each row's logits the token that its next random number falls on, for a greedy choice."""

    def __init__(self, keys: Sequence[int], tokens: int, temperature: float, *, start: int) -> None:
        own = [torch.Generator().manual_seed(key) for key in keys]
        self._numbers = torch.stack([torch.rand(tokens, generator=one, dtype=torch.float64) for one in own])
        self._temperature, self._start = temperature, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """float[rows, vocabulary]: 0 for the token that is drawn, -inf for all others."""
        cumulative = torch.softmax(scores.double() / self._temperature, dim=-1).cumsum(dim=-1)
        place = input_ids.shape[1] - self._start
        numbers = self._numbers[:, place : place + 1].to(scores.device) * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, numbers, right=True)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn, 0.0)


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
