"""Low-rank adapters (LoRA, arXiv:2106.09685), by the library peft: only they are trained, and travel."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diloco.data import Data
from diloco.workloads import sampling
from diloco.workloads.language import LanguageModel


@dataclass(kw_only=True)
class LoRA:
    """Adapters beside linear layers. Their product is zero at first, so that training starts from the model itself."""

    rank: int = 0  # 0 = none: all weights are trained
    alpha: float = 16.0  # the product of an adapter's factors counts alpha / rank times
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)  # linear layers, such as q_proj; none = all but the head

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"workload.lora.rank={self.rank}: it must be at least 1, or 0 to train all weights")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"workload.lora.dropout={self.dropout}: it must be at least 0 and below 1")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"workload.lora.alpha={self.alpha}: it must be a positive number")

    def around(self, model: nn.Module, seed: int, *, scores: bool = False) -> nn.Module:
        """`model` with adapters that are trained, all else frozen; itself without a rank.

        The head of one that `scores` is trained too.
        Raises ValueError where peft is not installed or no layer has a name among `targets`.
        """
        if not self.rank:
            return model
        try:
            from peft import LoraConfig, TaskType, get_peft_model
        except ImportError as error:
            raise ValueError(f"workload.lora.rank={self.rank} needs peft: pip install 'diloco[lora]'") from error
        names = [name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        unknown = sorted(set(self.targets) - set(names))
        if unknown:
            raise ValueError(
                f"workload.lora.targets={self.targets}: the model has no linear layer {unknown[0]}, but "
                f"{', '.join(dict.fromkeys(names))}"
            )
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS if scores else TaskType.CAUSAL_LM,
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.targets or "all-linear",
        )
        with sampling.seeded(seed, torch.device("cpu")), warnings.catch_warnings():
            # peft 0.21 asks transformers 5 for something by an old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted: Any = get_peft_model(model, config)
        assert isinstance(adapted, nn.Module)
        return adapted

    def export(
        self,
        model: nn.Module,
        language: LanguageModel,
        data: Data,
        tokenizer_folder: Path,
        folder: Path,
        *,
        whole: bool,
    ) -> None:
        """Write the adapter and the tokenizer into `folder`, and if `whole` the merged model into `folder`/merged.

        Without adapters, what `LanguageModel.export` writes.
        """
        if not self.rank:
            language.export(model, data, tokenizer_folder, folder)
            return
        adapted: Any = model
        adapted.save_pretrained(folder)
        language.tokenizer(tokenizer_folder).save_pretrained(folder)
        if whole:
            (folder / "merged").mkdir(exist_ok=True)  # of the run that this one goes on with
            language.export(copy.deepcopy(adapted).merge_and_unload(), data, tokenizer_folder, folder / "merged")
