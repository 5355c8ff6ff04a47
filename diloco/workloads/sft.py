"""Supervised fine-tuning: prompts with completions, or chats; only what the model is to write counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from diloco.data import Data
from diloco.messages import ShardId
from diloco.workload import Batch, Corpus
from diloco.workloads import conversations
from diloco.workloads.completions import log_probabilities, packed, padded
from diloco.workloads.example_corpus import ExampleCorpus
from diloco.workloads.fine_tuning import FineTuning, held_out
from diloco.workloads.language import evaluating


@dataclass(kw_only=True)
class SFT(FineTuning):
    """Train a causal language model to write completions; the loss is their mean cross-entropy a token, in nats.

    Rows of `data.files` or `data.hub` have `prompt` and `completion`, each a text or a list of messages, or `messages`.
    """

    packing: bool = False  # several texts in a sequence, which do not see each other

    def corpus(self, data: Data, *, seed: int, shards: int) -> ExampleCorpus:
        """Prepare or open the rows, with the model's tokenizer where `data` names none."""
        return ExampleCorpus(
            data, self.language(), conversations.completions, seed=seed, shards=shards, packing=self.packing
        )

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        """{"tokens", "targets"}: of `data.batch` sequences, see `padded` and `packed`."""
        assert isinstance(corpus, ExampleCorpus)
        size = corpus.data.batch
        units = corpus.units(shard, first=step * size, count=size)
        if self.packing:
            return packed([[corpus.text(row) for row in rows] for rows in units])
        return padded([corpus.text(row) for (row,) in units])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy of the targets."""
        return -log_probabilities(model, batch).sum() / max(1, self.tokens(batch)), {}

    def tokens(self, batch: Batch) -> int:
        """Targets."""
        return int(batch["targets"][:, 1:].sum())

    def evaluation(self, model: nn.Module, corpus: ExampleCorpus) -> dict[str, float]:
        """{"loss": mean nats a target over held-out rows}."""
        total, tokens = 0.0, 0
        with evaluating(model):
            for rows in held_out(corpus):
                batch = padded([corpus.text(row) for row in rows])
                total -= log_probabilities(model, batch).sum().item()
                tokens += self.tokens(batch)
        return {"loss": total / max(1, tokens)}
