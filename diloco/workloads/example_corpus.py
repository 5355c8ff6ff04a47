"""The rows that a run is trained on, dealt to shards and held out, for all workloads of prompts and completions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from diloco import pretrained
from diloco.data import Data, make_once
from diloco.dealing import Epochs, deal, spread
from diloco.examples import FORMAT, Example, ExampleFolder, prepare_examples
from diloco.tokens import Array
from diloco.workloads import conversations
from diloco.workloads.completions import Marked, bins
from diloco.workloads.conversations import Render
from diloco.workloads.language import LanguageModel

Reader: TypeAlias = Callable[
    ..., Iterator[Example]
]  # of conversations: rows, a template and a domain field -> examples


class ExampleCorpus:
    """Prepared rows. Reading changes nothing but a cache, so any number of instances and threads may share a process.

    `units` of a shard are what an inner step takes some of: rows, or sequences that several are packed into.
    """

    def __init__(
        self,
        data: Data,
        language: LanguageModel,
        reader: Reader,
        *,
        seed: int,
        shards: int,
        packing: bool = False,
    ) -> None:
        """Prepare or open the corpus, with the model's tokenizer where `data` names none.

        Raises ValueError where rows, tokenizer or length do not fit the model, or cannot fill the `shards`.
        """
        self.data = data = language.fitted(data)
        self._trust_remote_code = language.trust_remote_code
        self.examples = prepared_examples(data, reader, trust_remote_code=language.trust_remote_code)
        self.folder = self.examples.rows
        language.check_vocabulary(data.tokenizer, self.vocab_size)
        self.assignment = deal(self.folder, data.split, seed=seed, shards=shards)
        sizes = np.diff(self.folder.offsets)
        room = data.sequence_length + 1
        self._units: list[list[list[int]]] = []  # shard -> unit -> rows
        for number, rows in enumerate(self.assignment):
            if packing:
                order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2, number))).permutation(rows)
                self._units.append([order[unit].tolist() for unit in bins(sizes[order], room=room)])
            else:
                self._units.append([[row] for row in rows.tolist()])
        self.seed, self._epochs = seed, Epochs(seed)
        self.reference: Array | None = None  # float32[rows, texts]: what a workload measures likelihoods against
        available = np.flatnonzero(self.folder.held_out)
        self.validation_rows: Array = available[spread(len(available), data.eval_sequences)]

    @property
    def sha256(self) -> str:
        """Digest of all tokens and targets, training and validation."""
        return str(self.folder.meta["sha256"])

    @property
    def tokenizer_folder(self) -> Path:
        """What AutoTokenizer.from_pretrained loads."""
        return self.folder.tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        """It, loaded once."""
        from transformers import AutoTokenizer

        return pretrained.load(AutoTokenizer, self.tokenizer_folder, trust_remote_code=self._trust_remote_code)

    @property
    def vocab_size(self) -> int:
        """All token ids are below it."""
        return int(self.folder.meta["vocab_size"])

    def shard_examples(self) -> list[int]:
        """How many units an epoch of each shard has, by shard id."""
        return [len(units) for units in self._units]

    def units(self, shard: int, *, first: int, count: int) -> list[list[int]]:
        """The rows of the units at places `first` to `first + count` of the shard's endless order."""
        own = self._units[shard]
        return [own[index] for index in self._epochs.indices(shard, len(own), first=first, count=count).tolist()]

    def text(self, row: int, index: int = 0) -> Marked:
        """Tokens of a row's text, and which of them are targets."""
        return self.examples.text(row, index)

    def prompt(self, row: int) -> str:
        """What a row's text begins with, up to its first target."""
        tokens, targets = self.text(row)
        before = int(targets.argmax()) if targets.any() else len(tokens)
        return str(self.tokenizer.decode(tokens[:before].tolist(), skip_special_tokens=True))

    def columns(self, row: int) -> dict[str, Any]:
        """All columns of a row, where the reader keeps them."""
        return dict(json.loads(self.examples.columns[row])) if self.examples.columns else {}

    def asked(self, prompt: str) -> str:
        """`prompt` as the rows have theirs, by the chat template if they are chats; empty, the first row's own."""
        if not prompt:
            return str(self.folder.meta["prompt"])
        render = template_of(str(self.tokenizer_folder), trust_remote_code=False)
        if not self.folder.meta["chats"] or render is None:
            return prompt
        return render([{"role": "user", "content": prompt}], True)

    def warnings(self) -> list[str]:
        """What was cut."""
        cut = int(self.folder.meta["cut_completions"])
        if not cut:
            return []
        return [
            f"{cut} completions were cut at data.sequence_length={self.data.sequence_length}: raise it to train on all"
        ]

    def describe(self) -> dict[str, object]:
        """JSON values for the run's record: sources and their versions, rows, tokens."""
        meta = self.folder.meta
        return {
            **{key: value for key, value in meta.items() if key not in ("domains", "prompt")},
            "domains": len(meta["domains"]),
            "split": self.data.split.value,
            "shard_rows": [len(rows) for rows in self.assignment],
            "shard_sequences": self.shard_examples(),
        }


def prepared_examples(data: Data, reader: Reader, *, trust_remote_code: bool) -> ExampleFolder:
    """The rows as tokens: from the cache, or made and put there. Several processes may call it at once."""
    if data.tokenizer == "bpe":
        raise ValueError(
            "data.tokenizer=bpe is trained on documents, and these are rows: start from a model that was trained before"
            " (workload.model=RUN/export), whose tokenizer is then used, or use data.tokenizer=bytes"
        )
    if data.prompt_words and reader not in (conversations.completions, conversations.prompts):
        raise ValueError(
            f"data.prompt_words={data.prompt_words} makes prompts with completions; this workload needs more columns:"
            " leave it out, and give data.files with rows (diloco pairs makes some)"
        )
    source, recipe = data.source(), data.recipe(trust_remote_code=trust_remote_code)
    about = {"format": FORMAT, "rows": reader.__name__, "length": data.sequence_length, "sources": source.versions()}
    key = json.dumps([about, data.domain_field, data.prompt_words, recipe.fingerprint()], sort_keys=True)
    final = Path(data.cache).expanduser().absolute() / "examples" / hashlib.sha256(key.encode()).hexdigest()[:20]

    def make(folder: Path) -> None:
        render = template_of(recipe.tokenizer, trust_remote_code=trust_remote_code)
        examples = reader(data.rows(), render, domain_field="" if data.prompt_words else data.domain_field)
        prepare_examples(examples, recipe, folder, length=data.sequence_length, meta=about)

    make_once(final, make)
    return ExampleFolder.open(final)


def template_of(tokenizer: str, *, trust_remote_code: bool) -> Render | None:
    """The chat template of the tokenizer in this folder or of this hub id; None where it has none."""
    if tokenizer == "bytes":
        return None
    from transformers import AutoTokenizer

    try:
        found: Any = pretrained.load(AutoTokenizer, tokenizer, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None  # the reason is told where the tokenizer is needed
    if not found.chat_template:
        return None
    return lambda messages, opens: str(
        found.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opens)
    )
