"""`diloco pairs`: the best and the worst of N answers to each prompt, as rows that a reward model can learn from."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from torch import nn

from diloco.workloads import judges
from diloco.workloads.example_corpus import ExampleCorpus
from diloco.workloads.fine_tuning import unwrapped
from diloco.workloads.generation import key_of
from diloco.workloads.online import Online
from diloco.workloads.rollouts import Rollouts, write
from experiments.entry import FINISHED
from experiments.trained import trained

PROMPTS_AT_ONCE = 8

Pair: TypeAlias = tuple[float, dict[str, str]]  # difference of the rewards, and a row: prompt, chosen, rejected


def make(arguments: argparse.Namespace) -> int:
    """Carry out the command: West-of-N (arXiv:2401.12086, section 3), with the margin of rewards as confidence.

    Returns the exit status. Raises ValueError for what cannot be done.
    """
    to: Path = arguments.to
    if to.exists() or to.suffix != ".jsonl":
        raise ValueError(f"--to {to}{' exists' if to.exists() else ''}: give a new file that ends in .jsonl")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--to {to} cannot be made ({error.strerror}): give another place") from error
    if arguments.completions < 2:
        raise ValueError(f"--completions {arguments.completions}: at least 2 are compared")
    if not 0 < arguments.keep <= 1:
        raise ValueError(f"--keep {arguments.keep}: it must be above 0 and at most 1")
    found = trained(arguments.run)
    workload, corpus = found.config.workload, found.corpus
    if not isinstance(workload, Online) or not isinstance(corpus, ExampleCorpus):
        raise ValueError(f"{arguments.run} has no prompts to answer: give a run of workload=online")
    judge = judges.named(arguments.judge or workload.judge)
    rows = [int(row) for shard in corpus.assignment for row in shard][: arguments.prompts]
    pairs = answered(found.model, corpus, rows, judge, workload, completions=arguments.completions, seed=arguments.seed)
    pairs.sort(key=lambda pair: -pair[0])
    kept = pairs[: math.ceil(len(pairs) * arguments.keep)]
    if not kept:
        raise ValueError("no prompt has answers of different rewards that are numbers: more --completions?")
    to.write_text("".join(json.dumps(row) + "\n" for _, row in kept), encoding="utf-8")
    print(f"{to}: {len(kept)} pairs of {len(rows)} prompts; {len(rows) - len(pairs)} had answers that are equally good")
    return FINISHED


def answered(
    model: nn.Module,
    corpus: ExampleCorpus,
    rows: Sequence[int],
    judge: judges.Judge,
    workload: Online,
    *,
    completions: int,
    seed: int,
) -> list[Pair]:
    """The best and the worst of `completions` answers to the prompt of each row, where they differ in reward."""
    pairs: list[Pair] = []
    for first in range(0, len(rows), PROMPTS_AT_ONCE):
        chunk = rows[first : first + PROMPTS_AT_ONCE]
        keys = [[key_of("pairs", seed, row, i) for i in range(completions)] for row in chunk]
        tokens, temperature = workload.completion_tokens, workload.temperature
        written = write(unwrapped(model), corpus, chunk, keys, tokens=tokens, temperature=temperature)
        pairs += best_and_worst(written, judge)
    return pairs


def best_and_worst(written: Rollouts, judge: judges.Judge) -> list[Pair]:
    """Of each prompt whose answers differ in reward."""
    found: list[Pair] = []
    for answers in written.answers:
        given = judges.rewards(judge, answers)
        known = [(reward, answer) for reward, answer in zip(given, answers, strict=True) if not math.isnan(reward)]
        if not known:
            continue
        best, worst = max(known, key=lambda pair: pair[0]), min(known, key=lambda pair: pair[0])
        if best[0] > worst[0] and best[1].completion and worst[1].completion:
            row = {"prompt": best[1].prompt, "chosen": best[1].completion, "rejected": worst[1].completion}
            found.append((best[0] - worst[0], row))
    return found
