"""What workloads on prompts and completions share: the model and its adapters, rows, exports, and answers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diloco.messages import ShardId
from diloco.workload import Corpus, Workload
from diloco.workloads.example_corpus import ExampleCorpus
from diloco.workloads.language import EVALUATION_BATCH, LanguageModel, evaluating
from diloco.workloads.lora import LoRA
from diloco.workloads.presets import PRESETS


@dataclass(kw_only=True)
class FineTuning(Workload):
    """A causal language model, trained whole or by adapters, on rows that have a prompt."""

    model: str = "micro"  # a folder such as RUN/export, or a hub id: its weights and tokenizer; a preset: new weights
    trust_remote_code: bool = False  # run Python code that comes with a pretrained model
    lora: LoRA = field(default_factory=LoRA)
    export_merged: bool = False  # with LoRA: also the whole model, in the folder `merged`

    def __post_init__(self) -> None:
        self.model = self.language().name

    @abstractmethod
    def evaluation(self, model: nn.Module, corpus: ExampleCorpus) -> dict[str, float]:
        """Metrics over `corpus.validation_rows`, among them "loss"."""

    def language(self) -> LanguageModel:
        """The model that training starts from."""
        return LanguageModel.named(self.model, trust_remote_code=self.trust_remote_code)

    @contextmanager
    def start(self, model: nn.Module, *, adapters_off: bool | None = None) -> Iterator[nn.Module]:
        """The model that training starts from, in eval mode without gradients.

        With adapters it is `model` itself, which has them turned off meanwhile; else it is loaded once a process.
        `adapters_off`: which of the two, if not so.
        """
        with_adapters: Any = unwrapped(model)
        if self.lora.rank if adapters_off is None else adapters_off:
            with with_adapters.disable_adapter(), evaluating(with_adapters):
                yield with_adapters
            return
        known: nn.Module | None = self.__dict__.get("_start")
        if known is None:
            device = next(with_adapters.parameters()).device
            known = self.__dict__["_start"] = self.language().build(0).to(device).requires_grad_(False)
        with evaluating(known):
            yield known

    def learning(self) -> Sequence[str]:
        """How what is trained is written out."""
        return ("export_merged",)

    def build_model(self, seed: int) -> nn.Module:
        """The language model, with LoRA's adapters around its layers where they are asked for."""
        return self.lora.around(self.language().build(seed), seed)

    def num_parameters(self) -> int:
        """Those of the language model, without adapters."""
        return self.language().num_parameters()

    def num_blocks(self) -> int:
        """Those of the language model."""
        return self.language().num_blocks()

    def evaluate(self, model: nn.Module, corpus: Corpus, split: str) -> dict[str, float]:
        """What `evaluation` gives; the only split is "validation"."""
        assert isinstance(corpus, ExampleCorpus)
        if split != "validation":
            raise ValueError(f"split={split!r} is unknown: {type(self).__name__.lower()} has 'validation' only")
        return self.evaluation(model, corpus)

    def warnings(self, corpus: Corpus) -> list[str]:
        """What the corpus has to say of its rows."""
        assert isinstance(corpus, ExampleCorpus)
        return corpus.warnings()

    def export(self, model: nn.Module, corpus: Corpus, folder: Path) -> None:
        """Weights, configuration and tokenizer; with LoRA the adapter, and on request the whole model below it."""
        assert isinstance(corpus, ExampleCorpus)
        whole = self.export_merged or self.model in PRESETS  # whose new weights are nowhere else
        self.lora.export(model, self.language(), corpus.data, corpus.tokenizer_folder, folder, whole=whole)

    def sample(self, model: nn.Module, corpus: Corpus, prompt: str, *, tokens: int, seed: int) -> str:
        """What the model answers to `prompt`, or where it is empty to the first row's."""
        assert isinstance(corpus, ExampleCorpus)
        asked = corpus.asked(prompt)
        return self.language().sample(model, corpus.tokenizer_folder, asked, tokens=tokens, seed=seed)


def nothing_learned(model: nn.Module) -> Tensor:
    """The loss of a part of a batch that has no rows: 0, of which gradients can be taken."""
    return next(model.parameters()).sum() * 0.0


def unwrapped(model: nn.Module) -> nn.Module:
    """What transformers or peft made, without what torch wraps around it."""
    if isinstance(model, DistributedDataParallel):
        return unwrapped(model.module)
    compiled = dict(model.named_children()).get("_orig_mod")  # asked so, since torch's compiler takes seconds to load
    return model if compiled is None else unwrapped(compiled)


def rows_of(corpus: Corpus, shard: ShardId, step: int) -> list[int]:
    """The rows of one inner step, where each is a unit of its own."""
    assert isinstance(corpus, ExampleCorpus)
    size = corpus.data.batch
    return [row for (row,) in corpus.units(shard, first=step * size, count=size)]


def held_out(corpus: ExampleCorpus) -> Iterator[list[int]]:
    """The rows that are evaluated, some at a time."""
    rows = corpus.validation_rows.tolist()
    for first in range(0, len(rows), EVALUATION_BATCH):
        yield rows[first : first + EVALUATION_BATCH]
