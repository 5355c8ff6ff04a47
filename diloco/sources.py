"""Where documents come from: the abstract source, and the corpora that packages carry."""

from __future__ import annotations

import gzip
import html
import importlib
import json
import os
import re
import sys
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PASSAGE_CHARACTERS = 2_000
TABULAR = {
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}  # suffix -> builder of the `datasets` library
SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__")
)


@dataclass(frozen=True)
class Document:
    """One text that is trained on or held out as a whole."""

    text: str
    domain: str  # what kind of text it is; a source that does not know gives all its documents the same


class Source(ABC):
    """Something that documents can be read from."""

    @abstractmethod
    def versions(self) -> dict[str, object]:
        """JSON values that change when the documents change. ValueError where there is nothing to read."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """All documents, in an order that does not change. Raises ValueError at one that cannot be read."""


@dataclass(frozen=True)
class PythonDocs(Source):
    """The language reference (`pydoc_data.topics`) and the standard library's source of this Python."""

    def versions(self) -> dict[str, object]:
        """That of Python."""
        return {"corpus": "python_docs", "python": sys.version}

    def documents(self) -> Iterator[Document]:
        """The topics of the language reference, if they are installed, then the library's modules."""
        try:
            topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
        except ImportError:  # some distributions leave it out; the library's source is most of the corpus
            topics = {}
        for _, text in sorted(topics.items()):
            yield Document(text, "topics")
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in _modules(root):
            try:
                with tokenize.open(path) as file:  # honours the encoding that the module declares
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):  # a few modules are samples of broken encodings
                continue
            yield Document(text, path.relative_to(root).parts[0].removesuffix(".py"))


def _modules(root: Path) -> Iterator[Path]:
    """Every .py file below `root` that is neither a test nor an installed package, in order of path."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


@dataclass(frozen=True)
class Botocore(Source):
    """The documentation of the AWS APIs in the package botocore: English prose, one domain a service."""

    def versions(self) -> dict[str, object]:
        """That of botocore; ValueError where it is not installed."""
        try:
            return {"corpus": "botocore", "botocore": metadata.version("botocore")}
        except metadata.PackageNotFoundError as error:
            raise ValueError(
                "data.corpus=botocore needs the package botocore: pip install botocore, or choose "
                "data.corpus=python_docs"
            ) from error

    def documents(self) -> Iterator[Document]:
        """Passages of each service's newest description, with the service as their domain."""
        root = Path(str(metadata.distribution("botocore").locate_file("botocore/data")))
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            models = sorted(
                folder.glob("*/service-2.json.gz")
            )  # folders are API versions: dates, so the last is newest
            if models:
                described = _descriptions(json.loads(gzip.decompress(models[-1].read_bytes())))
                for text in passages(described, "\n"):
                    yield Document(text, folder.name)


def _descriptions(model: object) -> Iterator[str]:
    """Every distinct `documentation` text in an API model, without its HTML."""
    stack, seen = [model], {""}
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            if isinstance(node.get("documentation"), str):
                text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", node["documentation"])).split())
                if text not in seen:
                    seen.add(text)
                    yield text
            stack += node.values()
        elif isinstance(node, list):
            stack += node


def passages(paragraphs: Iterable[str], separator: str) -> Iterator[str]:
    """Consecutive paragraphs joined up to 2,000 characters; a longer one stays whole."""
    parts: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if parts and size + len(separator) + len(paragraph) > PASSAGE_CHARACTERS:
            yield separator.join(parts)
            parts, size = [], 0
        size += len(paragraph) + (len(separator) if parts else 0)
        parts.append(paragraph)
    if parts:
        yield separator.join(parts)
