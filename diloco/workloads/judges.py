"""Judges: what a completion is worth. A name, a function of the user's own, or the folder of a reward model."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from diloco import pretrained

BATCH = 16  # answers that a reward model reads at once


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was written to a prompt, and the row of data that the prompt is from."""

    prompt: str
    completion: str
    row: Mapping[str, Any] = field(default_factory=dict)


Judge: TypeAlias = Callable[[Sequence[Answer]], Sequence[float]]  # one reward an answer: the larger, the better


def sentiment(answers: Sequence[Answer]) -> list[float]:
    """How friendly the words are, -1 to 1, by the lexicon of vaderSentiment."""
    analyzer = _lexicon()
    return [float(analyzer.polarity_scores(answer.completion)["compound"]) for answer in answers]


@cache
def _lexicon() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ValueError("workload.judge=sentiment needs a lexicon: pip install 'diloco[align]'") from error
    return SentimentIntensityAnalyzer()


def brevity(answers: Sequence[Answer]) -> list[float]:
    """1 for nothing, falling by 0.01 a character: -0.28 for 128 of them."""
    return [1.0 - 0.01 * len(answer.completion) for answer in answers]


def reasoning_gym(answers: Sequence[Answer]) -> list[float]:
    """Whether the answer is right, 0 to 1, by the generator that its row's column `entry` comes from.

    `entry` is what a dataset of reasoning-gym yields, as JSON text; `prompt` its question.
    """
    try:
        import reasoning_gym as gym
    except ImportError as error:
        raise ValueError("workload.judge=reasoning_gym needs its package: pip install reasoning-gym") from error
    found = []
    for answer in answers:
        if "entry" not in answer.row:
            raise ValueError("workload.judge=reasoning_gym needs rows with prompt and entry, the JSON of what it gave")
        entry = json.loads(answer.row["entry"])
        score = gym.get_score_answer_fn(entry["metadata"]["source_dataset"])
        found.append(float(score(answer.completion.strip(), entry)))
    return found


JUDGES: dict[str, Judge] = {"sentiment": sentiment, "brevity": brevity, "reasoning_gym": reasoning_gym}


def named(judge: str) -> Judge:
    """One of `JUDGES`, the function `package.module:name`, or the reward model in a folder such as RUN/export.

    Raises ValueError where there is no such thing.
    """
    if judge in JUDGES:
        return JUDGES[judge]
    if judge and Path(judge).is_dir():
        return RewardModelJudge(Path(judge))
    module, _, name = judge.partition(":")
    remedy = f"give {', '.join(JUDGES)}, a function as package.module:name, or the folder of a reward model"
    if judge.startswith((".", "/", "~")):
        raise ValueError(f"workload.judge={judge}: there is no such folder: {remedy}")
    if not module or not name:
        raise ValueError(f"workload.judge={judge} is unknown: {remedy}")
    try:
        found = vars(importlib.import_module(module)).get(name)
    except ImportError as error:
        raise ValueError(f"workload.judge={judge} cannot be imported ({error}): {remedy}") from error
    if not callable(found):
        raise ValueError(f"workload.judge={judge}: {module} has no function {name}; {remedy}")
    return found  # type: ignore[no-any-return]


def rewards(judge: Judge, answers: Sequence[Answer]) -> list[float]:
    """What `judge` says of each; not a number where it gave none, and for all where it failed or gave another count."""
    try:
        given = [float(value) for value in judge(answers)]
    except Exception:  # the user's own function, perhaps over a network: `refused` tells how often, and a run goes on
        return [math.nan] * len(answers)
    if len(given) != len(answers):
        return [math.nan] * len(answers)
    return [value if math.isfinite(value) else math.nan for value in given]


def check(name: str, judge: Judge, answers: Sequence[Answer]) -> None:
    """Try it before training. Raises ValueError where it fails, gives another count, or what is not a number."""
    try:
        given = [float(value) for value in judge(answers)]
    except Exception as error:  # whatever the user's own function raises
        if str(error).startswith("workload.judge="):
            raise
        raise ValueError(
            f"workload.judge={name} fails ({type(error).__name__}: {error}): it is called with a list of Answer"
            " (prompt, completion, row), and gives a number for each"
        ) from error
    if len(given) != len(answers):
        raise ValueError(
            f"workload.judge={name} gives {len(given)} rewards for {len(answers)} answers: it must give one each"
        )
    bad = [value for value in given if not math.isfinite(value)]
    if bad:
        raise ValueError(f"workload.judge={name} gives {bad[0]}: rewards must be finite numbers")


class RewardModelJudge:
    """The score of a sequence classification model with one output, which `workload=reward_model` exports.

    It reads texts by its own tokenizer, whatever the policy's is.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where the folder has no such model."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from diloco.workloads.language import without_progress_bars

        self._folder = folder
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"workload.judge={folder} has an adapter alone: train with workload.export_merged=true, and give"
                f" {folder / 'merged'}"
            )
        config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
        if not any("SequenceClassification" in name for name in config.get("architectures", [])):
            raise ValueError(
                f"workload.judge={folder} is no reward model: train one with workload=reward_model, and give RUN/export"
            )
        self.tokenizer: Any = pretrained.load(AutoTokenizer, folder)
        with without_progress_bars():
            self._model: Any = pretrained.load_model(AutoModelForSequenceClassification, folder).eval()
        if self._model.config.num_labels != 1:
            raise ValueError(f"workload.judge={folder} has {self._model.config.num_labels} outputs, and needs 1")

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """One score each."""
        import torch

        from diloco.workloads.reward_model import as_scored, read_scores

        texts = [as_scored(self.tokenizer, answer.prompt, answer.completion) for answer in answers]
        found: list[float] = []
        with torch.no_grad():
            for first in range(0, len(texts), BATCH):
                found += read_scores(self._model, texts[first : first + BATCH]).tolist()
        return found
