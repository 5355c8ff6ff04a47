"""Learning from preferences: pairs of completions, of which one is better, and an objective on their likelihoods."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from diloco.data import Data
from diloco.messages import ShardId
from diloco.workload import Batch, Corpus
from diloco.workloads import conversations, reference
from diloco.workloads.example_corpus import ExampleCorpus
from diloco.workloads.fine_tuning import FineTuning, held_out, nothing_learned, rows_of
from diloco.workloads.language import evaluating
from diloco.workloads.objectives import Objective, PairLogps, implied_rewards
from diloco.workloads.objectives.chosen import chosen_objective
from diloco.workloads.presets import PRESETS


class Reference(Enum):
    """Where the log-probabilities of the model that training starts from are taken from."""

    cached = "cached"  # computed once for all rows, before training
    kept = "kept"  # from a copy of that model, in each island's memory, at each step
    adapter_off = "adapter_off"  # with LoRA: from the model itself, its adapters turned off


@dataclass(kw_only=True)
class Preference(FineTuning):
    """Train a causal language model on pairs by one of `OBJECTIVES`; the loss is its mean over pairs.

    Rows of `data.files` or `data.hub` have `prompt`, `chosen` and `rejected`, texts or lists of messages. The reference
    is `workload.model` as it is loaded, whatever `init_from` says.
    """

    objective: str = "dpo"  # or ipo, simpo, orpo, ...
    settings: dict[str, Any] = field(default_factory=dict)  # of the objective: +workload.settings.beta=0.2
    reference: Reference = Reference.cached

    def __post_init__(self) -> None:
        super().__post_init__()
        self._objective()
        if self.reference is Reference.adapter_off and not self.lora.rank:
            raise ValueError(
                "workload.reference=adapter_off needs adapters: set workload.lora.rank, or use cached or kept"
            )
        if self.reference is Reference.kept and self.model in PRESETS:
            raise ValueError(
                f"workload.reference=kept with workload.model={self.model}, whose weights are new in each run: use"
                " cached, or a model that was trained before"
            )

    def corpus(self, data: Data, *, seed: int, shards: int) -> ExampleCorpus:
        """Prepare or open the pairs, and the reference's log-probabilities where they are cached."""
        corpus = ExampleCorpus(data, self.language(), conversations.pairs, seed=seed, shards=shards)
        if self._uses(Reference.cached):
            corpus.reference = reference.cached(corpus, self.language(), seed=seed)
        return corpus

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        """{"tokens", "targets"}: [pairs, 2, longest], the better text first; "reference": float32[pairs, 2]."""
        assert isinstance(corpus, ExampleCorpus)
        return self._batch(corpus, rows_of(corpus, shard, step))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The objective's mean over pairs; 0 where there are none."""
        if len(batch["tokens"]) == 0:
            return nothing_learned(model), {}
        return self._objective()(self._pairs(model, batch)).mean(), {}

    def tokens(self, batch: Batch) -> int:
        """Targets."""
        return int(batch["targets"].sum())

    def needs_whole_batch(self) -> str:
        """For some objectives."""
        whole = self._objective().whole_batch
        return f"workload.objective={self.objective} looks at all pairs of a batch together" if whole else ""

    def has_perplexity(self) -> bool:
        """No."""
        return False

    def weight(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch["tokens"])

    def evaluation(self, model: nn.Module, corpus: ExampleCorpus) -> dict[str, float]:
        """{"loss", "accuracy", "margin"}: means over held-out pairs.

        A pair is told apart where its better text has the larger implied reward; `margin`: by how much, in nats.
        """
        losses, margins = [], []
        with evaluating(model):
            for rows in held_out(corpus):
                pairs = self._pairs(model, self._batch(corpus, rows))
                losses.append(self._objective()(pairs))
                chosen, rejected = implied_rewards(pairs, 1.0)
                margins.append(chosen - rejected)
        margin = torch.cat(margins)
        return {
            "loss": float(torch.cat(losses).mean()),
            "accuracy": float((margin > 0).float().mean()),
            "margin": float(margin.mean()),
        }

    def _batch(self, corpus: ExampleCorpus, rows: list[int]) -> Batch:
        batch = reference.stacked(corpus, rows)
        if corpus.reference is not None:
            batch["reference"] = torch.from_numpy(corpus.reference[rows])
        return batch

    def _pairs(self, model: nn.Module, batch: Batch) -> PairLogps:
        policy = reference.completion_logps(model, batch["tokens"], batch["targets"])
        before = self._reference_logps(model, batch).to(policy.device)
        tokens = batch["targets"][:, :, 1:].sum(dim=2).float().to(policy.device)
        return PairLogps(
            policy_chosen=policy[:, 0],
            policy_rejected=policy[:, 1],
            reference_chosen=before[:, 0],
            reference_rejected=before[:, 1],
            chosen_tokens=tokens[:, 0],
            rejected_tokens=tokens[:, 1],
        )

    def _reference_logps(self, model: nn.Module, batch: Batch) -> Tensor:
        """float32[pairs, 2]; zeros where the objective asks for none."""
        if self._uses(Reference.cached):
            return batch["reference"]
        if not self._objective().uses_reference:
            return torch.zeros(batch["tokens"].shape[:2])
        with self.start(model, adapters_off=self.reference is Reference.adapter_off) as before:
            return reference.completion_logps(before, batch["tokens"], batch["targets"])

    def _uses(self, kind: Reference) -> bool:
        return self.reference is kind and self._objective().uses_reference

    def _objective(self) -> Objective:
        return chosen_objective(self.objective, self.settings)
