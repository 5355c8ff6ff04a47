"""Language modelling: predict the next token, with a new model of some size or a pretrained one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from diloco.data import Data, TokenCorpus
from diloco.messages import ShardId
from diloco.workload import Batch, Corpus, Workload
from diloco.workloads.language import EVALUATION_BATCH, LanguageModel, evaluating


@dataclass(kw_only=True)
class CausalLM(Workload):
    """Train a causal language model on `data`; the loss is the mean cross-entropy of next tokens, in nats."""

    model: str = "tiny"  # a preset (micro, deep, tiny, 10m, 60m, ...): new weights; or a folder or hub id: its weights
    trust_remote_code: bool = False  # run Python code that comes with a pretrained model

    def __post_init__(self) -> None:
        self.model = self._language().name

    def build_model(self, seed: int) -> nn.Module:
        """A preset's model with new weights, or a pretrained one with its own; float32, in train mode."""
        return self._language().build(seed)

    def num_parameters(self) -> int:
        """Of a preset, or of a folder by the size of its weights, as if they were saved in 16 bits."""
        return self._language().num_parameters()

    def num_blocks(self) -> int:
        """Of a preset."""
        return self._language().num_blocks()

    def corpus(self, data: Data, *, seed: int, shards: int) -> TokenCorpus:
        """Prepare or open the corpus, with the model's tokenizer where `data` names none.

        Raises ValueError also where tokenizer or sequence length do not fit the model.
        """
        language = self._language()
        data = language.fitted(data)
        corpus = TokenCorpus(data, seed=seed, shards=shards, trust_remote_code=self.trust_remote_code)
        language.check_vocabulary(data.tokenizer, corpus.vocab_size)
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
        assert isinstance(corpus, TokenCorpus)
        self._language().export(model, corpus.data, corpus.tokenizer_folder, folder)

    def sample(self, model: nn.Module, corpus: Corpus, prompt: str, *, tokens: int, seed: int) -> str:
        """`prompt`, or where it is empty the start of a held-out document, and up to `tokens` tokens after it."""
        assert isinstance(corpus, TokenCorpus)
        prompt = prompt or corpus.prompt()
        return self._language().sample(model, corpus.tokenizer_folder, prompt, tokens=tokens, seed=seed)

    def _language(self) -> LanguageModel:
        return LanguageModel.named(self.model, trust_remote_code=self.trust_remote_code)


def _cross_entropy(model: nn.Module, tokens: Tensor, *, reduction: str) -> Tensor:
    """Of all tokens but the first, given those before. `tokens`: int64[sequences, length + 1], any device."""
    tokens = tokens.to(next(model.parameters()).device)
    logits = model(input_ids=tokens[:, :-1]).logits  # [sequences, length, vocabulary]
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction)
