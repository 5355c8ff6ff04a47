"""Rows of prompts and completions -> a folder with their tokens, memory-mapped, and which of them are targets."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from diloco import pretrained
from diloco.tokens import Array, TokenFolder, held_out
from diloco.vocabulary import Recipe, make_encoder, parallel_tokenizers

ROWS_AT_ONCE = 1_000  # that are tokenised together
FORMAT = 2  # of prepared folders


@dataclass(frozen=True)
class Piece:
    """A part of a text that is context only, or that the model is to write."""

    text: str
    target: bool
    special: bool = False  # whether names of special tokens in it are such tokens, as a chat template writes them


Text: TypeAlias = Sequence[Piece]  # pieces one after the other


@dataclass(frozen=True, kw_only=True)
class Example:
    """A row: one text, or several with the same prompt, such as a better and a worse completion."""

    place: str  # of the row, for who has to mend it
    texts: Sequence[Text]
    domain: str = ""
    ends: bool = True  # whether end-of-text is added, which a chat template has done already
    made: bool = False  # of a document: left out, rather than refused, where its prompt is too long
    columns: str = ""  # of the row, as JSON, for who has to know more than its texts

    @property
    def prompt(self) -> str:
        """What comes before the first target: rows that share it are held out together."""
        return "".join(piece.text for piece in self.texts[0] if not piece.target)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleFolder:
    """Prepared rows, opened."""

    rows: TokenFolder  # in which a "document" is a row, with all its texts
    targets: Array  # bool[tokens], memory-mapped: whether the model is to write this token
    offsets: Array  # int64[texts + 1]: text i is tokens[offsets[i]:offsets[i + 1]]
    width: int  # texts a row
    columns: list[str]  # of each row, as JSON; empty where nobody asked for them

    @classmethod
    def open(cls, folder: Path) -> ExampleFolder:
        """Map the folder that `prepare_examples` wrote."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
        targets = np.memmap(folder / "targets.bin", dtype=np.bool_, mode="r")
        offsets = np.load(folder / "offsets.npy")
        rows = TokenFolder(
            folder=folder,
            tokens=np.asarray(tokens),
            offsets=offsets[:: meta["width"]],
            domains=np.load(folder / "domains.npy"),
            held_out=np.load(folder / "held_out.npy"),
            meta=meta,
        )
        columns = (folder / "columns.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return cls(rows=rows, targets=np.asarray(targets), offsets=offsets, width=meta["width"], columns=columns)

    def text(self, row: int, index: int) -> tuple[Array, Array]:
        """Tokens and targets of a row's text: read-only."""
        start, stop = self.offsets[row * self.width + index : row * self.width + index + 2]
        return self.rows.tokens[start:stop], self.targets[start:stop]


def prepare_examples(
    examples: Iterable[Example], recipe: Recipe, folder: Path, *, length: int, meta: dict[str, object]
) -> None:
    """Tokenise and write everything that `ExampleFolder.open` maps into the existing, empty `folder`.

    Texts have at most `length` + 1 tokens: longer completions are cut and counted. Raises ValueError where a prompt
    leaves a completion no room, or where fewer than two rows are left; the message tells the row.
    """
    with parallel_tokenizers():
        encoder = make_encoder(recipe, (), folder / "tokenizer")
        encoded = _encoded(examples, folder / "tokenizer", encoder.eos)
        table = _write(encoded, folder, length=length, vocabulary=encoder.vocabulary)
    if len(table.domains) < 2:
        raise ValueError(
            f"the data has {len(table.domains)} row(s), and at least 2 are needed, one of them held out for validation:"
            " give more data.files"
        )
    validation = _held_out_by_prompt(table, recipe.validation_fraction)
    offsets = np.array(table.offsets, dtype=np.int64)
    arrays: dict[str, Array] = {
        "offsets": offsets,
        "domains": np.array(table.domains, dtype=np.int32),
        "held_out": np.array(validation, dtype=np.bool_),
    }
    for name, values in arrays.items():
        table.digest.update(values.tobytes())
        np.save(folder / f"{name}.npy", values)
    (folder / "columns.jsonl").write_text("".join(f"{line}\n" for line in table.columns), encoding="utf-8")
    sizes = np.diff(offsets[:: table.width])
    written = {
        "recipe": recipe.fingerprint(),
        "vocab_size": encoder.vocabulary,
        "dtype": _dtype(encoder.vocabulary).name,
        "width": table.width,
        "domains": list(table.names),
        "rows": len(table.domains),
        "validation_rows": int(sum(validation)),
        "cut_completions": table.cut,
        "chats": table.chats,
        "train_tokens": int(sizes[~arrays["held_out"]].sum()),
        "validation_tokens": int(sizes[arrays["held_out"]].sum()),
        "prompt": table.first_prompt,
        "sha256": table.digest.hexdigest(),
    }
    (folder / "meta.json").write_text(json.dumps({**meta, **written}, indent=1), encoding="utf-8")


class _Table:
    """What is collected of the rows while their tokens are written."""

    def __init__(self) -> None:
        self.offsets = array("q", [0])
        self.domains = array("i")
        self.names: dict[str, int] = {}
        self.prompts: list[bytes] = []  # sha256 of each row's prompt, or of all of it where it has none
        self.characters: list[int] = []
        self.columns: list[str] = []
        self.width = 0
        self.cut = 0
        self.chats = False
        self.first_prompt = ""
        self.digest = hashlib.sha256()


def _encoded(
    examples: Iterable[Example], tokenizer_folder: Path, eos: int
) -> Iterator[tuple[Example, list[tuple[list[int], list[bool]]]]]:
    """Each row with tokens and targets of its texts."""
    from transformers import AutoTokenizer  # heavy

    tokenizer: Any = pretrained.load(AutoTokenizer, tokenizer_folder)
    iterator = iter(examples)
    while chunk := list(islice(iterator, ROWS_AT_ONCE)):
        pieces = [piece for example in chunk for text in example.texts for piece in text]
        ids: dict[Piece, list[int]] = {}
        for special in (False, True):
            own = list(dict.fromkeys(piece for piece in pieces if piece.special is special and piece.text))
            if own:
                told = [piece.text for piece in own]
                found = tokenizer(told, add_special_tokens=False, split_special_tokens=not special)["input_ids"]
                ids |= dict(zip(own, found, strict=True))
        for example in chunk:
            marked = []
            for text in example.texts:
                tokens = [token for piece in text for token in ids.get(piece, [])]
                targets = [piece.target for piece in text for _ in ids.get(piece, [])]
                if example.ends and text[-1].target:
                    tokens, targets = [*tokens, eos], [*targets, True]
                marked.append((tokens, targets))
            yield example, marked


def _write(
    encoded: Iterator[tuple[Example, list[tuple[list[int], list[bool]]]]], folder: Path, *, length: int, vocabulary: int
) -> _Table:
    table, dtype = _Table(), _dtype(vocabulary)
    with (folder / "tokens.bin").open("wb") as tokens_file, (folder / "targets.bin").open("wb") as targets_file:
        for example, texts in encoded:
            heads = [targets.index(True) if True in targets else len(targets) for _, targets in texts]
            if example.made and max(heads) > length:
                continue
            for before, (tokens, targets) in zip(heads, texts, strict=True):
                if before > length:
                    raise ValueError(
                        f"{example.place}: its prompt has {before} tokens, and data.sequence_length={length} leaves no "
                        "room for a completion: raise it, or take the row out"
                    )
                table.cut += len(tokens) > length + 1
                for values, file, kind in ((tokens, tokens_file, dtype), (targets, targets_file, np.dtype(np.bool_))):
                    data = np.array(values[: length + 1], dtype=kind).tobytes()
                    table.digest.update(data)
                    file.write(data)
                table.offsets.append(table.offsets[-1] + min(len(tokens), length + 1))
            whole = "".join(piece.text for text in example.texts for piece in text)
            table.first_prompt = table.first_prompt or example.prompt
            table.prompts.append(hashlib.sha256((example.prompt or whole).encode("utf-8", "replace")).digest())
            table.characters.append(len(whole))
            table.columns += [example.columns] if example.columns else []
            table.domains.append(table.names.setdefault(example.domain, len(table.names)))
            table.width = len(example.texts)
            table.chats = table.chats or not example.ends
    return table


def _held_out_by_prompt(table: _Table, fraction: float) -> list[bool]:
    """Which rows are for validation, by their prompts alone; all with one prompt go together."""
    characters: dict[bytes, int] = {}
    for prompt, size in zip(table.prompts, table.characters, strict=True):
        characters[prompt] = characters.get(prompt, 0) + size
    if len(characters) < 2:
        raise ValueError(
            "all rows have the same prompt, so that none can be held out for validation that training has not seen: "
            "give more data.files"
        )
    known = list(characters)
    chosen = dict(zip(known, held_out(known, list(characters.values()), fraction), strict=True))
    return [chosen[prompt] for prompt in table.prompts]


def _dtype(vocabulary: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.uint32)
