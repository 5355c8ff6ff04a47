"""Supervised fine-tuning: prompts with completions, or chats; only what the model is to write counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from diloco.data import Data
from diloco.messages import ShardId
from diloco.workload import Batch, Corpus, Workload
from diloco.workloads import conversations
from diloco.workloads.completions import log_probabilities, packed, padded
from diloco.workloads.example_corpus import ExampleCorpus
from diloco.workloads.language import EVALUATION_BATCH, LanguageModel, evaluating
from diloco.workloads.lora import LoRA


@dataclass(kw_only=True)
class SFT(Workload):
    """Train a causal language model to write completions; the loss is their mean cross-entropy a token, in nats.

    Rows of `data.files` or `data.hub` have `prompt` and `completion`, each a text or a list of messages, or `messages`.
    """

    model: str = "micro"  # a folder such as RUN/export, or a hub id: its weights and tokenizer; a preset: new weights
    trust_remote_code: bool = False  # run Python code that comes with a pretrained model
    lora: LoRA = field(default_factory=LoRA)
    packing: bool = False  # several texts in a sequence, which do not see each other
    export_merged: bool = False  # with LoRA: also the whole model, in the folder `merged`

    def __post_init__(self) -> None:
        self.model = self._language().name

    def build_model(self, seed: int) -> nn.Module:
        return self.lora.around(self._language().build(seed), seed)

    def num_parameters(self) -> int:
        return self._language().num_parameters()

    def num_blocks(self) -> int:
        return self._language().num_blocks()

    def corpus(self, data: Data, *, seed: int, shards: int) -> ExampleCorpus:
        """Prepare or open the rows, with the model's tokenizer where `data` names none."""
        return ExampleCorpus(
            data, self._language(), conversations.completions, seed=seed, shards=shards, packing=self.packing
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
        return int(batch["targets"][:, 1:].sum())

    def evaluate(self, model: nn.Module, corpus: Corpus, split: str) -> dict[str, float]:
        """{"loss": mean nats a target over held-out rows}; the only split is "validation"."""
        assert isinstance(corpus, ExampleCorpus)
        if split != "validation":
            raise ValueError(f"split={split!r} is unknown: sft has 'validation' only")
        rows = corpus.validation_rows.tolist()
        total, tokens = 0.0, 0
        with evaluating(model):
            for first in range(0, len(rows), EVALUATION_BATCH):
                batch = padded([corpus.text(row) for row in rows[first : first + EVALUATION_BATCH]])
                total -= log_probabilities(model, batch).sum().item()
                tokens += self.tokens(batch)
        return {"loss": total / max(1, tokens)}

    def warnings(self, corpus: Corpus) -> list[str]:
        assert isinstance(corpus, ExampleCorpus)
        return corpus.warnings()

    def export(self, model: nn.Module, corpus: Corpus, folder: Path) -> None:
        """Weights, configuration and tokenizer; with LoRA the adapter, and on request the whole model below it."""
        assert isinstance(corpus, ExampleCorpus)
        self.lora.export(
            model, self._language(), corpus.data, corpus.tokenizer_folder, folder, whole=self.export_merged
        )

    def sample(self, model: nn.Module, corpus: Corpus, prompt: str, *, tokens: int, seed: int) -> str:
        """What the model answers to `prompt`, or where it is empty to the first row's."""
        assert isinstance(corpus, ExampleCorpus)
        asked = corpus.asked(prompt)
        return self._language().sample(model, corpus.tokenizer_folder, asked, tokens=tokens, seed=seed)

    def _language(self) -> LanguageModel:
        return LanguageModel.named(self.model, trust_remote_code=self.trust_remote_code)
