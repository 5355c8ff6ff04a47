"""Island: install, train, contribute. Plain and synchronous; what runs it decides about processes and transport."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diloco import inner as inners
from diloco import stopping
from diloco.anchors import Anchors
from diloco.codec import Codec
from diloco.feedback import Feedback
from diloco.inner import Inner, set_rate
from diloco.messages import (
    Contribution,
    ModuleKey,
    Modules,
    Report,
    Shape,
    SlotName,
    Snapshot,
    SourceId,
    State,
    Task,
    Tensors,
    Written,
)
from diloco.replica import Replica
from diloco.workload import Corpus, Workload, cut

SAMPLE_TOKENS = 80  # of the text shown at a run's end
PARTS = ("local", "anchor", "inner", "workload", "residual", "pending")  # of what is exported of a source


class Island:
    """A fast-network group of workers that trains one path at a time.

    Inner-optimizer state belongs to the source that is being trained; it is never averaged and never reset
    between rounds. Randomness (dropout, sampling) is seeded anew on every step from (seed, source, step), so
    that neither segments nor a resume nor the island that a source runs on changes a result.
    """

    def __init__(
        self,
        *,
        workload: Workload,
        corpus: Corpus,
        inner: Inner,
        codec: Codec,
        codec_down: Codec,
        replica: Replica,
        accumulation: int,
        seed: int,
        total_steps: int,
        pause_s: float = 0.0,
    ) -> None:
        """`pause_s`: slept after each inner step, so that this island is slower than it is."""
        self._workload, self._corpus, self._inner, self._codec = workload, corpus, inner, codec
        self._accumulation, self._seed, self._total_steps, self._pause_s = accumulation, seed, total_steps, pause_s
        self.world, self.saves = replica.world, replica.saves
        self._replica, self._device = replica, replica.world.device
        self._dtype = inner.compute_dtype(self._device.type)
        self._forward: nn.Module = replica.forward
        if inner.compile:
            self._forward = torch.compile(self._forward)  # type: ignore[assignment]
        self._modules: Modules | None = None
        self._source: SourceId | None = None
        self._optimizers = inner.build(self._replica.parameters())
        self._anchors = Anchors(replica, codec_down)
        self._feedback = Feedback()
        self._fresh_since: int | None = None  # step at which empty optimizer state was started with in mid-run
        self._last_end_s: float | None = None

    def shapes(self) -> dict[str, Shape]:
        """Name -> shape of each trainable parameter."""
        return self._replica.shapes()

    def setup(self, modules: Modules) -> None:
        """Learn which parameters form which slot."""
        self._modules = modules

    def num_parameters(self) -> int:
        """All of the model's parameters, frozen ones too; a tied one counts once."""
        return sum(p.numel() for p in self._replica.model.parameters())

    def initial(self, keys: Sequence[ModuleKey], values: Mapping[ModuleKey, Tensors] | None = None) -> list[Snapshot]:
        """The model's present values, or `values`, as version 0 of these modules: what the store is filled with.

        Raises ValueError where `values` lacks a parameter or has another shape.
        """
        assert self._modules is not None
        return self._anchors.initial(self._modules, keys, values)

    def adopt(self, digests: Mapping[ModuleKey, str]) -> list[ModuleKey]:
        """Which of these modules the store was filled with as this model is: version 0 of them need not be sent."""
        assert self._modules is not None
        return self._anchors.adopt(self._modules, digests)

    def run(self, task: Task, snapshots: Sequence[Snapshot]) -> tuple[Report, list[Contribution]]:
        """Do one task: the inner loop of DiLoCo (arXiv:2311.08105, Alg. 1 lines 3-9)."""
        report = self.train(task, snapshots)
        contributions = [c for slot in task.send if (c := self.contribution(task, slot)) is not None]  # line 9
        return replace(report, bytes_up=sum(c.payload.nbytes for c in contributions)), contributions

    def train(self, task: Task, snapshots: Sequence[Snapshot]) -> Report:
        """All of a task but its contributions, which who is short of memory takes one by one."""
        start_s = time.perf_counter()
        waiting_s = 0.0 if self._last_end_s is None else start_s - self._last_end_s
        self._become(task.source, task.first_step)
        if task.fresh:  # moments that met a number that is not finite never recover
            self._start_fresh(task.first_step)
        self._feedback.settle(task.settled)
        keep = 0.0 if task.fresh else task.keep  # weights that were refused are not kept
        self.install(snapshots, task.install, keep)  # line 4: theta_i <- theta; the anchor is what was installed
        train_start_s = time.perf_counter()
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        metrics: dict[str, float] = {}
        tokens = 0
        for step in range(task.first_step, task.first_step + task.steps):  # lines 5-8
            self._workload.begin_step(self._replica.model, installed=bool(task.install) and step == task.first_step)
            loss, norm, step_tokens, metrics = self._inner_step(task, step)
            losses.append(loss)
            norms.append(norm)
            tokens += step_tokens
            if self._pause_s:
                time.sleep(self._pause_s)
        if self._fresh_since == task.first_step and task.steps:
            metrics["inner/fresh_state"] = 1.0
        if losses:
            # The one point where the device, and the island's other workers, are waited for.
            metrics["inner/loss"] = float(self._replica.total(torch.stack(losses)).mean())
            metrics["inner/grad_norm"] = float(torch.stack(norms).mean())
        seconds = time.perf_counter() - train_start_s
        metrics |= stopping.evaluate(self._workload, self._replica.model, self._corpus, task, self.write_model)
        self._last_end_s = time.perf_counter()
        return Report(
            task=task,
            tokens=tokens,
            seconds=seconds if task.steps else 0.0,
            waiting_s=waiting_s,
            clock_s=seconds if task.steps else 0.0,
            bytes_up=0,
            bytes_down=sum(s.payload.nbytes for s in snapshots),
            bytes_inside=self._replica.bytes_per_step(self._accumulation) * task.steps,
            metrics=metrics,
        )

    def contribution(self, task: Task, slot: SlotName) -> Contribution | None:
        """What the island sends of a slot; None on workers that do not send."""
        assert self._modules is not None
        encoder = self._feedback.around(self._codec, task.round, task.fragment)
        payload = self._replica.contribution(encoder, self._anchors.values, self._modules.slots[slot])
        contribution = None
        if payload is not None:
            contribution = Contribution(
                module=task.modules[slot],
                source=task.source,
                island=task.island,
                round=task.round,
                base_version=self._anchors.versions[slot],
                payload=payload,
                attempt=task.attempt,
            )
        self._last_end_s = time.perf_counter()
        return contribution

    def install(
        self, snapshots: Sequence[Snapshot], versions: Mapping[SlotName, int] | None = None, keep: float = 0.0
    ) -> None:
        """Write global values into the model, `keep` of its own surviving; the values as installed are the anchor.

        `versions` of the slots to install, by default those of `snapshots`, which only the worker that takes them
        for its island needs to have.
        """
        assert self._modules is not None
        given = {self._modules.slot_of(snapshot.module): snapshot.version for snapshot in snapshots}
        self._anchors.install(self._modules, snapshots, given if versions is None else versions, keep)

    def export(self, source: SourceId, *, sheds: bool = False) -> State:
        """Copies of all that belongs to `source`: optimizer state, local weights, anchors, the workload's own.

        `sheds`: without weights and anchors, for a source that installs all of them anew.
        """
        assert source == self._source or self._source is None
        parameters, anchors = ({}, {}) if sheds else (self._replica.parameters(), self._anchors.values)
        tensors = {f"local/{name}": value.detach().cpu().clone() for name, value in parameters.items()}
        tensors |= {f"anchor/{name}": self._replica.whole(name, part.clone()) for name, part in anchors.items()}
        extra = self._workload.state()
        tensors |= {f"workload/{name}": value.cpu().clone() for name, value in extra.tensors.items()}
        tensors |= self._feedback.state()
        moments, scalars = inners.state_of(self._optimizers)
        tensors |= {f"inner/{name}": value for name, value in moments.items()}
        meta = {
            "versions": {} if sheds else dict(self._anchors.versions),
            "scalars": scalars,
            "fresh_since": self._fresh_since,
            "workload": extra.meta,
        }
        return State(tensors=tensors, meta=meta)

    def load(self, source: SourceId, state: State) -> None:
        """Become `source` as it was when `export` was called."""
        self._become(source, 0)
        parts: dict[str, Tensors] = {part: {} for part in PARTS}
        for name, value in state.tensors.items():
            part, _, rest = name.partition("/")
            # A copy: the state stays what it was while this island trains on.
            parts[part][rest] = self._replica.taken(self._parameter_of(name), value.clone())
        parameters = self._replica.parameters()
        with torch.no_grad():
            for name, value in parts["local"].items():
                parameters[name].copy_(value)
        self._anchors.values = {name: self._replica.part(value) for name, value in parts["anchor"].items()}
        self._anchors.versions = {SlotName(slot): version for slot, version in state.meta["versions"].items()}
        self._fresh_since = state.meta["fresh_since"]
        self._feedback.load(parts)
        self._workload.load_state(State(tensors=parts["workload"], meta=state.meta["workload"]))
        inners.load_state(self._optimizers, parts["inner"], state.meta["scalars"])

    def empty(self, name: str, shape: Shape, dtype: torch.dtype) -> Tensor:
        """What a tensor of `export`'s is read into: this worker's part where it belongs to a parameter."""
        return self._replica.empty(self._parameter_of(name), shape, dtype)

    def weights_sha256(self) -> str:
        """SHA-256 over the installed float32 values in order of name."""
        return self._replica.sha256()

    def write_model(self, folder: Path) -> None:
        """Export the installed model, as the workload does it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._workload.export(self._replica.model, self._corpus, folder)

    def written(self, prompt: str) -> Written:
        """What the installed model writes."""
        model, corpus = self._replica.model, self._corpus
        text = self._workload.sample(model, corpus, prompt, tokens=SAMPLE_TOKENS, seed=self._seed)
        return Written(text=text, table=self._workload.samples(model, corpus, seed=self._seed))

    # --- the lines of the loop ---

    def _become(self, source: SourceId, step: int) -> None:
        """Start a source that this island has not trained: empty optimizer state, no anchors."""
        if self._source == source:
            return
        if self._source is not None:
            self._anchors.clear()
            self._feedback = Feedback()
            self._workload.load_state(State())
        self._source = source
        self._start_fresh(step)

    def _start_fresh(self, step: int) -> None:
        """Empty optimizer state, with a short warm-up where it is not the run's start."""
        self._optimizers = self._inner.build(self._replica.parameters())
        self._fresh_since = step if step > 0 else None

    def _parameter_of(self, name: str) -> str | None:
        """The parameter that a tensor of `export`'s belongs to."""
        part, _, rest = name.partition("/")
        if part == "inner":
            own = {id(p): n for n, p in self._replica.parameters().items()}
            return own[id(inners.parameter_of(self._optimizers, rest))]
        return rest if part in ("local", "anchor") else None

    def _inner_step(self, task: Task, step: int) -> tuple[Tensor, Tensor, int, dict[str, float]]:
        """One optimizer step on one batch: (loss, gradient norm, tokens, metrics). Does not wait for the device."""
        worker = f"/{self.world.rank}" if self.world.rank else ""
        torch.manual_seed(random.Random(f"step/{self._seed}/{task.source}/{step}{worker}").getrandbits(63))
        batch = self._workload.batch(self._corpus, task.shard, step)
        tokens, weight = self._workload.tokens(batch), self._workload.weight(batch)
        total = torch.zeros((), device=self._device)
        metrics: dict[str, float] = {}
        for index, part in enumerate(cut(batch, self._accumulation)):
            own = cut(part, self.world.size)[self.world.rank]
            part = {name: value.to(self._device, non_blocking=True) for name, value in own.items()}
            share = self._workload.weight(part) / weight
            with self._replica.exchange(last=index + 1 == self._accumulation):
                with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
                    loss, metrics = self._workload.loss(self._forward, part)
                # The workers' gradients are averaged, where the joint batch's is their sum.
                (loss * (share * self.world.size)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() * share
        norm = self._replica.gradient_norm()
        if self._inner.clip:
            parameters = list(self._replica.parameters().values())
            nn.utils.clip_grads_with_norm_(parameters, self._inner.clip, norm, foreach=True)
        lr = set_rate(self._optimizers, self._inner.rate_share(step, self._total_steps, self._fresh_since))
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        named = {f"inner/{name}": value for name, value in metrics.items()}
        return total, norm, tokens, {**named, "inner/lr": lr}
