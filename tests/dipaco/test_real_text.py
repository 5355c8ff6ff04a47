"""The shipped router on real text with known domains: what decides whether DiPaCo can beat DiLoCo."""

from __future__ import annotations

import importlib
import json
import random
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from diloco.data import Data
from diloco.sources import Botocore
from dipaco.workload import RoutedLM

DOCUMENTS = 250  # of each domain
CHARACTERS = 1_000


def python_packages() -> dict[str, str]:
    """The language reference and the source of three packages of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {
        name: "\n".join(path.read_text("utf-8", "replace") for path in sorted((root / name).glob("*.py")))
        for name in ("asyncio", "email", "encodings")
    }
    try:
        return {"topics": "\n".join(importlib.import_module("pydoc_data.topics").topics.values()), **texts}
    except ImportError:  # some distributions leave it out
        return texts


def services() -> dict[str, str]:
    try:
        metadata.version("botocore")
    except metadata.PackageNotFoundError:
        pytest.skip("botocore is not installed")
    texts: dict[str, str] = {}
    for document in Botocore().documents():
        if document.domain in ("s3", "sagemaker", "rds", "ec2"):
            texts[document.domain] = texts.get(document.domain, "") + document.text + "\n"
    return texts


@pytest.mark.parametrize("read", [python_packages, services])
def test_purity_of_the_shipped_router(read: Any, tmp_path: Path) -> None:
    choice = random.Random(0)
    rows = []
    texts = read()
    for domain, text in texts.items():
        pieces = [text[start : start + CHARACTERS] for start in range(0, len(text) - CHARACTERS, CHARACTERS)]
        rows += [{"text": piece, "domain": domain} for piece in choice.sample(pieces, min(DOCUMENTS, len(pieces)))]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = Data(
        files=str(tmp_path / "text.jsonl"), domain_field="domain", cache=str(tmp_path / "cache"),
        sequence_length=64, validation_fraction=0.2,
    )  # fmt: skip
    found: Any = RoutedLM(paths=len(texts)).corpus(data, seed=0, shards=len(texts)).describe()["routing"]
    assert found["training"]["purity"] >= 0.75 and found["validation"]["purity"] >= 0.75
    # k-means on the prefix alone, as in arXiv:2403.10616, does worse on so few tokens.
    paper = RoutedLM(paths=len(texts), document_tokens=0, balance=1.5)
    prefix: Any = paper.corpus(data, seed=0, shards=len(texts)).describe()["routing"]
    assert prefix["training"]["purity"] < found["training"]["purity"] - 0.05
    print(found["training"]["purity"], found["validation"]["purity"], prefix["training"]["purity"])
