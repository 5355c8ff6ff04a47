"""What a policy wrote to some prompts: as tokens, as texts for a judge, and as log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diloco.workloads import generation, sampling
from diloco.workloads.completions import padded
from diloco.workloads.example_corpus import ExampleCorpus
from diloco.workloads.judges import Answer
from diloco.workloads.reference import completion_logps


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Completions of prompts, equally many of each."""

    prompts: Sequence[Sequence[int]]  # token ids
    completions: Sequence[Sequence[Sequence[int]]]  # prompt -> completion -> token ids
    answers: Sequence[Sequence[Answer]]  # prompt -> completion -> its text

    @property
    def lengths(self) -> Tensor:
        """float32[prompts, completions]: tokens."""
        return torch.tensor([[float(len(text)) for text in texts] for texts in self.completions])

    def logps(self, model: nn.Module) -> Tensor:
        """float32[prompts, completions]: log-probabilities of the completions, in nats."""
        batch = self._batch()
        shape = (len(self.prompts), len(self.completions[0]), -1)
        return completion_logps(model, batch["tokens"].view(shape), batch["targets"].view(shape))

    def choices(self, model: nn.Module) -> Tensor:
        """float32[tokens of all completions, vocabulary]: log-probabilities of all that could stand at their places."""
        batch = self._batch()
        device = next(model.parameters()).device
        logits = model(input_ids=batch["tokens"][:, :-1].to(device)).logits
        return torch.log_softmax(logits[batch["targets"][:, 1:].to(device)].float(), dim=-1)

    def _batch(self) -> dict[str, Tensor]:
        texts = []
        for prompt, completions in zip(self.prompts, self.completions, strict=True):
            for completion in completions:
                tokens = np.array([*prompt, *completion], dtype=np.int64)
                texts.append((tokens, np.arange(len(tokens)) >= len(prompt)))
        return padded(texts)

    def beside(self, others: Rollouts) -> Rollouts:
        """These and the others' completions of the same prompts."""
        return Rollouts(
            prompts=self.prompts,
            completions=[[*a, *b] for a, b in zip(self.completions, others.completions, strict=True)],
            answers=[[*a, *b] for a, b in zip(self.answers, others.answers, strict=True)],
        )


def write(
    model: Any,
    corpus: ExampleCorpus,
    rows: Sequence[int],
    keys: Sequence[Sequence[int]],
    *,
    tokens: int,
    temperature: float,
) -> Rollouts:
    """What `model` writes to the prompts of these rows, a completion for each of a row's `keys`.

    A prompt without a token is end-of-text; of one for which the model has too few positions the end is kept.
    """
    tokenizer, positions = corpus.tokenizer, sampling.limits(model.config)[1]
    prompts = [corpus.text(row)[0].tolist() or [tokenizer.eos_token_id] for row in rows]
    if positions is not None:
        prompts = [prompt[-max(1, positions - tokens) :] for prompt in prompts]
    repeated = [prompt for prompt, own in zip(prompts, keys, strict=True) for _ in own]
    flat = [key for own in keys for key in own]
    written = generation.completions(model, tokenizer, repeated, flat, tokens=tokens, temperature=temperature)
    texts, answers, place = [], [], 0
    for row, prompt, own in zip(rows, prompts, keys, strict=True):
        texts.append(written[place : place + len(own)])
        place += len(own)
        asked, columns = corpus.prompt(row), corpus.columns(row)
        said = [sampling.text_after(tokenizer, prompt, text) for text in texts[-1]]
        answers.append([Answer(prompt=asked, completion=text, row=columns) for text in said])
    return Rollouts(prompts=prompts, completions=texts, answers=answers)
