"""Learning from completions without a partner, each labelled desirable or not: KTO."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from diloco.data import Data
from diloco.messages import ShardId
from diloco.workload import Batch, Corpus
from diloco.workloads import conversations
from diloco.workloads.completions import Marked, padded
from diloco.workloads.example_corpus import ExampleCorpus
from diloco.workloads.fine_tuning import FineTuning, held_out, nothing_learned, rows_of
from diloco.workloads.language import evaluating
from diloco.workloads.objectives import KTO, UnpairedLogps, kl_estimate
from diloco.workloads.presets import PRESETS
from diloco.workloads.reference import completion_logps


@dataclass(kw_only=True)
class Unpaired(FineTuning):
    """Train a causal language model by KTO (arXiv:2402.01306); the loss is its mean over completions.

    Rows of `data.files` or `data.hub` have `prompt`, `completion` and `label`, true for what is wanted. The reference
    is `workload.model` as it is loaded, kept in memory beside the policy, or with LoRA the policy without its adapters.
    The point of reference is the divergence on each prompt with its neighbour's completion.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._objective()
        if self.model in PRESETS:
            raise ValueError(
                f"workload.model={self.model} has new weights in each run, and there is no reference: give a folder"
                " such as RUN/export, or a hub id"
            )

    def corpus(self, data: Data, *, seed: int, shards: int) -> ExampleCorpus:
        """Prepare or open the rows. Raises ValueError also where a batch has no neighbours to be measured against."""
        if data.batch < 2:
            raise ValueError(f"data.batch={data.batch}: a completion is measured against others of its batch; use 2")
        return ExampleCorpus(data, self.language(), conversations.labelled, seed=seed, shards=shards)

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        """{"tokens", "targets"}: [completions, 2, longest], with its own prompt and with another; "desirable": bool."""
        assert isinstance(corpus, ExampleCorpus)
        return _batch(corpus, rows_of(corpus, shard, step))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """KTO's mean over completions; 0 where there are none."""
        if len(batch["tokens"]) == 0:
            return nothing_learned(model), {}
        return self._objective()(self._logps(model, batch)).mean(), {}

    def tokens(self, batch: Batch) -> int:
        """Targets of the completions with their own prompts."""
        return int(batch["targets"][:, 0].sum())

    def weight(self, batch: Batch) -> int:
        """Completions."""
        return len(batch["tokens"])

    def needs_whole_batch(self) -> str:
        """For the point of reference."""
        return "workload=unpaired measures a completion against all others of its batch"

    def has_perplexity(self) -> bool:
        """No."""
        return False

    def evaluation(self, model: nn.Module, corpus: ExampleCorpus) -> dict[str, float]:
        """{"loss", "margin"}: means over held-out rows; `margin`: by how much the log-ratio of the desirable is larger.

        The margin is 0 where one kind is missing.
        """
        losses, ratios, labels = [], [], []
        with evaluating(model):
            for rows in held_out(corpus):
                found = self._logps(model, _batch(corpus, rows))
                losses.append(self._objective()(found))
                ratios.append(found.policy - found.reference)
                labels.append(found.desirable)
        ratio, label = torch.cat(ratios), torch.cat(labels)
        both = bool(label.any()) and not bool(label.all())
        margin = float(ratio[label].mean() - ratio[~label].mean()) if both else 0.0
        return {"loss": float(torch.cat(losses).mean()), "margin": margin}

    def _logps(self, model: nn.Module, batch: Batch) -> UnpairedLogps:
        policy = completion_logps(model, batch["tokens"], batch["targets"])
        with self.start(model) as start:
            before = completion_logps(start, batch["tokens"], batch["targets"])
        return UnpairedLogps(
            policy=policy[:, 0],
            reference=before[:, 0],
            desirable=batch["desirable"].to(policy.device),
            kl=kl_estimate(policy[:, 1], before[:, 1]),
        )

    def _objective(self) -> KTO:
        return KTO(beta=self.beta, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight)


def _batch(corpus: ExampleCorpus, rows: list[int]) -> Batch:
    own = [corpus.text(row) for row in rows]
    both = [text for text, other in zip(own, [*own[1:], own[0]], strict=True) for text in (text, _swapped(text, other))]
    batch = padded(both)
    found = {name: value.view(len(rows), 2, -1) for name, value in batch.items()}
    labels = [bool(corpus.columns(row)["label"]) for row in rows]
    return {**found, "desirable": torch.tensor(labels, dtype=torch.bool)}


def _swapped(text: Marked, other: Marked) -> Marked:
    """The prompt of `text` with the completion of `other`."""
    (tokens, targets), (theirs, marks) = text, other
    before, begin = int(targets.argmax()), int(marks.argmax())
    return np.concatenate([tokens[:before], theirs[begin:]]), np.concatenate([targets[:before], marks[begin:]])
