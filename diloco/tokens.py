"""Documents -> a folder with their tokens, memory-mapped, and which of them are held out."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diloco.sources import Document, Source
from diloco.vocabulary import Encoder, Recipe, make_encoder, parallel_tokenizers

BPE_TRAINING_BYTES = 100_000_000  # more text changes a vocabulary little and costs minutes
BATCH_BYTES = 4_000_000  # of text tokenised at once
PROMPT_CHARACTERS = 60
READ_BYTES_PER_TOKEN = 8  # with a limit in tokens, at most so much text is read for each; English has about 4

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenFolder:
    """A prepared corpus, opened: documents back to back, each ending with an end-of-text token."""

    folder: Path
    tokens: Array  # uint16 or uint32[tokens], memory-mapped
    offsets: Array  # int64[documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]
    domains: Array  # int32[documents]: index into meta["domains"]
    held_out: Array  # bool[documents]: validation documents
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> TokenFolder:
        """Map the folder that `prepare` wrote."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        table = {name: np.load(folder / f"{name}.npy") for name in ("offsets", "domains", "held_out")}
        return cls(folder=folder, tokens=np.asarray(tokens), meta=meta, **table)

    @property
    def tokenizer(self) -> Path:
        """The folder that AutoTokenizer.from_pretrained loads."""
        return self.folder / "tokenizer"

    def document(self, index: int) -> Array:
        """The tokens of one document, end-of-text included: read-only."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class Windows:
    """Documents as one virtual stream, cut into windows of length + 1 tokens that overlap by one."""

    def __init__(self, folder: TokenFolder, documents: Array, length: int) -> None:
        self._tokens = folder.tokens
        self._starts = folder.offsets[documents]  # int64[documents], in the file
        sizes = folder.offsets[documents + 1] - self._starts
        self._ends = np.cumsum(sizes)  # int64[documents], in the stream
        self._shift = self._starts - (self._ends - sizes)  # from a position in the stream to one in the file
        self._span = np.arange(length + 1)
        self.tokens = int(sizes.sum())
        self.count = max(0, (self.tokens - 1) // length)

    def gather(self, indices: Array) -> Tensor:
        """int64[len(indices), length + 1]: inputs are all but the last column, targets all but the first."""
        positions = indices[:, None] * (len(self._span) - 1) + self._span
        documents = np.searchsorted(self._ends, positions, side="right")
        return torch.from_numpy(self._tokens[positions + self._shift[documents]].astype(np.int64))


class Spool:
    """Distinct documents on disk, in the order of arrival, so that a large corpus needs little memory."""

    def __init__(self, path: Path, documents: Iterable[Document], *, max_bytes: int) -> None:
        """Write `documents` without duplicates and blanks to `path`, at most `max_bytes` (0 = all)."""
        self.path = path
        self.digests: list[bytes] = []  # sha256 of each text
        self.ends = array("q", [0])  # where each text ends in the file, after a leading 0
        self.characters = array("q")
        self.domains = array("i")
        self.names: dict[str, int] = {}  # domain -> its number
        seen: set[bytes] = set()
        with path.open("wb") as file:
            for document in documents:
                text = document.text.encode("utf-8", "replace")
                digest = hashlib.sha256(text).digest()
                if digest in seen or not text.strip():
                    continue
                if max_bytes and self.ends[-1] + len(text) > max_bytes and len(self.digests) > 1:
                    break
                seen.add(digest)
                self.digests.append(digest)
                self.characters.append(len(document.text))
                self.domains.append(self.names.setdefault(document.domain, len(self.names)))
                self.ends.append(self.ends[-1] + file.write(text))

    def texts(self, indices: Iterable[int]) -> Iterator[str]:
        """The texts of these documents."""
        with self.path.open("rb") as file:
            for index in indices:
                file.seek(self.ends[index])
                yield file.read(self.ends[index + 1] - self.ends[index]).decode("utf-8")

    def batches(self, indices: Iterable[int]) -> Iterator[list[int]]:
        """`indices` cut into runs of about BATCH_BYTES of text."""
        batch: list[int] = []
        size = 0
        for index in indices:
            batch.append(index)
            size += self.ends[index + 1] - self.ends[index]
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def held_out(digests: Sequence[bytes], characters: Sequence[int], fraction: float) -> list[bool]:
    """Which documents are for validation: in order of digest, until `fraction` of all characters.

    At least one document is held out, and at least one is left to train on.

    The choice looks at nothing but a document's own text, so it is the same whatever the order of reading.
    """
    chosen = [False] * len(digests)
    target = fraction * sum(characters)
    taken = 0
    for index in sorted(range(len(digests)), key=digests.__getitem__)[: len(digests) - 1]:
        if taken >= target:
            break
        chosen[index] = True
        taken += characters[index]
    return chosen


def prepare(source: Source, recipe: Recipe, folder: Path) -> None:
    """Read, tokenise and write everything that `TokenFolder.open` maps into the existing, empty `folder`."""
    text_file = folder / "text.tmp"
    spool = Spool(text_file, source.documents(), max_bytes=recipe.max_tokens * READ_BYTES_PER_TOKEN)
    if len(spool.digests) < 2:
        raise ValueError(
            f"the corpus has {len(spool.digests)} distinct non-blank document(s), and at least 2 are "
            "needed, one of them held out for validation: give more data.files, or cut text files with "
            "data.document=passage or line"
        )
    validation = held_out(spool.digests, spool.characters, recipe.validation_fraction)
    with parallel_tokenizers():
        training = [index for index, is_held_out in enumerate(validation) if not is_held_out]
        every = math.ceil(spool.ends[-1] / BPE_TRAINING_BYTES)
        encoder = make_encoder(recipe, spool.texts(training[::every]), folder / "tokenizer")
        written = _write_tokens(spool, validation, encoder, recipe.max_tokens, folder)
    text_file.unlink()
    documents = written.pop("documents")
    meta = {
        "sources": source.versions(),
        "recipe": recipe.fingerprint(),
        "vocab_size": encoder.vocabulary,
        "domains": list(spool.names),
        "documents": len(documents),
        "validation_documents": sum(validation),
        "characters": sum(spool.characters[index] for index in documents),
        **written,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _write_tokens(
    spool: Spool, validation: Sequence[bool], encoder: Encoder, max_tokens: int, folder: Path
) -> dict[str, Any]:
    """Write tokens and the table of documents; the training document that reaches `max_tokens` is cut."""
    dtype = np.dtype(np.uint16 if encoder.vocabulary <= 1 << 16 else np.uint32)
    room = max_tokens or math.inf  # for training tokens
    validation_tokens = 0
    kept: list[int] = []
    offsets = array("q", [0])
    text_digest, token_digest = hashlib.sha256(), hashlib.sha256()
    prompt = ""
    with (folder / "tokens.bin").open("wb") as file:
        for batch in spool.batches(range(len(spool.digests))):
            batch = [index for index in batch if validation[index] or room > 1]
            texts = list(spool.texts(batch))
            for index, text, ids in zip(batch, texts, encoder.encode(texts), strict=True):
                ids.append(encoder.eos)
                if not validation[index]:
                    if room < 2:  # a text token and end-of-text
                        continue
                    if len(ids) > room:
                        ids[int(room) - 1 :] = [encoder.eos]
                    room -= len(ids)
                else:
                    validation_tokens += len(ids)
                    prompt = prompt or text.strip().splitlines()[0][:PROMPT_CHARACTERS]
                kept.append(index)
                offsets.append(offsets[-1] + len(ids))
                data = np.array(ids, dtype=dtype).tobytes()
                token_digest.update(data)
                text_digest.update(text.encode("utf-8"))
                file.write(data)
    table: dict[str, Array] = {
        "offsets": np.array(offsets, dtype=np.int64),
        "domains": np.array([spool.domains[index] for index in kept], dtype=np.int32),
        "held_out": np.array([validation[index] for index in kept], dtype=np.bool_),
    }
    for name, values in table.items():
        token_digest.update(values.tobytes())
        np.save(folder / f"{name}.npy", values)
    return {
        "documents": kept,
        "dtype": dtype.name,
        "prompt": prompt,
        "train_tokens": offsets[-1] - validation_tokens,
        "validation_tokens": validation_tokens,
        "text_sha256": text_digest.hexdigest(),
        "sha256": token_digest.hexdigest(),
    }
