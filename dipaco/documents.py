"""Documents scored one by one, each in pieces of the sequence length and without its prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from diloco.dealing import spread
from diloco.tokens import TokenFolder
from diloco.workloads.language import EVALUATION_BATCH, evaluating
from dipaco.saved import Doubles, Floats, Integers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
TOKENS_AT_ONCE = 1024  # at least as many are read at once, in short pieces too
UNCOUNTED = -100  # what cross_entropy ignores


@final
class Pieces:
    """Consecutive pieces of documents: every token after a document's prefix is the target of exactly one.

    A piece has at most `length` inputs, the token before its first target among them. The first `prefix` tokens
    are context alone: the router has seen them (arXiv:2403.10616, section 2.4).
    """

    def __init__(self, folder: TokenFolder, documents: Array, *, length: int, prefix: int) -> None:
        """`documents`: int64[documents] to cut. Those that are all prefix have no piece."""
        self._folder, self._length, self._prefix = folder, length, prefix
        sizes = folder.offsets[documents + 1] - folder.offsets[documents]
        counts = np.maximum(0, -(-(sizes - 1) // length))
        self.documents: Integers = np.repeat(documents, counts)  # int64[pieces]
        ends = np.cumsum(counts)
        self._starts = (np.arange(len(self.documents)) - np.repeat(ends - counts, counts)) * length
        self._stops = np.minimum(self._starts + length, np.repeat(sizes, counts) - 1)  # the last target
        self.tokens: Integers = np.maximum(0, self._stops + 1 - np.maximum(self._starts + 1, prefix))  # counted ones
        self._keep(np.flatnonzero(self.tokens))

    def __len__(self) -> int:
        return len(self.documents)

    def thin(self, count: int) -> None:
        """Keep at most `count`, spread evenly over all."""
        self._keep(spread(len(self), count))

    def shorten(self, tokens: int) -> None:
        """Keep what begins within the first `tokens` tokens of a document."""
        self._keep(np.flatnonzero(self._starts < tokens))

    def log_likelihoods(self, model: nn.Module, indices: Array) -> Doubles:
        """float64[len(indices)]: the sum over each piece's counted tokens, in nats. The model's mode is kept."""
        found = [np.empty(0)]
        with evaluating(model):
            for chunk in self._batches(indices):
                found.append(-self._losses(model, chunk).sum(dim=1).double().cpu().numpy())
        return np.concatenate(found)

    def places(self) -> tuple[Integers, Integers]:
        """int64[tokens], twice: of every counted token, piece by piece, the document and the position in it."""
        firsts = np.maximum(self._starts + 1, self._prefix)
        ends = np.cumsum(self.tokens)
        position = np.arange(int(self.tokens.sum())) - np.repeat(ends - self.tokens - firsts, self.tokens)
        return np.repeat(self.documents, self.tokens), position

    def token_log_likelihoods(self, model: nn.Module) -> Floats:
        """float32[tokens]: of every counted token, as `places` lists them, in nats. The model's mode is kept.

        A token is read after those of its document that are in the same piece, as in `log_likelihoods`.
        """
        found = [np.empty(0, dtype=np.float32)]
        with evaluating(model):
            for chunk in self._batches(np.arange(len(self))):
                losses = self._losses(model, chunk).cpu().numpy()
                columns = np.arange(losses.shape[1])
                ends = (self._stops - self._starts)[chunk][:, None]
                counted = (columns < ends) & (columns >= ends - self.tokens[chunk][:, None])  # the last of each piece
                found.append(-losses[counted])
        return np.concatenate(found)

    def document_scores(self, model: nn.Module) -> Doubles:
        """float64[documents]: mean log-likelihood of the counted tokens of each document that has some, by index.

        In nats. S_p of arXiv:2403.10616, section 2.4.2, where `model` is path p, divided by the document's length.
        """
        _, places = np.unique(self.documents, return_inverse=True)
        sums = np.bincount(places, self.log_likelihoods(model, np.arange(len(self))))
        return np.asarray(sums / np.bincount(places, self.tokens), dtype=np.float64)

    def _batches(self, indices: Array) -> Iterator[Array]:
        """What a model reads at once."""
        size = max(EVALUATION_BATCH, TOKENS_AT_ONCE // self._length)
        return (indices[first : first + size] for first in range(0, len(indices), size))

    def _losses(self, model: nn.Module, indices: Sequence[int] | Array) -> Tensor:
        """float32[pieces, longest]: of each target, 0 where it is padding or prefix."""
        texts, targets = [], []
        for index in indices:
            start, stop = int(self._starts[index]), int(self._stops[index])
            document = self._folder.document(int(self.documents[index]))
            text = torch.from_numpy(document[start : stop + 1].astype(np.int64))
            target = text[1:].clone()
            target[: max(0, self._prefix - start - 1)] = UNCOUNTED
            texts.append(text[:-1])
            targets.append(target)
        device = next(model.parameters()).device
        # On the right, where causal attention hides it from all that is counted.
        inputs = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
        wanted = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=UNCOUNTED).to(device)
        logits = model(input_ids=inputs).logits.float()  # [pieces, longest, vocabulary]
        return functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none", ignore_index=UNCOUNTED)

    def _keep(self, indices: Array) -> None:
        self.documents, self.tokens = self.documents[indices], self.tokens[indices]
        self._starts, self._stops = self._starts[indices], self._stops[indices]


@dataclass(frozen=True, kw_only=True, eq=False)
class Likelihoods:
    """Of the counted tokens of some documents under every path, in nats."""

    values: Floats  # float32[paths, tokens]
    document: Integers  # int64[tokens]
    position: Integers  # int64[tokens], in its document

    def windows(self, every: int, *, prefix: int) -> Integers:
        """int64[tokens]: in which window of its document each is; the first begins after the prefix."""
        return (self.position - prefix) // every


def score(
    pieces: Pieces, paths: int, load: Callable[[int], nn.Module], *, say: Callable[[str], None] = lambda text: None
) -> Likelihoods:
    """The table for `pieces`. One path's model at a time, as `load` gives it; `say` is told of each."""
    rows = []
    documents = len(np.unique(pieces.documents))
    for path in range(paths):
        say(f"path {path} of {paths} reads {documents:,} documents, {int(pieces.tokens.sum()):,} tokens")
        rows.append(pieces.token_log_likelihoods(load(path)))
    values = np.stack(rows)
    document, position = pieces.places()
    return Likelihoods(values=values, document=document, position=position)
