"""Documents -> rows with a prompt and what follows it, for workloads on rows where only texts are at hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from diloco.files import Row
from diloco.sources import Document

LEAST_WORDS = 4  # that are left to be written
PROSE = re.compile(r"[A-Z][^{}=<>\\|_`*]*[.!?]")  # sentences, rather than code, tables or headings


def rows_of(documents: Iterable[Document], words: int) -> Iterator[Row]:
    """A row for each paragraph of prose, spaces and line ends as single spaces.

    Its first `words` words are the prompt, the others the completion; fewer than `LEAST_WORDS` of these are left out.
    """
    number = 0
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document.text):
            found = paragraph.split()
            if len(found) < words + LEAST_WORDS or not PROSE.fullmatch(" ".join(found)):
                continue
            number += 1
            prompt, completion = " ".join(found[:words]), " " + " ".join(found[words:])
            values = {"prompt": prompt, "completion": completion}
            yield Row(place=f"{document.domain}: row {number}", values=values, made=True)
