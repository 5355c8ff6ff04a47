"""WARM: reward models on pairs of which a quarter is labelled the wrong way round; one, an ensemble, and their average.

    python -m experiments.benchmarks.warm [--seeds 0,1,2] [--quick] [--to DIR]

Pairs are two answers of the pre-trained policy, labelled by their share of lower-case letters: the control (what a
lexicon of sentiment says, these models do not learn from so few). Six reward models from one start, with other orders
of the data, rates and dropout, are averaged (arXiv:2401.12187). Accuracy, with right labels: on the pairs they learned
from, `in_domain` on other prompts of that documentation, and `out_of_domain` on prompts from the documentation of
Python. `best_of_n`: what the control says of the best of 16 answers by each.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from diloco.data import Data
from diloco.inner import AdamW, RateSchedule
from diloco.merge import Mean
from diloco.messages import Tensors
from diloco.replica import Single
from diloco.tokens import Array
from diloco.workloads import rollouts
from diloco.workloads.generation import key_of
from diloco.workloads.judges import Answer
from diloco.workloads.online import Online
from diloco.workloads.reward_model import RewardModel, as_scored, read_scores
from experiments.benchmarks import align
from experiments.benchmarks.align import Policies
from experiments.benchmarks.lab import opened, options
from experiments.pairs import answered
from experiments.soups import Kitchen

MEMBERS = [(lr, dropout) for lr in (3e-4, 6e-4, 1e-3) for dropout in (0.05, 0.1)]
FLIPPED, N, STEPS = 0.25, 16, 150
PROMPTS = {"train": 1500, "in_domain": 400, "out_of_domain": 400, "best_of_n": 48}


def control(answers: Sequence[Answer]) -> list[float]:
    """The share of lower-case letters: words, rather than numbers, names and signs."""
    return [sum(map(str.islower, answer.completion)) / max(1, len(answer.completion)) for answer in answers]


class Pairs:
    """What one seed's policy answers, and how the control judges it."""

    def __init__(self, policies: Policies, seed: int, prompts: Mapping[str, int]) -> None:
        self._seed, self.start = seed, str(policies.start(seed))
        workload = Online(model=self.start, completion_tokens=policies.size.completion_tokens)
        model = workload.build_model(seed)
        own = workload.corpus(policies.data(1), seed=seed, shards=1)
        foreign = workload.corpus(replace(policies.data(1), files=[], prompt_words=align.WORDS), seed=seed, shards=1)
        rows = own.assignment[0].tolist()
        first, second = prompts["train"], prompts["train"] + prompts["in_domain"]
        chosen = {
            "train": (own, rows[:first]),
            "in_domain": (own, rows[first:second]),
            "out_of_domain": (foreign, foreign.assignment[0][: prompts["out_of_domain"]].tolist()),
        }
        self.rows = {
            name: [row for _, row in answered(model, corpus, some, control, workload, completions=2, seed=seed)]
            for name, (corpus, some) in chosen.items()
        }
        last = rows[second : second + prompts["best_of_n"]]
        keys = [[key_of("best", seed, row, i) for i in range(N)] for row in last]
        tokens = policies.size.completion_tokens
        self.written = rollouts.write(model, own, last, keys, tokens=tokens, temperature=1.0)
        self.tokenizer = own.tokenizer

    def flipped(self, folder: Path) -> Path:
        """The training pairs with some labels wrong, in a file."""
        path = folder / f"flipped_lower_{self._seed}_{len(self.rows['train'])}.jsonl"
        if not path.is_file():
            chance = random.Random(self._seed)
            lines = []
            for row in self.rows["train"]:
                wrong = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
                lines.append(json.dumps(wrong if chance.random() < FLIPPED else row))
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def scores(self, model: torch.nn.Module, name: str) -> Tensor:
        """float32[pairs, 2]: of the better and the worse answer."""
        texts = [
            as_scored(self.tokenizer, row["prompt"], row[side])
            for row in self.rows[name]
            for side in ("chosen", "rejected")
        ]
        return _scores(model, texts).view(-1, 2)

    def ranked(self, model: torch.nn.Module) -> Tensor:
        """float32[prompts, N]: scores of many answers to each prompt."""
        answers = [answer for own in self.written.answers for answer in own]
        texts = [as_scored(self.tokenizer, answer.prompt, answer.completion) for answer in answers]
        return _scores(model, texts).view(-1, N)

    def figures(self, scores: Mapping[str, Tensor], ranked: Tensor) -> dict[str, float]:
        """Accuracies, and what the control says of the answers that these scores choose."""
        found = {name: float((given[:, 0] > given[:, 1]).float().mean()) for name, given in scores.items()}
        best = [own[place] for own, place in zip(self.written.answers, ranked.argmax(dim=1).tolist(), strict=True)]
        return {**found, "best_of_n": fmean(control(best))}


def _scores(model: torch.nn.Module, texts: Sequence[Array]) -> Tensor:
    with torch.no_grad():
        return torch.cat([read_scores(model.eval(), texts[i : i + 64]) for i in range(0, len(texts), 64)])


def members(policies: Policies, pairs: Pairs, seed: int) -> list[Path]:
    """Runs of reward models from one start."""
    file = pairs.flipped(policies.lab.folder)
    found = []
    for number, (lr, dropout) in enumerate(MEMBERS):
        base = policies.config(seed, RewardModel(model=pairs.start, dropout=dropout), eval_every=0)
        data: Data = replace(base.data, files=[str(file)], batch=16)
        steps = STEPS if policies.size == align.FULL else 2
        inner = AdamW(lr=lr, warmup_steps=10, rate=RateSchedule.cosine)
        found.append(
            policies.lab.kept(replace(base, data=data, seed=seed + 10 * number, inner=inner, inner_steps=steps))
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    given = options("Averaged reward models beside one and an ensemble.").parse_args(argv)
    lab, seeds = opened(given)
    policies = Policies(lab, align.QUICK if given.quick else align.FULL)
    prompts = dict.fromkeys(PROMPTS, 40) if given.quick else PROMPTS
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("single, mean of 6", "ensemble", "averaged")}
    for seed in seeds:
        pairs = Pairs(policies, seed, prompts)
        kitchen = Kitchen(members(policies, pairs, seed), Mean())
        each: list[tuple[dict[str, Tensor], Tensor]] = []
        weights: list[Tensors] = [*kitchen.ingredients.values(), kitchen.soup([1.0] * len(MEMBERS))]
        model = RewardModel(model=pairs.start).build_model(seed)
        for values in weights:
            Single(model).install(list(values), values, keep=0.0)
            each.append(({name: pairs.scores(model, name) for name in pairs.rows}, pairs.ranked(model)))
        singles = [pairs.figures(*one) for one in each[:-1]]
        together = {name: torch.stack([one[0][name] for one in each[:-1]]).mean(dim=0) for name in pairs.rows}
        rows = {
            "single, mean of 6": {name: fmean(one[name] for one in singles) for name in singles[0]},
            "ensemble": pairs.figures(together, torch.stack([one[1] for one in each[:-1]]).mean(dim=0)),
            "averaged": pairs.figures(*each[-1]),
        }
        for name, row in rows.items():
            found[name].append(row)
            print(f"  seed {seed}  {name:20} {row}", flush=True)
    orders = {
        f"averaged is at least as good as a single one, {where}": [
            averaged[where] - single[where]
            for averaged, single in zip(found["averaged"], found["single, mean of 6"], strict=True)
        ]
        for where in ("out_of_domain", "best_of_n")
    }
    text = align.rows(found, ["train", "in_domain", "out_of_domain", "best_of_n"])
    align.conclude(lab, benchmark="warm", seeds=seeds, size=policies.size, found=found, text=text, orders=orders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
