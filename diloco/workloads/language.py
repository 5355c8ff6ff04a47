"""A causal language model as the workloads share it: how it is made or loaded, fits its data, and is written out."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diloco import pretrained
from diloco.data import Data
from diloco.garbage import unsearched
from diloco.workloads import sampling
from diloco.workloads.presets import PRESETS

EVALUATION_BATCH = 8  # sequences

if TYPE_CHECKING:  # transformers takes seconds to import, so methods do it where they need it
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LanguageModel:
    """Which model: a preset with new weights, or a folder or hub id with its own."""

    name: str
    trust_remote_code: bool

    @classmethod
    def named(cls, name: str, *, trust_remote_code: bool) -> LanguageModel:
        """Raises ValueError for an empty name; that of a folder becomes absolute: workers may start in another one."""
        if not name:
            raise ValueError(f"workload.model is empty: choose {', '.join(PRESETS)}, a folder or a hub id")
        if name not in PRESETS and os.path.isdir(os.path.expanduser(name)):
            name = os.path.abspath(os.path.expanduser(name))
        return cls(name, trust_remote_code)

    @unsearched()  # transformers is imported here
    def build(self, seed: int, *, scores: bool = False) -> nn.Module:
        """A preset's model with new weights, or a pretrained one with its own; float32, in train mode.

        With `scores`, it has one output in place of its head, zero at first unless the folder's model has it already.
        """
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

        kind: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        more: dict[str, Any] = {"num_labels": 1} if scores else {}
        with sampling.seeded(seed, torch.device("cpu")):
            if self.name in PRESETS:
                config = LlamaConfig(**PRESETS[self.name].llama_settings(), **more)
                model = kind.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
            else:
                model = self._pretrained(kind, pretrained.load_model, {"dtype": torch.float32, **more})
                model.config.use_cache = False
                if not scores and any("SequenceClassification" in name for name in model.config.architectures or []):
                    raise ValueError(f"workload.model={self.name} is a reward model, and writes nothing: give another")
        assert isinstance(model, nn.Module)
        if scores:
            _begin_scoring(model)
        return model.train()

    def fingerprint(self, seed: int) -> list[object]:
        """JSON values that change when the weights that `build(seed)` gives would."""
        folder = Path(self.name)
        if not folder.is_dir():
            return [self.name, seed if self.name in PRESETS else None]
        files = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
        return [self.name, [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]]

    def num_parameters(self) -> int:
        """Of a preset, or of a folder by the size of its weights, as if they were saved in 16 bits."""
        if self.name in PRESETS:
            return PRESETS[self.name].num_parameters()
        return sum(path.stat().st_size for path in Path(self.name).glob("*.safetensors")) // 2

    def num_blocks(self) -> int:
        """Of a preset."""
        return PRESETS[self.name].layers if self.name in PRESETS else 0

    def fitted(self, data: Data) -> Data:
        """`data` with the model's tokenizer where it names none.

        Raises ValueError where sequence length, or a vocabulary that is to be trained, do not fit the model.
        """
        vocabulary, positions = self._limits()
        if positions and data.sequence_length > positions:
            raise ValueError(
                f"data.sequence_length={data.sequence_length} is more than the {positions} positions of "
                f"workload.model={self.name}: use at most {positions}"
            )
        tokenizer = data.tokenizer or ("bpe" if self.name in PRESETS else self.name)
        vocab_size = data.vocab_size or vocabulary if tokenizer == "bpe" else data.vocab_size
        if tokenizer == "bpe":
            self.check_vocabulary(tokenizer, vocab_size)  # before the time to train it is spent
        return replace(data, tokenizer=tokenizer, vocab_size=vocab_size)

    def check_vocabulary(self, tokenizer: str, tokens: int) -> None:
        """Raise ValueError where a tokenizer has more tokens than the model."""
        vocabulary = self._limits()[0]
        if tokens > vocabulary:
            raise ValueError(
                f"data.tokenizer={tokenizer} has {tokens} tokens and workload.model={self.name} room for "
                f"{vocabulary}: use data.vocab_size={vocabulary} or less, or another tokenizer or model"
            )

    def tokenizer(self, folder: Path) -> PreTrainedTokenizerBase:
        """The one in this folder."""
        from transformers import AutoTokenizer, PreTrainedTokenizerBase

        tokenizer = pretrained.load(AutoTokenizer, folder, trust_remote_code=self.trust_remote_code)
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        return tokenizer

    def export(self, model: nn.Module, data: Data, tokenizer_folder: Path, folder: Path) -> None:
        """Weights, configuration and tokenizer: what transformers' Auto classes load from `folder`."""
        from transformers import GenerationConfig, PreTrainedModel

        assert isinstance(model, PreTrainedModel)
        tokenizer = self.tokenizer(tokenizer_folder)
        tokenizer.save_pretrained(folder)
        with without_progress_bars():
            model.save_pretrained(folder)
        config = copy.deepcopy(model.config)
        config.use_cache = True  # off while training
        if data.tokenizer != self.name:  # a pretrained model's own tokenizer agrees with its settings
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            # Padding is end-of-text, whose embedding would no longer be trained if `config` named it.
            generation: Any = GenerationConfig
            generation(
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ).save_pretrained(folder)
        config.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # written for the owner alone
            weights.chmod((folder / "config.json").stat().st_mode)

    def sample(self, model: Any, tokenizer_folder: Path, prompt: str, *, tokens: int, seed: int) -> str:
        """`prompt` and up to `tokens` tokens after it."""
        tokenizer = self.tokenizer(tokenizer_folder)
        ids: Any = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with sampling.seeded(seed, model.device), evaluating(model):
            new = sampling.continuation(model, tokenizer, ids, tokens=tokens)
        return prompt + sampling.text_after(tokenizer, ids, new)

    def _limits(self) -> tuple[int, int | None]:
        """Size of the model's vocabulary and its greatest sequence length, where it has one."""
        if self.name in PRESETS:
            return PRESETS[self.name].vocab_size, PRESETS[self.name].max_positions
        from transformers import AutoConfig

        return sampling.limits(self._pretrained(AutoConfig, pretrained.load, {}))

    def _pretrained(self, kind: Any, load: Callable[..., Any], settings: dict[str, object]) -> Any:
        """What an Auto class loads from the folder or hub id `name`; ValueError where it cannot."""
        remedy = f"give a preset ({', '.join(PRESETS)}), or a folder that save_pretrained wrote"
        folder = Path(self.name)
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"workload.model={self.name} has an adapter alone: train with workload.export_merged=true and give its"
                " folder merged, or the model that it was trained on, with init_from=RUN"
            )
        if (folder / "config.yaml").is_file() and (folder / "export").is_dir():
            raise ValueError(f"workload.model={self.name} is a run: give {folder / 'export'}")
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ValueError(f"workload.model={self.name}: the folder has no config.json: {remedy}")
        if not folder.is_dir() and self.name.startswith((".", "/", "~")):
            raise ValueError(f"workload.model={self.name}: there is no such folder: {remedy}")
        try:
            with without_progress_bars():
                return load(kind, self.name, trust_remote_code=self.trust_remote_code, settings=settings)
        except pretrained.NeedsCode as error:
            raise ValueError(f"workload.model={error}") from error
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"workload.model={self.name} cannot be loaded ({reason}): check the name and, for a hub id, "
                f"the network; or {remedy}"
            ) from error


def _begin_scoring(model: Any) -> None:
    """A zero output, unless it was trained before, and a token that transformers takes for the filling of a batch."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id if isinstance(config.eos_token_id, int) else 0
    if not any("SequenceClassification" in name for name in model.config.architectures or []):
        nn.init.zeros_(model.score.weight)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; then the mode that was before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, then as before: several on busy cores are far slower, and may give other bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing over a run's own display, and from telling that a new head is new."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()
