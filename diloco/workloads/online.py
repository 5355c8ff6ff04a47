"""Learning from a judge of what the policy itself writes: sampled, judged and learned from within each inner step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diloco.data import Data
from diloco.dealing import spread
from diloco.messages import ShardId, State
from diloco.workload import Batch, Corpus
from diloco.workloads import conversations, generation, judges, updates
from diloco.workloads.anchor import EmaAnchor
from diloco.workloads.example_corpus import ExampleCorpus
from diloco.workloads.fine_tuning import FineTuning, held_out, nothing_learned, rows_of, unwrapped
from diloco.workloads.language import evaluating
from diloco.workloads.objectives.chosen import chosen_objective
from diloco.workloads.presets import PRESETS
from diloco.workloads.rollouts import Rollouts, write

SHOWN = 3  # prompts in the table of samples


class Update(Enum):
    """What is learned from a prompt's completions and their rewards."""

    preference = "preference"  # `objective` on the best and the worst: OAIF
    reinforce = "reinforce"  # the policy gradient, with the other completions as baseline
    j_bond = "j_bond"  # towards the best of two of the anchor's


class Anchor(Enum):
    """What the policy is held to."""

    reference = "reference"  # the model that training starts from
    ema = "ema"  # an average of the policy over its past steps
    round_ema = "round_ema"  # the same, which begins anew wherever global weights are installed


@dataclass(kw_only=True)
class Online(FineTuning):
    """Let the policy answer prompts, have the answers judged, and learn from that.

    Rows of `data.files` or `data.hub` have `prompt`, a text or a list of messages; a judge sees their other columns.
    OAIF (arXiv:2402.04792), REINFORCE as in WARP (arXiv:2406.16768), or J-BOND (arXiv:2407.14622). A step samples
    `data.batch` prompts; what it samples depends on the seed, the prompt and the step alone.
    """

    judge: str = "sentiment"  # brevity, reasoning_gym, package.module:function, or a reward model's folder
    update: Update = Update.preference
    objective: str = "dpo"  # of update=preference: also ipo, slic, ...
    settings: dict[str, Any] = field(default_factory=dict)  # of the objective: +workload.settings.beta=0.2
    anchor: Anchor = Anchor.reference
    anchor_rate: float = 0.01  # mu: how much of each step's policy goes into an average
    beta: float = 0.1  # of update=reinforce: what a nat of divergence from the anchor costs
    gamma: float = 1.0  # of update=j_bond: the same
    jeffreys: float = 0.5  # of update=j_bond: 0 = towards the best of two only, 1 = away from the worst only
    completions: int = 2  # of each prompt
    completion_tokens: int = 32  # at most
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model in PRESETS:
            raise ValueError(
                f"workload.model={self.model} has new weights in each run, and nothing to ask it: give a folder such as"
                " RUN/export, or a hub id"
            )
        chosen_objective(self.objective, self.settings)
        if self.judge and Path(self.judge).expanduser().is_dir():
            self.judge = str(Path(self.judge).expanduser().absolute())  # workers may start in another folder
        if self.completions < 2:
            raise ValueError(f"workload.completions={self.completions}: at least 2 are compared")
        if self.completion_tokens < 1:
            raise ValueError(f"workload.completion_tokens={self.completion_tokens}: it must be at least 1")
        for name in ("anchor_rate", "jeffreys"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"workload.{name}={vars(self)[name]}: it must be between 0 and 1")
        for name in ("beta", "gamma"):
            if not 0 <= vars(self)[name] < math.inf:
                raise ValueError(f"workload.{name}={vars(self)[name]}: it must be 0 or a positive number")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"workload.temperature={self.temperature}: it must be a positive number")

    def corpus(self, data: Data, *, seed: int, shards: int) -> ExampleCorpus:
        """Prepare or open the prompts, and try the judge on some.

        Raises ValueError also where the judge cannot be used, or the objective looks at a whole batch together.
        """
        if chosen_objective(self.objective, self.settings).whole_batch and self.update is Update.preference:
            raise ValueError(
                f"workload.objective={self.objective} looks at all pairs of a batch together, and ties are left out:"
                " choose another one"
            )
        corpus = ExampleCorpus(data, self.language(), conversations.prompts, seed=seed, shards=shards)
        self._remember(corpus)
        judge = self._judge()
        rows = corpus.validation_rows[:2].tolist()
        tried = [
            judges.Answer(prompt=corpus.prompt(row), completion="It is so.", row=corpus.columns(row)) for row in rows
        ]
        judges.check(self.judge, judge, tried)
        if isinstance(judge, judges.RewardModelJudge) and corpus.folder.meta["chats"]:
            own = self.language().tokenizer(corpus.tokenizer_folder)
            if own.chat_template != judge.tokenizer.chat_template:
                raise ValueError(
                    f"workload.judge={self.judge} has another chat template than workload.model={self.model}, and would"
                    " read its answers wrongly: train it from a model with the same tokenizer, or use plain prompts"
                )
        return corpus

    def batch(self, corpus: Corpus, shard: ShardId, step: int) -> Batch:
        """{"rows", "step"}: int64[data.batch]; what is written to these prompts, `loss` finds out."""
        assert isinstance(corpus, ExampleCorpus)
        self._remember(corpus)
        rows = torch.tensor(rows_of(corpus, shard, step))
        return {"rows": rows, "step": torch.full_like(rows, step)}

    def begin_step(self, model: nn.Module, *, installed: bool) -> None:
        """The average takes a step, or begins anew."""
        if self.anchor is not Anchor.reference:
            self._average().follow(model, anew=installed and self.anchor is Anchor.round_ema)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """What `update` makes of a prompt's completions, a mean over prompts; 0 where there are none.

        Metrics: means of `reward`, `length` (tokens) and `anchor_kl` (nats a completion); the shares of `ties` among
        prompts, and of `refused` completions, whose rewards are no numbers.
        """
        rows, steps = batch["rows"].tolist(), batch["step"].tolist()
        if not rows:
            return nothing_learned(model), {}
        rollouts, rewards = self._rolled_out(model, rows, steps)
        policy = rollouts.logps(model)
        with self._held_to(model) as anchor:
            before = rollouts.logps(anchor)
        judged = updates.Judged(
            policy=policy, anchor=before, rewards=rewards.to(policy.device), tokens=rollouts.lengths.to(policy.device)
        )
        ties = torch.zeros(len(rows), dtype=torch.bool)
        match self.update:
            case Update.preference:
                losses, ties = updates.best_and_worst(judged, chosen_objective(self.objective, self.settings))
            case Update.reinforce:
                losses = updates.reinforce(judged, beta=self.beta)
            case Update.j_bond:
                losses = updates.j_bond(judged, jeffreys=self.jeffreys, gamma=self.gamma)
        own = slice(0, 1) if self.update is Update.j_bond else slice(None)  # the others are the anchor's
        metrics = {
            "reward": float(rewards[:, own].nanmean()),
            "length": float(rollouts.lengths[:, own].mean()),
            "anchor_kl": float((policy - before)[:, own].detach().mean()),
            "ties": float(ties.float().mean()),
            "refused": float(rewards.isnan().float().mean()),
        }
        return losses.mean(), metrics

    def tokens(self, batch: Batch) -> int:
        """As many as may be sampled."""
        return len(batch["rows"]) * self._count() * self.completion_tokens

    def weight(self, batch: Batch) -> int:
        """Prompts."""
        return len(batch["rows"])

    def needs_whole_model(self) -> str:
        """To sample, and to average it."""
        return "workload=online samples from the model and averages it, which each worker has to hold"

    def learning(self) -> Sequence[str]:
        """All but the judge and how answers are sampled."""
        own = ("update", "objective", "settings", "anchor", "anchor_rate", "beta", "gamma", "jeffreys", "completions")
        return (*super().learning(), *own)

    def has_perplexity(self) -> bool:
        """No."""
        return False

    def evaluation(self, model: nn.Module, corpus: ExampleCorpus) -> dict[str, float]:
        """Means over one answer to each held-out prompt; "loss" is minus the reward.

        "kl": from the reference, of a whole answer, in nats, where what could stand at each place of what was written
        is summed up rather than sampled; "length": tokens; "diversity": the share of different pairs of neighbouring
        tokens among all; "refused": the share of answers whose reward is no number.
        Raises ValueError where that is all of them: nothing can be learned any more.
        """
        self._remember(corpus)
        scores: list[float] = []
        texts: list[Sequence[int]] = []
        divergence = 0.0
        with evaluating(model):
            for rows in held_out(corpus):
                rollouts = self._answered(model, rows)
                scores += judges.rewards(self._judge(), [one for answers in rollouts.answers for one in answers])
                own = rollouts.choices(model)
                with self.start(model) as before:
                    divergence += float((own.exp() * (own - rollouts.choices(before))).sum())
                texts += [text for written in rollouts.completions for text in written]
        pairs = [pair for text in texts for pair in zip(text, text[1:], strict=False)]
        reward = float(torch.tensor(scores).nanmean())
        if math.isnan(reward):
            judges.check(self.judge, self._judge(), [answer for answers in rollouts.answers for answer in answers])
        return {
            "loss": 0.0 - reward,
            "reward": reward,
            "kl": divergence / len(texts),
            "length": sum(map(len, texts)) / len(texts),
            "diversity": len(set(pairs)) / max(1, len(pairs)),
            "refused": sum(map(math.isnan, scores)) / len(scores),
        }

    def samples(self, model: nn.Module, corpus: Corpus, *, seed: int) -> list[dict[str, str]]:
        """Some held-out prompts, what was written to them before training and what is now, and the rewards."""
        assert isinstance(corpus, ExampleCorpus)
        self._remember(corpus)
        available = corpus.validation_rows
        rows = available[spread(len(available), SHOWN)].tolist()
        found: list[dict[str, str]] = [{"prompt": corpus.prompt(row)} for row in rows]
        with self.start(model) as start:
            before = self._answered(start, rows)
        after = self._answered(model, rows)
        for name, rollouts in (("before", before), ("after", after)):
            for told, (answer,) in zip(found, rollouts.answers, strict=True):
                (reward,) = judges.rewards(self._judge(), [answer])
                text = "".join(c if c.isprintable() else " " for c in answer.completion)
                told |= {name: text, f"reward {name}": f"{reward:.3f}"}
        return found

    def state(self) -> State:
        """The average."""
        return State() if self.anchor is Anchor.reference else State(tensors=self._average().state())

    def load_state(self, state: State) -> None:
        """Take it back."""
        if self.anchor is not Anchor.reference:
            self._average().load(state.tensors)

    def _rolled_out(self, model: nn.Module, rows: list[int], steps: list[int]) -> tuple[Rollouts, Tensor]:
        """What a step learns from: [prompts, completions] of the policy; for J-BOND one, and two of the anchor."""
        if self.update is Update.j_bond:
            with self._held_to(model) as anchor:
                theirs = self._written(anchor, rows, steps, range(1, 3))
            rollouts = self._written(model, rows, steps, range(1)).beside(theirs)
        else:
            rollouts = self._written(model, rows, steps, range(self.completions))
        flat = judges.rewards(self._judge(), [one for answers in rollouts.answers for one in answers])
        return rollouts, torch.tensor(flat).view(len(rows), -1)

    def _answered(self, model: nn.Module, rows: list[int]) -> Rollouts:
        """One answer of `model` to each row's prompt, with the same random numbers at each evaluation."""
        return self._written(model, rows, ["evaluation"] * len(rows), range(1))

    def _written(self, model: nn.Module, rows: list[int], steps: Any, numbers: range) -> Rollouts:
        """Completions with these numbers of each row's prompt, by `model`, at the row's step."""
        corpus: ExampleCorpus = self.__dict__["_corpus"]
        keys = [
            [generation.key_of(corpus.seed, row, step, number) for number in numbers]
            for row, step in zip(rows, steps, strict=True)
        ]
        return write(unwrapped(model), corpus, rows, keys, tokens=self.completion_tokens, temperature=self.temperature)

    @contextmanager
    def _held_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model that the policy is held to, in eval mode without gradients."""
        if self.anchor is Anchor.reference:
            with self.start(model) as start:
                yield start
            return
        with evaluating(self._average().model):
            yield self._average().model

    def _average(self) -> EmaAnchor:
        known: EmaAnchor | None = self.__dict__.get("_ema")
        if known is None:
            known = self.__dict__["_ema"] = EmaAnchor(self.anchor_rate)
        return known

    def _judge(self) -> judges.Judge:
        known: judges.Judge | None = self.__dict__.get("_judged_by")
        if known is None:
            known = self.__dict__["_judged_by"] = judges.named(self.judge)
        return known

    def _remember(self, corpus: ExampleCorpus) -> None:
        """The prompts, for `loss`, which is given the model and numbers of rows only."""
        self.__dict__["_corpus"] = corpus

    def _count(self) -> int:
        return 3 if self.update is Update.j_bond else self.completions
