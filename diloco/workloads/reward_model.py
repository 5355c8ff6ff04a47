"""Reward models: a number for a prompt with its completion, learned from pairs of which one is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from diloco.data import Data
from diloco.messages import ShardId
from diloco.tokens import Array
from diloco.workload import Batch, Corpus
from diloco.workloads import conversations
from diloco.workloads.completions import padded
from diloco.workloads.example_corpus import ExampleCorpus
from diloco.workloads.fine_tuning import FineTuning, held_out, nothing_learned, rows_of
from diloco.workloads.language import evaluating


@dataclass(kw_only=True)
class RewardModel(FineTuning):
    """Train a language model with one output in place of its head: -log s(r(chosen) - r(rejected)), a mean over pairs.

    Bradley and Terry's model of preferences (arXiv:2203.02155, eq. 1). The output reads the text's last token; its
    weights are zero at first, so that all runs on one `model` have the same start, whatever their seed (WARM,
    arXiv:2401.12187). Rows are those of `workload=preference`. The export is what `workload.judge` takes.
    """

    dropout: float = 0.0  # of attention weights

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"workload.dropout={self.dropout}: it must be at least 0 and below 1")

    def build_model(self, seed: int) -> nn.Module:
        """One that scores."""
        model: Any = self.language().build(seed, scores=True)
        attention = [module for module in model.modules() if "attention_dropout" in vars(module)]
        if self.dropout and not attention:
            raise ValueError(f"workload.dropout={self.dropout}: workload.model={self.model} has none; leave it out")
        for module in attention:
            module.attention_dropout = self.dropout
        return self.lora.around(model, seed, scores=True)

    def corpus(self, data: Data, *, seed: int, shards: int) -> ExampleCorpus:
        """Prepare or open the pairs."""
        return ExampleCorpus(data, self.language(), conversations.pairs, seed=seed, shards=shards)

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        """{"tokens": int64[pairs, 2, longest], the better text first; "lengths": int64[pairs, 2]}."""
        assert isinstance(corpus, ExampleCorpus)
        return _pairs(corpus, rows_of(corpus, shard, step))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The mean over pairs; 0 where there are none."""
        if len(batch["tokens"]) == 0:
            return nothing_learned(model), {}
        return -functional.logsigmoid(_margins(model, batch)).mean(), {}

    def tokens(self, batch: Batch) -> int:
        """All of both texts."""
        return int(batch["lengths"].sum())

    def weight(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch["tokens"])

    def learning(self) -> Sequence[str]:
        """Dropout too."""
        return (*super().learning(), "dropout")

    def has_perplexity(self) -> bool:
        """No."""
        return False

    def evaluation(self, model: nn.Module, corpus: ExampleCorpus) -> dict[str, float]:
        """{"loss", "accuracy", "margin"}: means over held-out pairs; `margin`: by how much the better one scores more.

        A pair is told apart where the better text has the larger score.
        """
        with evaluating(model):
            margins = torch.cat([_margins(model, _pairs(corpus, rows)) for rows in held_out(corpus)])
        return {
            "loss": float(-functional.logsigmoid(margins).mean()),
            "accuracy": float((margins > 0).float().mean()),
            "margin": float(margins.mean()),
        }

    def sample(self, model: nn.Module, corpus: Corpus, prompt: str, *, tokens: int, seed: int) -> str:
        """It writes nothing."""
        return ""


def as_scored(tokenizer: Any, prompt: str, completion: str) -> Array:
    """int64[tokens]: a text as the rows of training have theirs, where they are no chats."""
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion) if text]
    return np.array([*(token for part in parts for token in part), tokenizer.eos_token_id], dtype=np.int64)


def read_scores(model: Any, texts: Sequence[Array]) -> Tensor:
    """float32[texts]: the score of each, with gradients."""
    return _scores(model, *_filled(texts))


def _filled(texts: Sequence[Array]) -> tuple[Tensor, Tensor]:
    """int64[texts, longest] and int64[texts]: tokens, filled up on the right, and how many."""
    batch = padded([(text, np.zeros(len(text), dtype=np.bool_)) for text in texts])
    return batch["tokens"], torch.tensor([len(text) for text in texts])


def _scores(model: Any, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The output at each text's last token. What comes after a token changes nothing for it: no mask is needed."""
    device = next(model.parameters()).device
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    # transformers takes the last token that is not this one; here it is the filling after the text.
    padding = inner.config.pad_token_id
    filled = torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens, padding)
    logits = model(input_ids=filled.to(device)).logits
    return logits[:, 0].float()  # type: ignore[no-any-return]


def _margins(model: nn.Module, batch: Batch) -> Tensor:
    tokens, lengths = batch["tokens"], batch["lengths"]
    scores = _scores(model, tokens.flatten(0, 1).cpu(), lengths.flatten().cpu()).view(-1, 2)
    return scores[:, 0] - scores[:, 1]


def _pairs(corpus: ExampleCorpus, rows: list[int]) -> Batch:
    tokens, lengths = _filled([corpus.text(row, index)[0] for row in rows for index in range(2)])
    return {"tokens": tokens.view(len(rows), 2, -1), "lengths": lengths.view(-1, 2)}
