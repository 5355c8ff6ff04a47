"""Learning from preferences: pairs of completions, of which one is better, and an objective on their likelihoods."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diloco.data import Data
from diloco.messages import ShardId
from diloco.workload import Batch, Corpus, Workload
from diloco.workloads import conversations, reference
from diloco.workloads.example_corpus import ExampleCorpus
from diloco.workloads.language import EVALUATION_BATCH, LanguageModel, evaluating
from diloco.workloads.lora import LoRA
from diloco.workloads.objectives import OBJECTIVES, Objective, PairLogps, implied_rewards
from diloco.workloads.presets import PRESETS


class Reference(Enum):
    """Where the log-probabilities of the model that training starts from are taken from."""

    cached = "cached"  # computed once for all rows, before training
    kept = "kept"  # from a copy of that model, in each island's memory, at each step
    adapter_off = "adapter_off"  # with LoRA: from the model itself, its adapters turned off


@dataclass(kw_only=True)
class Preference(Workload):
    """Train a causal language model on pairs by one of `OBJECTIVES`; the loss is its mean over pairs.

    Rows of `data.files` or `data.hub` have `prompt`, `chosen` and `rejected`, texts or lists of messages. The reference
    is `workload.model` as it is loaded, whatever `init_from` says.
    """

    model: str = "micro"  # a folder such as RUN/export, or a hub id: its weights and tokenizer; a preset: new weights
    trust_remote_code: bool = False  # run Python code that comes with a pretrained model
    lora: LoRA = field(default_factory=LoRA)
    objective: str = "dpo"  # or ipo, simpo, orpo, ...
    settings: dict[str, Any] = field(default_factory=dict)  # of the objective: +workload.settings.beta=0.2
    reference: Reference = Reference.cached
    export_merged: bool = False  # with LoRA: also the whole model, in the folder `merged`

    def __post_init__(self) -> None:
        self.model = self._language().name
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

    def build_model(self, seed: int) -> nn.Module:
        return self.lora.around(self._language().build(seed), seed)

    def num_parameters(self) -> int:
        return self._language().num_parameters()

    def num_blocks(self) -> int:
        return self._language().num_blocks()

    def corpus(self, data: Data, *, seed: int, shards: int) -> ExampleCorpus:
        """Prepare or open the pairs, and the reference's log-probabilities where they are cached.

        Raises ValueError also where a batch is cut into parts, and the objective has to have it whole.
        """
        if self._objective().whole_batch and data.accumulation > 1:
            raise ValueError(
                f"workload.objective={self.objective} looks at all pairs of a batch together: use data.accumulation=1"
            )
        corpus = ExampleCorpus(data, self._language(), conversations.pairs, seed=seed, shards=shards)
        if self._uses(Reference.cached):
            corpus.reference = reference.cached(corpus, self._language(), seed=seed)
        return corpus

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        """{"tokens", "targets"}: [pairs, 2, longest], the better text first; "reference": float32[pairs, 2]."""
        assert isinstance(corpus, ExampleCorpus)
        size = corpus.data.batch
        return self._batch(corpus, [row for (row,) in corpus.units(shard, first=step * size, count=size)])

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The objective's mean over pairs; 0 where there are none."""
        if len(batch["tokens"]) == 0:
            return next(model.parameters()).sum() * 0.0, {}
        return self._objective()(self._pairs(model, batch)).mean(), {}

    def tokens(self, batch: Batch) -> int:
        return int(batch["targets"].sum())

    def weight(self, batch: Batch) -> int:
        return len(batch["tokens"])

    def evaluate(self, model: nn.Module, corpus: Corpus, split: str) -> dict[str, float]:
        """{"loss", "accuracy", "margin"}: means over held-out pairs; the only split is "validation".

        A pair is told apart where its better text has the larger implied reward; `margin`: by how much, in nats.
        """
        assert isinstance(corpus, ExampleCorpus)
        if split != "validation":
            raise ValueError(f"split={split!r} is unknown: preference has 'validation' only")
        rows = corpus.validation_rows.tolist()
        losses, margins = [], []
        with evaluating(model):
            for first in range(0, len(rows), EVALUATION_BATCH):
                pairs = self._pairs(model, self._batch(corpus, rows[first : first + EVALUATION_BATCH]))
                losses.append(self._objective()(pairs))
                chosen, rejected = implied_rewards(pairs, 1.0)
                margins.append(chosen - rejected)
        margin = torch.cat(margins)
        return {
            "loss": float(torch.cat(losses).mean()),
            "accuracy": float((margin > 0).float().mean()),
            "margin": float(margin.mean()),
        }

    def warnings(self, corpus: Corpus) -> list[str]:
        assert isinstance(corpus, ExampleCorpus)
        return corpus.warnings()

    def export(self, model: nn.Module, corpus: Corpus, folder: Path) -> None:
        """Weights, configuration and tokenizer; with LoRA the adapter, and on request the whole model below it."""
        assert isinstance(corpus, ExampleCorpus)
        whole = self.export_merged
        self.lora.export(model, self._language(), corpus.data, corpus.tokenizer_folder, folder, whole=whole)

    def sample(self, model: nn.Module, corpus: Corpus, prompt: str, *, tokens: int, seed: int) -> str:
        """What the model answers to `prompt`, or where it is empty to the first row's."""
        assert isinstance(corpus, ExampleCorpus)
        asked = corpus.asked(prompt)
        return self._language().sample(model, corpus.tokenizer_folder, asked, tokens=tokens, seed=seed)

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
        off: AbstractContextManager[Any] = nullcontext()
        if self.reference is Reference.adapter_off:
            adapted: Any = model.module if isinstance(model, DistributedDataParallel) else model
            before, off = adapted, adapted.disable_adapter()
        else:
            before = self._kept(next(model.parameters()).device)
        with off, evaluating(before):
            return reference.completion_logps(before, batch["tokens"], batch["targets"])

    def _kept(self, device: torch.device) -> nn.Module:
        """The model that training starts from; loaded once by each process."""
        known: nn.Module | None = self.__dict__.get("_start")
        if known is None:
            known = self.__dict__["_start"] = self._language().build(0).to(device).requires_grad_(False)
        return known

    def _uses(self, kind: Reference) -> bool:
        return self.reference is kind and self._objective().uses_reference

    def _objective(self) -> Objective:
        known = OBJECTIVES.get(self.objective)
        if known is None:
            raise ValueError(f"workload.objective={self.objective} is unknown: choose {', '.join(OBJECTIVES)}")
        names = sorted(known.__dataclass_fields__)
        unknown = sorted(set(self.settings) - set(names))
        if unknown:
            raise ValueError(
                f"workload.settings has {unknown[0]}, which workload.objective={self.objective} has not: it has "
                f"{', '.join(names) or 'none'}"
            )
        return known(**self.settings)

    def _language(self) -> LanguageModel:
        return LanguageModel.named(self.model, trust_remote_code=self.trust_remote_code)
