"""Corpora -> token shards on disk, in a deterministic order: position is an argument, not hidden state."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from diloco import prompts
from diloco.dealing import Epochs, ShardSplit, deal, spread
from diloco.files import DocumentUnit, Files, Hub, Row
from diloco.sources import Botocore, PythonDocs, Source
from diloco.tokens import Array, TokenFolder, Windows, prepare
from diloco.vocabulary import MIN_BPE_VOCABULARY, Recipe

DEFAULT_VOCAB_SIZE = 4096  # of a trained tokenizer, where no workload derived another
CORPORA: dict[str, Source] = {"python_docs": PythonDocs(), "botocore": Botocore()}


@dataclass(kw_only=True)
class Data:
    """What is trained on and how it is cut: the configuration group `data`. 0 and "" mean: derive it."""

    corpus: str = "python_docs"  # or botocore
    files: Any = field(default_factory=list)  # a path or glob, or a list of them; replaces `corpus`
    hub: str = ""  # a hub dataset, streamed once into the cache; replaces `corpus`
    hub_config: str = ""
    hub_split: str = "train"
    text_field: str = "text"  # of .jsonl, .json, .parquet and hub rows
    domain_field: str = ""  # of the same; without it, each file is a domain
    document: DocumentUnit = DocumentUnit.passage  # how plain text files are cut
    prompt_words: int = 0  # rows of prompts are made of documents: that many words of each paragraph; 0 = none are
    tokenizer: str = ""  # bpe, bytes, a folder or a hub id; "" = bpe for a new model, else the model's own
    vocab_size: int = 0  # of bpe; 0 = the model's
    batch: int = 8  # sequences a step, per island
    accumulation: int = 1  # parts that a batch is cut into to save memory
    sequence_length: int = 128  # tokens
    max_tokens: int = 0  # of the training documents; 0 = no limit
    validation_fraction: float = 0.05  # of the characters, in whole documents
    eval_sequences: int = 64  # at most
    split: ShardSplit = ShardSplit.iid
    cache: str = "~/.cache/diloco"

    def __post_init__(self) -> None:
        patterns = [self.files] if isinstance(self.files, str) else self.files
        if not isinstance(patterns, list | tuple) or not all(isinstance(item, str) and item for item in patterns):
            raise ValueError(f"data.files={self.files!r}: give a path or glob, or a list of them")
        # Workers may start in another folder, and the record of a run should hold wherever it is read.
        self.files = [os.path.abspath(os.path.expanduser(pattern)) for pattern in patterns]
        if os.path.isdir(os.path.expanduser(self.tokenizer)):
            self.tokenizer = os.path.abspath(os.path.expanduser(self.tokenizer))
        if self.files and self.hub:
            raise ValueError(f"data.files={self.files} and data.hub={self.hub} are both given: choose one")
        if self.corpus not in CORPORA:
            raise ValueError(
                f"data.corpus={self.corpus} is unknown: choose {', '.join(CORPORA)}, or give data.files or data.hub"
            )
        for name, least in (
            ("batch", 1),
            ("accumulation", 1),
            ("sequence_length", 1),
            ("eval_sequences", 1),
            ("max_tokens", 0),
            ("prompt_words", 0),
            ("vocab_size", 0),
        ):
            given = vars(self)[name]
            if given < least:
                raise ValueError(f"data.{name}={given}: it must be at least {least}")
        if self.batch % self.accumulation:
            raise ValueError(
                f"data.accumulation={self.accumulation} does not divide data.batch={self.batch}: change one of them"
            )
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction={self.validation_fraction}: it must be between 0 and 1")
        if self.tokenizer in ("", "bpe") and 0 < self.vocab_size < MIN_BPE_VOCABULARY:
            raise ValueError(
                f"data.vocab_size={self.vocab_size}: a byte-level BPE has at least {MIN_BPE_VOCABULARY} "
                "tokens (256 bytes and end-of-text)"
            )

    def source(self) -> Source:
        """Where the documents come from."""
        if self.files:
            return Files(
                patterns=self.files,
                text_field=self.text_field,
                domain_field=self.domain_field,
                unit=self.document,
            )
        if self.hub:
            return Hub(
                name=self.hub,
                config=self.hub_config,
                split=self.hub_split,
                text_field=self.text_field,
                domain_field=self.domain_field,
            )
        return CORPORA[self.corpus]

    def rows(self) -> Iterator[Row]:
        """Rows of several columns, or made of documents. ValueError where there are only documents to be had."""
        source = self.source()
        if self.prompt_words:
            return prompts.rows_of(source.documents(), self.prompt_words)
        if not isinstance(source, Files | Hub):
            raise ValueError(
                f"data.corpus={self.corpus} has documents, and this workload needs rows of prompts: give data.files "
                "(.jsonl, .json, .parquet) or data.hub; data.prompt_words=8 cuts prompts and completions from documents"
            )
        return source.rows()

    def recipe(self, *, trust_remote_code: bool = False) -> Recipe:
        """How the documents become tokens."""
        tokenizer = self.tokenizer or "bpe"
        return Recipe(
            tokenizer=tokenizer,
            vocab_size=(self.vocab_size or DEFAULT_VOCAB_SIZE) if tokenizer == "bpe" else 0,
            max_tokens=self.max_tokens,
            validation_fraction=self.validation_fraction,
            trust_remote_code=trust_remote_code,
        )


def prepared(data: Data, *, trust_remote_code: bool = False) -> TokenFolder:
    """The corpus as tokens: from the cache, or made and put there. Several processes may call it at once."""
    source, recipe = data.source(), data.recipe(trust_remote_code=trust_remote_code)
    key = json.dumps([source.versions(), recipe.fingerprint()], sort_keys=True)
    corpora = Path(data.cache).expanduser().absolute() / "corpora"
    final = corpora / hashlib.sha256(key.encode()).hexdigest()[:20]
    make_once(final, lambda folder: prepare(source, recipe, folder))
    return TokenFolder.open(final)


def make_once(final: Path, make: Callable[[Path], None]) -> None:
    """Let `make` fill the folder `final`, unless it is there: complete or not at all, whoever else asks for it.

    Raises ValueError where the folder above it, in `data.cache`, cannot be written.
    """
    if final.exists():
        return
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=final.parent, prefix=".making-"))
    except OSError as error:
        raise ValueError(f"data.cache={final.parents[1]} cannot be written ({error}): choose another folder") from error
    try:
        make(made)
        os.chmod(made, 0o755)  # mkdtemp's 0o700 would shut others out of a shared cache
        _publish(made, final)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _publish(made: Path, final: Path) -> None:
    """Give the complete folder its name, unless another process was faster: theirs holds the same."""
    try:
        made.rename(final)
    except OSError:
        if not final.is_dir():
            raise


class TokenCorpus:
    """Prepared data of a language model: documents dealt to shards, and others held out.

    Reading changes nothing but a cache, so any number of instances and threads may share a process.
    `data.split` deals the training documents to shards; validation documents are in no shard.
    """

    def __init__(
        self,
        data: Data,
        *,
        seed: int,
        shards: int,
        trust_remote_code: bool = False,
        assignment: list[Array] | None = None,
    ) -> None:
        """Prepare or open the corpus. ValueError where `data` or the number of `shards` cannot be used.

        `assignment`, int64[documents] for each shard, stands in for the dealing by `data.split`.
        """
        if shards < 1:
            raise ValueError(f"{shards} shards: there must be at least 1")
        self.data = data
        self.folder = prepared(data, trust_remote_code=trust_remote_code)
        self._epochs = Epochs(seed)
        if assignment is None:
            assignment = deal(self.folder, data.split, seed=seed, shards=shards)
        assert len(assignment) == shards
        self.assignment = assignment  # shard -> its documents
        self._shards = [Windows(self.folder, documents, data.sequence_length) for documents in self.assignment]
        for shard, windows in enumerate(self._shards):
            if windows.count == 0:
                raise ValueError(
                    f"shard {shard} of {shards} holds {windows.tokens} tokens, fewer than one sequence needs "
                    f"(data.sequence_length={data.sequence_length} and one): use fewer islands, shorter "
                    "sequences or more data"
                )
        self._validation = Windows(self.folder, np.flatnonzero(self.folder.held_out), data.sequence_length)
        if self._validation.count == 0:
            raise ValueError(
                f"the validation documents hold {self._validation.tokens} tokens, fewer than one sequence "
                f"needs (data.sequence_length={data.sequence_length} and one): raise "
                f"data.validation_fraction={data.validation_fraction}, or use shorter sequences or more data"
            )

    @property
    def sha256(self) -> str:
        """Digest of all tokens, training and validation, and of which documents they make up."""
        return str(self.folder.meta["sha256"])

    @property
    def tokenizer_folder(self) -> Path:
        """What AutoTokenizer.from_pretrained loads."""
        return self.folder.tokenizer

    @property
    def vocab_size(self) -> int:
        """All token ids are below it."""
        return int(self.folder.meta["vocab_size"])

    def shard_examples(self) -> list[int]:
        """How many sequences an epoch of each shard has, by shard id."""
        return [windows.count for windows in self._shards]

    def sequences(self, shard: int, *, first: int, count: int) -> Tensor:
        """int64[count, sequence_length + 1]: places `first` to `first + count` in the shard's endless order.

        Each epoch is a permutation of all the shard's sequences; a pure function of the arguments.
        """
        windows = self._shards[shard]
        return windows.gather(self._epochs.indices(shard, windows.count, first=first, count=count))

    def validation(self) -> Tensor:
        """int64[at most eval_sequences, sequence_length + 1], spread evenly over the validation documents."""
        return self._validation.gather(spread(self._validation.count, self.data.eval_sequences))

    def prompt(self) -> str:
        """How the first validation document begins: something to let the model go on with."""
        return str(self.folder.meta["prompt"])

    def describe(self) -> dict[str, object]:
        """JSON values for the run's record: sources and their versions, documents, tokens."""
        meta = self.folder.meta
        return {
            **{key: value for key, value in meta.items() if key not in ("domains", "prompt")},
            "domains": len(meta["domains"]),
            "split": self.data.split.value,
            "shard_documents": [len(documents) for documents in self.assignment],
            "shard_tokens": [windows.tokens for windows in self._shards],
        }
