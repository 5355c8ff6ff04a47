"""Language modelling: predict the next token, with a new model of some size or a pretrained one."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diloco.data import Data, TokenCorpus
from diloco.messages import ShardId
from diloco.workload import Batch, Corpus, Workload
from diloco.workloads import sampling
from diloco.workloads.presets import PRESETS

if TYPE_CHECKING:  # transformers takes seconds to import, so methods do it where they need it
    from transformers import PreTrainedTokenizerBase

EVALUATION_BATCH = 8  # sequences


@dataclass(kw_only=True)
class CausalLM(Workload):
    """Train a causal language model on `data`; the loss is the mean cross-entropy of next tokens, in nats."""

    model: str = "tiny"  # a preset (micro, deep, tiny, 10m, 60m, ...): new weights; or a folder or hub id: its weights
    trust_remote_code: bool = False  # run Python code that comes with a pretrained model

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError(f"workload.model is empty: choose {', '.join(PRESETS)}, a folder or a hub id")
        if self.model not in PRESETS and os.path.isdir(os.path.expanduser(self.model)):
            # Workers may start in another folder.
            self.model = os.path.abspath(os.path.expanduser(self.model))

    def build_model(self, seed: int) -> nn.Module:
        """A preset's model with new weights, or a pretrained one with its own; float32, in train mode."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        with sampling.seeded(seed, torch.device("cpu")):
            if self.model in PRESETS:
                config = LlamaConfig(**PRESETS[self.model].llama_settings())
                build: Any = AutoModelForCausalLM.from_config
                model = build(config, dtype=torch.float32, attn_implementation="sdpa")
            else:
                model = self._pretrained(AutoModelForCausalLM, {"dtype": torch.float32})
                model.config.use_cache = False
        assert isinstance(model, nn.Module)
        return model.train()

    def num_parameters(self) -> int:
        """Of a preset, or of a folder by the size of its weights, as if they were saved in 16 bits."""
        if self.model in PRESETS:
            return PRESETS[self.model].num_parameters()
        return sum(path.stat().st_size for path in Path(self.model).glob("*.safetensors")) // 2

    def num_blocks(self) -> int:
        """Of a preset."""
        return PRESETS[self.model].layers if self.model in PRESETS else 0

    def corpus(self, data: Data, *, seed: int, shards: int) -> TokenCorpus:
        """Prepare or open the corpus, with the model's tokenizer where `data` names none.

        Raises ValueError also where tokenizer or sequence length do not fit the model.
        """
        vocabulary, positions = self._limits()
        if positions and data.sequence_length > positions:
            raise ValueError(
                f"data.sequence_length={data.sequence_length} is more than the {positions} positions of "
                f"workload.model={self.model}: use at most {positions}"
            )
        tokenizer = data.tokenizer or ("bpe" if self.model in PRESETS else self.model)
        vocab_size = data.vocab_size or vocabulary if tokenizer == "bpe" else data.vocab_size
        data = replace(data, tokenizer=tokenizer, vocab_size=vocab_size)
        if tokenizer == "bpe":
            self._check_fit(tokenizer, vocab_size, vocabulary)  # before the time to train it is spent
        corpus = TokenCorpus(data, seed=seed, shards=shards, trust_remote_code=self.trust_remote_code)
        self._check_fit(tokenizer, corpus.vocab_size, vocabulary)
        return corpus

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        """{"tokens": int64[data.batch, data.sequence_length + 1]}: the shard's next sequences."""
        assert isinstance(corpus, TokenCorpus)
        size = corpus.data.batch
        return {"tokens": corpus.sequences(shard, first=step * size, count=size)}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Mean cross-entropy of the next token."""
        return _cross_entropy(model, batch["tokens"], reduction="mean"), {}

    def tokens(self, batch: Batch) -> int:
        """All tokens but the first of each sequence are predicted."""
        sequences, length = batch["tokens"].shape
        return sequences * (length - 1)

    def evaluate(self, model: nn.Module, corpus: Corpus, split: str) -> dict[str, float]:
        """{"loss": mean nats a token over the validation sequences}; the only split is "validation"."""
        assert isinstance(corpus, TokenCorpus)
        if split != "validation":
            raise ValueError(f"split={split!r} is unknown: causal_lm has 'validation' only")
        sequences = corpus.validation()
        total = 0.0
        with evaluating(model):
            for first in range(0, len(sequences), EVALUATION_BATCH):
                chunk = sequences[first : first + EVALUATION_BATCH]
                total += _cross_entropy(model, chunk, reduction="sum").item()
        return {"loss": total / self.tokens({"tokens": sequences})}

    def export(self, model: nn.Module, corpus: Corpus, folder: Path) -> None:
        """Weights, configuration and tokenizer: what transformers' Auto classes load from `folder`."""
        from transformers import GenerationConfig, PreTrainedModel

        assert isinstance(corpus, TokenCorpus) and isinstance(model, PreTrainedModel)
        tokenizer = self._tokenizer(corpus)
        tokenizer.save_pretrained(folder)
        with without_progress_bars():
            model.save_pretrained(folder)
        config = copy.deepcopy(model.config)
        config.use_cache = True  # off while training
        if corpus.data.tokenizer != self.model:  # a pretrained model's own tokenizer agrees with its settings
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

    def sample(self, model: nn.Module, corpus: Corpus, prompt: str, *, tokens: int, seed: int) -> str:
        """`prompt`, or where it is empty the start of a held-out document, and up to `tokens` tokens after it."""
        from transformers import PreTrainedModel

        assert isinstance(corpus, TokenCorpus) and isinstance(model, PreTrainedModel)
        prompt = prompt or corpus.prompt()
        tokenizer = self._tokenizer(corpus)
        ids: Any = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with sampling.seeded(seed, model.device), evaluating(model):
            new = sampling.continuation(model, tokenizer, ids, tokens=tokens)
        return prompt + sampling.text_after(tokenizer, ids, new)

    def _limits(self) -> tuple[int, int | None]:
        """Size of the model's vocabulary and its greatest sequence length, where it has one."""
        if self.model in PRESETS:
            return PRESETS[self.model].vocab_size, PRESETS[self.model].max_positions
        from transformers import AutoConfig

        return sampling.limits(self._pretrained(AutoConfig, {}))

    def _pretrained(self, kind: Any, settings: dict[str, object]) -> Any:
        """What an Auto class loads from the folder or hub id `model`; ValueError where it cannot."""
        remedy = f"give a preset ({', '.join(PRESETS)}), or a folder that save_pretrained wrote"
        folder = Path(self.model)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ValueError(f"workload.model={self.model}: the folder has no config.json: {remedy}")
        if not folder.is_dir() and self.model.startswith((".", "/", "~")):
            raise ValueError(f"workload.model={self.model}: there is no such folder: {remedy}")
        try:
            with without_progress_bars():
                return kind.from_pretrained(self.model, trust_remote_code=self.trust_remote_code, **settings)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"workload.model={self.model} cannot be loaded ({reason}): check the name and, for a hub id, "
                f"the network; or {remedy}"
            ) from error

    def _check_fit(self, tokenizer: str, tokens: int, vocabulary: int) -> None:
        if tokens > vocabulary:
            raise ValueError(
                f"data.tokenizer={tokenizer} has {tokens} tokens and workload.model={self.model} room for "
                f"{vocabulary}: use data.vocab_size={vocabulary} or less, or another tokenizer or model"
            )

    def _tokenizer(self, corpus: TokenCorpus) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer, PreTrainedTokenizerBase

        tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_folder, trust_remote_code=self.trust_remote_code)
        assert isinstance(tokenizer, PreTrainedTokenizerBase)
        return tokenizer


def _cross_entropy(model: nn.Module, tokens: Tensor, *, reduction: str) -> Tensor:
    """Of all tokens but the first, given those before. `tokens`: int64[sequences, length + 1], any device."""
    tokens = tokens.to(next(model.parameters()).device)
    logits = model(input_ids=tokens[:, :-1]).logits  # [sequences, length, vocabulary]
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction)


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
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing over a run's own display."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
