"""Documents of the user's own: text, .jsonl, .json and .parquet files, and datasets of a hub."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from diloco.sources import Document, Source, passages

TABULAR = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # suffix -> builder of `datasets`


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table, and where it is, for who has to mend it."""

    place: str  # such as pairs.jsonl: row 17
    values: Mapping[str, Any]
    made: bool = False  # of a document, by rule: nobody could mend it


class DocumentUnit(Enum):
    """How a plain text file is cut into documents. A row of .jsonl, .json or .parquet is one as it is."""

    passage = "passage"  # paragraphs between blank lines, joined up to 2,000 characters
    file = "file"
    line = "line"


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """Text, .jsonl, .json and .parquet files. Without `domain_field`, each file is a domain."""

    patterns: Sequence[str]  # paths or globs
    text_field: str
    domain_field: str
    unit: DocumentUnit

    def versions(self) -> dict[str, object]:
        """Paths, sizes and times of change of the files, and how they are read."""
        stats = [(path, path.stat()) for path in self._paths()]
        return {
            "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
            "text_field": self.text_field,
            "domain_field": self.domain_field,
            "document": self.unit.value,
        }

    def documents(self) -> Iterator[Document]:
        """File after file, rows or pieces of text; ValueError for a file without a document."""
        for path in self._paths():
            found = False
            for document in self._rows(path) if path.suffix in TABULAR else self._pieces(path):
                found = found or bool(document.text.strip())
                yield document
            if not found:
                raise ValueError(f"data.files: {path} holds no text: take it out of the list")

    def rows(self) -> Iterator[Row]:
        """All rows, file by file. Raises ValueError for a file that has none."""
        for path in self._paths():
            if path.suffix not in TABULAR:
                raise ValueError(f"data.files: {path} has no rows: give {', '.join(TABULAR)} files")
            yield from _numbered(self._table(path), str(path))

    def _paths(self) -> list[Path]:
        paths: dict[Path, None] = {}
        for pattern in self.patterns:
            path = Path(pattern)
            if path.is_dir():
                raise ValueError(f"data.files: {pattern} is a folder: name files in it, such as '{pattern}/**/*.txt'")
            matches = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
            files = [match for match in matches if match.is_file()]
            if not files:
                raise ValueError(
                    f"data.files: there is no file {pattern}: check the path (a glob such as '*.txt' is fine)"
                )
            paths.update(dict.fromkeys(files))
        for path in paths:
            if path.stat().st_size == 0:
                raise ValueError(f"data.files: {path} is empty: take it out of the list")
        return list(paths)

    def _rows(self, path: Path) -> Iterator[Document]:
        yield from _documents(self._table(path), str(path), self.text_field, self.domain_field)

    def _table(self, path: Path) -> Iterator[Mapping[str, Any]]:
        def load() -> Iterable[Mapping[str, Any]]:
            return _load_dataset(TABULAR[path.suffix], None, split="train", data_files=glob.escape(str(path)))

        return _guarded(load, f"data.files: {path} cannot be read as {path.suffix[1:]}")

    def _pieces(self, path: Path) -> Iterator[Document]:
        if self.domain_field:
            raise ValueError(
                f"data.domain_field={self.domain_field} needs .jsonl, .json or .parquet files, and {path} is "
                "read as plain text: leave it empty, and each file is a domain"
            )
        with path.open(encoding="utf-8-sig") as file:
            lines = _text_lines(file, path)
            if self.unit is DocumentUnit.file:
                yield Document("".join(lines), str(path))
            elif self.unit is DocumentUnit.line:
                yield from (Document(line.rstrip("\n"), str(path)) for line in lines)
            else:
                yield from (Document(text, str(path)) for text in passages(_paragraphs(lines), "\n\n"))


@dataclass(frozen=True, kw_only=True)
class Hub(Source):
    """A dataset of the Hugging Face hub (or a local folder in its format), streamed."""

    name: str
    config: str
    split: str
    text_field: str
    domain_field: str

    def versions(self) -> dict[str, object]:
        """The dataset's names, the fields that are read, and the version of `datasets`."""
        fields = {"hub": self.name, "hub_config": self.config, "hub_split": self.split}
        return {
            **fields,
            "text_field": self.text_field,
            "domain_field": self.domain_field,
            "datasets": metadata.version("datasets"),
        }

    def documents(self) -> Iterator[Document]:
        """One a row, with the text and the domain of its fields."""
        yield from _documents(self._table(), self.name, self.text_field, self.domain_field)

    def rows(self) -> Iterator[Row]:
        """All rows."""
        yield from _numbered(self._table(), self.name)

    def _table(self) -> Iterator[Mapping[str, Any]]:
        def load() -> Iterable[Mapping[str, Any]]:
            return _load_dataset(self.name, self.config or None, split=self.split, data_files=None)

        return _guarded(
            load,
            f"data.hub={self.name} ({self.config or 'default'}, {self.split}) cannot be read: check the "
            "three names and the network, or use data.files or data.corpus",
        )


def _load_dataset(name: str, config: str | None, *, split: str, data_files: str | None) -> Iterable[Mapping[str, Any]]:
    """Rows of a dataset, streamed, so that nothing is copied to a cache of its own."""
    import datasets  # heavy, and needed for some sources only

    rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
        name, config, split=split, data_files=data_files, streaming=True
    )
    return rows


def _guarded(load: Callable[[], Iterable[Mapping[str, Any]]], problem: str) -> Iterator[Mapping[str, Any]]:
    """The rows of `load()`; whatever it raises on the way becomes a ValueError that begins with `problem`."""
    try:
        yield from load()
    except Exception as error:  # readers raise errors of five libraries; the cause is kept in the message and the chain
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ValueError(f"{problem} ({reason})") from error


def _numbered(rows: Iterable[Mapping[str, Any]], origin: str) -> Iterator[Row]:
    return (Row(place=f"{origin}: row {number}", values=row) for number, row in enumerate(rows, start=1))


def _documents(
    rows: Iterable[Mapping[str, Any]], origin: str, text_field: str, domain_field: str
) -> Iterator[Document]:
    for number, row in enumerate(rows, start=1):
        present = f"its fields: {', '.join(key for key, value in row.items() if value is not None) or 'none'}"
        if not isinstance(row.get(text_field), str):
            raise ValueError(
                f"{origin}: row {number} has no text in the field {text_field!r} ({present}): mend the "
                "row, or set data.text_field"
            )
        if domain_field and row.get(domain_field) is None:
            raise ValueError(
                f"{origin}: row {number} has no value in the field {domain_field!r} ({present}): mend the "
                "row, or set data.domain_field"
            )
        yield Document(row[text_field], str(row[domain_field]) if domain_field else origin)


def _text_lines(lines: Iterable[str], path: Path) -> Iterator[str]:
    """`lines` as they are, refusing what is no text."""
    problem = f"data.files: {path} is not a UTF-8 text file: convert it to UTF-8 text, .jsonl or .parquet"
    try:
        for line in lines:
            if "\0" in line:
                raise ValueError(f"{problem} (it has NUL bytes)")
            yield line
    except UnicodeDecodeError as error:
        raise ValueError(f"{problem} ({error})") from error


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    for blank, group in groupby(lines, key=lambda line: not line.strip()):
        if not blank:
            yield "".join(group).rstrip()
