"""Text with known domains, small enough for every test."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from diloco.data import Data

WORDS = {
    "trees": "ash birch cedar elm fir hazel larch maple oak pine rowan spruce willow yew".split(),
    "metals": "iron copper zinc nickel tin lead silver gold cobalt chrome mercury bronze".split(),
    "birds": "crow finch gull heron jay kite lark owl plover quail robin stork swan wren".split(),
    "tools": "adze awl chisel drill file gouge hammer jig knife lathe mallet plane saw vice".split(),
}
COMMON = "the of and to in is it that for with as was on are".split()


def text(domain: str, choice: random.Random, words: int) -> str:
    """Two words in three are everybody's."""
    return " ".join(choice.choice(WORDS[domain] if choice.random() < 0.5 else COMMON) for _ in range(words))


def write(folder: Path, *, documents: int = 60, words: int = 40) -> Path:
    """A .jsonl file: so many documents of each domain, mixed."""
    choice = random.Random(0)
    rows = [{"text": text(domain, choice, words), "domain": domain} for domain in WORDS for _ in range(documents)]
    choice.shuffle(rows)
    path = folder / "planted.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def data(folder: Path, **settings: Any) -> Data:
    """The corpus of `write(folder)`, in bytes."""
    given: dict[str, Any] = {
        "files": str(folder / "planted.jsonl"), "domain_field": "domain", "cache": str(folder / "cache"),
        "tokenizer": "bytes", "batch": 4, "sequence_length": 32, "eval_sequences": 24, "validation_fraction": 0.2,
    }  # fmt: skip
    return Data(**{**given, **settings})
