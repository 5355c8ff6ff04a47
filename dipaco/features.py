"""Features of documents, by which they are routed: the hidden states of a base model, or the words they use.

Both kinds look at the first so many tokens of a document and are vectors of length 1: without it k-means
tells long documents from short ones rather than their topics.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
import torch

from diloco import pretrained
from diloco.workloads.language import without_progress_bars
from dipaco import saved
from dipaco.saved import Floats

Document: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"  # integers[tokens], end-of-text left out

WIDTH = 64  # of the features, at most
BUCKETS = 1 << 16  # that runs of tokens are hashed to
BYTES = 512  # a vocabulary up to here is of bytes or letters: only runs of several say something
PRIME = (1 << 61) - 1
BATCH = 32  # documents that the base model reads at once
FORMAT = 1  # of saved features; a higher number makes all cached routings be made again


class Features(ABC):
    """Documents -> vectors. Fitted once; the same document always has the same vector."""

    @property
    @abstractmethod
    def width(self) -> int:
        """How many numbers a document's vector has."""

    @abstractmethod
    def vectors(self, documents: Sequence[Document], *, tokens: int) -> Floats:
        """float32[documents, width]: each of length 1, from the first `tokens` tokens of each document."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write features.npz and features.json into `folder`, for `load`."""


@final
class TextFeatures(Features):
    """Latent semantic analysis: tf-idf of tokens and pairs of them (of 4 to 6 bytes), then a truncated SVD.

    Fitted on longer texts than it is used for, it knows from a prefix what the rest is likely to be about:
    on 32 tokens that makes routers far better than what prefixes alone teach (see tests/dipaco).
    """

    def __init__(self, idf: Floats, components: Floats, *, lengths: Sequence[int]) -> None:
        """`idf`: float32[BUCKETS]; `components`: float32[width, BUCKETS]; `lengths`: of the runs that are counted."""
        self._idf, self._components, self._lengths = idf, components, lengths

    @classmethod
    def fit(cls, documents: Sequence[Document], *, tokens: int, vocabulary: int, seed: int) -> TextFeatures:
        """From the first `tokens` tokens of `documents`, whose token ids are below `vocabulary`."""
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfTransformer

        lengths = run_lengths(vocabulary)
        counts = _counts(documents, tokens, lengths)
        weights = TfidfTransformer(sublinear_tf=True).fit(counts)
        width = min(WIDTH, len(documents))
        svd = TruncatedSVD(width, random_state=seed).fit(weights.transform(counts))
        # Alternately to the two halves, so that both halves of product k-means have strong components.
        order = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
        return cls(weights.idf_.astype(np.float32), svd.components_[order].astype(np.float32), lengths=lengths)

    @property
    def width(self) -> int:
        """Components of the decomposition that was fitted."""
        return len(self._components)

    def vectors(self, documents: Sequence[Document], *, tokens: int) -> Floats:
        """Counts of runs of tokens, as TF-IDF with sublinear counts, projected to the components."""
        counts = _counts(documents, tokens, self._lengths)
        counts.data = (1 + np.log(counts.data)) * self._idf[counts.indices]
        return _unit(np.asarray(counts @ self._components.T))

    def save(self, folder: Path) -> None:
        """features.npz with `idf` and `components`, and features.json."""
        arrays = {"idf": self._idf, "components": self._components}
        meta = {"kind": "text", "lengths": list(self._lengths), "format": FORMAT}
        saved.write(folder, "features", arrays, meta)


@final
class HiddenFeatures(Features):
    """The mean of a language model's last hidden states (arXiv:2403.10616, section 2.4), whitened."""

    def __init__(self, base: str, mean: Floats, projection: Floats) -> None:
        """`base`: the model's folder; `mean`: float32[hidden]; `projection`: float32[hidden, width]."""
        self._base, self._mean, self._projection = base, mean, projection
        self._model = _base_model(base)
        if self._model.config.hidden_size != len(mean):
            raise ValueError(
                f"workload.base={base} has hidden states of width {self._model.config.hidden_size}, and these "
                f"features were fitted on {len(mean)}: give the model that they were fitted with, or fit anew"
            )

    @classmethod
    def fit(cls, documents: Sequence[Document], *, tokens: int, base: str) -> HiddenFeatures:
        """From the first `tokens` tokens of `documents`, read by the model in the folder `base`."""
        from sklearn.decomposition import PCA

        states = _hidden_states(_base_model(base), documents, tokens)
        pca = PCA(min(WIDTH, *states.shape), svd_solver="full").fit(states)
        scale = np.sqrt(pca.explained_variance_ + 1e-12)
        return cls(base, pca.mean_.astype(np.float32), (pca.components_.T / scale).astype(np.float32))

    @property
    def width(self) -> int:
        """Components of the whitening that was fitted."""
        return int(self._projection.shape[1])

    def vectors(self, documents: Sequence[Document], *, tokens: int) -> Floats:
        """Means of the base model's hidden states, whitened."""
        return _unit((_hidden_states(self._model, documents, tokens) - self._mean) @ self._projection)

    def save(self, folder: Path) -> None:
        """features.npz with `mean` and `projection`, and features.json with the base model's folder."""
        arrays = {"mean": self._mean, "projection": self._projection}
        saved.write(folder, "features", arrays, {"kind": "hidden", "base": self._base, "format": FORMAT})


def load(folder: Path) -> Features:
    """What `save` wrote into `folder`. Raises ValueError where it is not there or of another version."""
    arrays, meta = saved.read(folder, "features")
    if meta.get("format") != FORMAT:
        raise ValueError(f"{folder}: its features have format {meta.get('format')}, not {FORMAT}: fit them anew")
    if meta["kind"] == "text":
        return TextFeatures(arrays["idf"], arrays["components"], lengths=meta["lengths"])
    return HiddenFeatures(meta["base"], arrays["mean"], arrays["projection"])


def check_base(base: str, tokenizer: Path) -> None:
    """Raise ValueError unless the model in `base` reads the tokens of the tokenizer in the folder `tokenizer`."""
    from transformers import AutoTokenizer

    _base_config(base)
    try:
        own: Any = pretrained.load(AutoTokenizer, base)
    except (OSError, ValueError) as error:
        raise ValueError(f"workload.base={base} has no tokenizer: give a folder that diloco export wrote") from error
    corpus: Any = pretrained.load(AutoTokenizer, tokenizer)
    if own.get_vocab() != corpus.get_vocab():
        raise ValueError(
            f"workload.base={base} has another tokenizer than the corpus: set data.tokenizer={base}, or give a base "
            "model that was trained with the corpus's tokenizer"
        )


def run_lengths(vocabulary: int) -> tuple[int, ...]:
    """How many tokens the runs have that are counted, by the size of the vocabulary.

    With 32 tokens of botocore passages, purity .93 on a BPE of 4,096 with (1, 2), and .77 with (1, 2, 3); on bytes
    .56 with (1, 2), .68 with (2, 3, 4), .72 with (4, 5, 6).
    """
    return (4, 5, 6) if vocabulary <= BYTES else (1, 2)


def _counts(documents: Sequence[Document], tokens: int, lengths: Sequence[int]) -> Any:
    """float64 CSR [documents, BUCKETS]: how often each run of so many tokens occurs."""
    from scipy import sparse

    parts = []
    for first in range(0, len(documents), BATCH):  # the repeated places of few documents at a time
        rows, columns = [], []
        for row, document in enumerate(documents[first : first + BATCH]):
            found = _buckets(document[:tokens].astype(np.int64), lengths)
            columns.append(found)
            rows.append(np.full(len(found), row))
        place = (np.concatenate(rows), np.concatenate(columns))
        shape = (len(rows), BUCKETS)
        parts.append(sparse.csr_matrix((np.ones(len(place[0])), place), shape=shape))  # sums repeated places
    return sparse.vstack(parts, format="csr")


def _buckets(ids: Document, lengths: Sequence[int]) -> Document:
    """int64[runs]: the bucket of every run of so many tokens in `ids`, int64[tokens]."""
    found = [np.empty(0, dtype=np.int64)]
    runs = ids
    for length in range(1, min(max(lengths), len(ids)) + 1):
        if length > 1:
            runs = (runs[:-1] * 1_000_003 + ids[length - 1 :]) % PRIME  # overflow wraps around, always alike
        if length in lengths:
            found.append(((runs * 2_654_435_761 + length) % PRIME >> 8) % BUCKETS)
    return np.concatenate(found)


def _unit(vectors: Any) -> Floats:
    """float32, each row of length 1; rows of zeros stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths > 0, lengths, 1), dtype=np.float32)


def _base_config(base: str) -> Any:
    from transformers import AutoConfig

    if not (Path(base) / "config.json").is_file():
        raise ValueError(
            f"workload.base={base}: there is no model in this folder: give RUN/export of a finished run, or a folder "
            "that save_pretrained wrote; workload.base= (empty) takes features without a model"
        )
    return pretrained.load(AutoConfig, base)


def _base_model(base: str) -> Any:
    """The base model without its head: float32, on the CPU, in eval mode."""
    from transformers import AutoModel

    _base_config(base)
    with without_progress_bars():
        return pretrained.load_model(AutoModel, base, settings={"dtype": torch.float32}).eval()


def _positions(config: Any) -> int:
    try:
        return int(config.max_position_embeddings)
    except AttributeError:  # state-space models, say, have no limit
        return sys.maxsize


def _hidden_states(model: Any, documents: Sequence[Document], tokens: int) -> Floats:
    """float32[documents, hidden]: means over the first `tokens` tokens; zeros for an empty document.

    No more tokens than the model has positions for.
    """
    tokens = min(tokens, _positions(model.config))
    means = np.zeros((len(documents), model.config.hidden_size), dtype=np.float32)
    order = sorted((index for index in range(len(documents)) if len(documents[index])), key=lambda i: len(documents[i]))
    for first in range(0, len(order), BATCH):  # of like lengths, so that little is padded
        batch = order[first : first + BATCH]
        texts = [torch.from_numpy(documents[index][:tokens].astype(np.int64)) for index in batch]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)  # int64[batch, longest]
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=real).last_hidden_state  # [batch, longest, hidden]
        sums = (states * real[:, :, None]).sum(dim=1)
        means[batch] = (sums / real.sum(dim=1, keepdim=True)).numpy()
    return means
