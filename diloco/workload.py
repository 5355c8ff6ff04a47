"""Workload: model, data, loss and evaluation. What a user subclasses to train something of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import Tensor, nn

from diloco.messages import ShardId, State

if TYPE_CHECKING:
    from diloco.data import Data

Batch: TypeAlias = dict[str, Tensor]  # every tensor's first dimension counts sequences


class Corpus(Protocol):
    """Prepared data: what the engine needs to know of it. A workload may put whatever else it likes on its own."""

    @property
    def sha256(self) -> str:
        """Digest of all that is trained and evaluated on."""
        ...

    def shard_examples(self) -> list[int]:
        """How many training examples each shard holds, by shard id."""
        ...

    def describe(self) -> dict[str, object]:
        """JSON values for the run's record: sources and their versions, documents, tokens."""
        ...


@dataclass(kw_only=True)
class Workload(ABC):
    """What is trained. Subclass it as a `@dataclass(kw_only=True)` whose fields are its settings.

    Every method must be a function of its arguments and the fields alone: islands, evaluator and
    resumed runs each have an instance of their own and rely on getting the same answers.
    """

    @abstractmethod
    def build_model(self, seed: int) -> nn.Module:
        """A fresh float32 model; the same `seed` gives the same weights on every machine of a kind."""

    @abstractmethod
    def corpus(self, data: Data, *, seed: int, shards: int) -> Corpus:
        """Prepare (once; later calls read the cache) the corpus, its training documents split into `shards`.

        Raises ValueError where the data cannot be used: missing, empty, binary, fewer documents than shards.
        """

    @abstractmethod
    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        """The sequences of one inner step of one island: a pure function of its arguments."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Scalar loss, the mean over `weight(batch)` tokens (or pairs), and further metrics.

        A part of a batch may have no tokens at all, where they are masked: the loss must then be 0, not 0/0.
        """

    def begin_step(self, model: nn.Module, *, installed: bool) -> None:
        """Called before each inner step's batch, with the model (not what torch wraps around it).

        `installed`: whether global weights have been written into it since the last step. For what follows the model
        from step to step, such as an average of its weights; nothing for most.
        """
        return None

    @abstractmethod
    def tokens(self, batch: Batch) -> int:
        """How many tokens the model learns from in `batch`."""

    def weight(self, batch: Batch) -> int:
        """How many things the loss of `batch` is a mean over, by which parts of a batch are joined: mostly tokens."""
        return self.tokens(batch)

    @abstractmethod
    def evaluate(self, model: nn.Module, corpus: Corpus, split: str) -> dict[str, float]:
        """Metrics on a held-out split; must contain "loss": what training is to lower, see `has_perplexity`."""

    @abstractmethod
    def export(self, model: nn.Module, corpus: Corpus, folder: Path) -> None:
        """Write the model for use elsewhere into the existing, empty `folder`."""

    def has_perplexity(self) -> bool:
        """Whether the "loss" of `evaluate` is a cross-entropy a token in nats, of which the exponential is told too."""
        return True

    def learning(self) -> Sequence[str]:
        """Fields that change what is learned, but not what `evaluate` tells of given weights."""
        return ()

    def needs_whole_model(self) -> str:
        """Why each worker has to hold all of the model, if so; empty where it may be spread over them."""
        return ""

    def needs_whole_batch(self) -> str:
        """Why a batch must not be cut into parts, or shared by workers, if so; empty where it may."""
        return ""

    def splits(self) -> list[str]:
        """What is evaluated, by path: one for all, or one for each path. Then `evaluate` must tell "tokens" too."""
        return ["validation"]

    def stops_early(self) -> bool:
        """Whether `evaluate` tells "stop_loss" too, on a slice of the training data that tells a path's best round."""
        return False

    def for_paths(self, paths: int) -> Workload:
        """The same, for a layout with so many paths."""
        return self

    def warnings(self, corpus: Corpus) -> list[str]:
        """What should be known of the data before it is trained on."""
        return []

    def export_shared(self, corpus: Corpus, folder: Path) -> None:
        """Write what all paths need beside their own folders below `folder`; nothing for most."""
        return None

    def num_parameters(self) -> int:
        """About how many the model has, where that is cheap to tell: memory is set aside by it. 0 = unknown."""
        return 0

    def num_blocks(self) -> int:
        """How many blocks the model has, where that is cheap to tell: layouts are checked by it. 0 = unknown."""
        return 0

    def sample(self, model: nn.Module, corpus: Corpus, prompt: str, *, tokens: int, seed: int) -> str:
        """`prompt` and what the model writes after it; an empty one is chosen here. Empty where there is no text."""
        return ""

    def samples(self, model: nn.Module, corpus: Corpus, *, seed: int) -> list[dict[str, str]]:
        """Rows of a table of what the model writes, with the same keys in each; none for most."""
        return []

    def state(self) -> State:
        """What belongs to a source beyond model and optimizer (an anchor, say). Empty for most."""
        return State()

    def load_state(self, state: State) -> None:
        """Take back what `state()` gave; an empty one where another source begins anew."""
        assert not state.tensors and not state.meta, "a workload with state() needs load_state()"


def cut(batch: Batch, parts: int) -> list[Batch]:
    """A batch in so many parts, of consecutive sequences."""
    if parts == 1:
        return [batch]
    chunks = {name: value.chunk(parts) for name, value in batch.items()}
    return [{name: values[i] for name, values in chunks.items()} for i in range(parts)]
