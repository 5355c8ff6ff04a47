"""ModuleStore: the master values of some modules, their outer state, versions and what was sent to them."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from diloco import buffers
from diloco.codec import Codec, Float32
from diloco.feedback import Feedback
from diloco.inbox import MEASURED_SOURCES, Inbox
from diloco.merge import Merge
from diloco.messages import (
    Commit,
    CommitStats,
    Contribution,
    Fold,
    ModuleKey,
    Payload,
    Settled,
    Snapshot,
    State,
    Tensors,
    Verdict,
)
from diloco.outer import OuterOptimizer


@dataclass(frozen=True, kw_only=True)
class _Step:
    """An outer step that was taken."""

    commit: Commit
    chosen: list[tuple[Contribution, Verdict]]
    before: Tensors


@dataclass(kw_only=True)
class _Module:
    """One module: float32 master values and outer state, whatever the dtype of compute (pitfall L11)."""

    rule: OuterOptimizer  # with all that is left to be derived from how often the module steps in a round
    snapshot: Snapshot  # of the newest version
    values: Tensors  # the snapshot's own memory, which is never written to once a version is there
    outer: Tensors
    inbox: Inbox = field(default_factory=Inbox)
    draft: tuple[Payload, Tensors] | None = None  # a copy of the values, for the next step to be taken on
    last: _Step | None = None  # kept until it is measured
    update: Snapshot | None = None  # from the version before to the newest
    feedback: Feedback = field(default_factory=Feedback)  # what `codec_down` lost


class ModuleStore:
    """One shard of the store: plain, single-threaded, without Ray or clock.

    `codec` is that of contributions. Values go down in full as float32, or with another `codec_down` as updates: the
    store takes over each update as it is decoded, so that whoever follows them has the same bits.
    """

    def __init__(self, *, outer: OuterOptimizer, merge: Merge, codec: Codec, codec_down: Codec) -> None:
        self._outer, self._merge, self._codec = outer, merge, codec
        self._full, self._down = Float32(), None if isinstance(codec_down, Float32) else codec_down
        self._modules: dict[ModuleKey, _Module] = {}
        self._steps_a_round: Mapping[ModuleKey, int] = {}

    def setup(self, steps_a_round: Mapping[ModuleKey, int]) -> None:
        """How many outer steps each module takes in a round, which `outer` may depend on. Before it is filled."""
        self._steps_a_round = steps_a_round

    def fill(self, snapshots: Iterable[Snapshot]) -> dict[ModuleKey, str]:
        """Take these modules as the starting values, with fresh outer state; returns the values' digests."""
        digests = {}
        for snapshot in snapshots:
            digests[snapshot.module] = snapshot.payload.sha256()
            payload, values = self._copy(self._full.view(snapshot.payload))
            rule = self._rule(snapshot.module)
            self._modules[snapshot.module] = _Module(
                rule=rule, snapshot=replace(snapshot, payload=payload), values=values, outer=rule.init(values)
            )
        return digests

    def push(self, contribution: Contribution) -> Verdict:
        """Keep the encoded contribution and say whether it is sound.

        A second push of the same (module, source, round) changes nothing and gets the first one's verdict, unless
        it is of a later attempt: then it takes the earlier one's place.
        """
        module = self._modules[contribution.module]
        return module.inbox.put(contribution, lambda sent: self._judge(sent, module))

    def fold(self, fold: Fold) -> None:
        """Add contributions to a running sum as they come, so that not all of a round are kept, where a merge can.

        A later `commit` of the round, with `planned`, begins with the same sources, and is the same to the bit.
        """
        self._modules[fold.module].inbox.fold(fold, self._merge, self._codec)

    def commit(self, commit: Commit) -> int:
        """Merge the named contributions in their order, in float32, and take one outer step. Returns the new version.

        The same order of sources gives the same bits, whatever the order of arrival.
        """
        module = self._modules[commit.module]
        chosen = module.inbox.chosen(commit)
        merged = module.inbox.merged(commit, self._merge, self._codec)
        if commit.scale != 1.0:
            torch._foreach_mul_(list(merged.values()), commit.scale)
        module.last = _Step(commit=commit, chosen=chosen, before=module.values)
        payload, values = module.draft or self._copy(module.values)
        module.draft = None
        module.rule.step(values, merged, module.outer)
        version = module.snapshot.version + 1
        if self._down is not None:
            module.update = self._coded(self._down, module, values)
        module.values = values
        module.snapshot = replace(module.snapshot, version=version, payload=payload)
        module.inbox.forget(commit)
        return module.snapshot.version

    def pull(self, have: Mapping[ModuleKey, int | None]) -> list[Snapshot]:
        """Snapshots of the asked modules; a module of which the receiver has the newest version is left out.

        Who has exactly the version before gets the update, if there is one; all others get full values.
        """
        wanted = []
        for key, version in have.items():
            module = self._modules[key]
            if module.update is not None and version == module.update.base_version:
                wanted.append(module.update)
            elif version != module.snapshot.version:
                wanted.append(module.snapshot)
        return wanted

    def measure(self) -> list[CommitStats]:
        """Norms and dot products of the last commits, each told once; asked off the way of a round.

        Also prepares what the next outer step is taken on.
        """
        measured = []
        for module in self._modules.values():
            if module.last is not None:
                measured.append(self._stats(module, module.last))
                module.last = None
                module.draft = self._copy(module.values)
        return measured

    def state(self) -> dict[ModuleKey, State]:
        """Copies of all that must survive: values, outer state, version, inbox and verdicts."""
        return {key: _module_state(module) for key, module in self._modules.items()}

    def load_state(self, states: Mapping[ModuleKey, State]) -> None:
        """Hold exactly what `state()` gave."""
        self._modules = {key: self._module_from(key, state) for key, state in states.items()}

    def outer_digests(self) -> dict[str, str]:
        """SHA-256 of each outer state tensor, by name; the names say which parameter it belongs to."""
        return {
            f"{key}:{name}": hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
            for key, module in self._modules.items()
            for name, value in module.outer.items()
        }

    def _rule(self, key: ModuleKey) -> OuterOptimizer:
        return self._outer.resolved(self._steps_a_round.get(key, 1))

    def _judge(self, contribution: Contribution, module: _Module) -> Verdict:
        finite, shape_ok, norm = False, False, float("nan")
        try:
            delta = self._codec.view(contribution.payload)
        except Exception:  # of whatever kind the codec raises for bytes that are not its own
            delta = {}
        if {n: d.shape for n, d in delta.items()} == {n: v.shape for n, v in module.values.items()}:
            shape_ok, norm = True, _norm(delta)
            finite = norm < float("inf")
        return Verdict(
            module=contribution.module,
            source=contribution.source,
            round=contribution.round,
            finite=finite,
            shape_ok=shape_ok,
            norm=norm,
            attempt=contribution.attempt,
            version_ok=0 <= contribution.base_version <= module.snapshot.version,
        )

    def _copy(self, values: Tensors) -> tuple[Payload, Tensors]:
        """A payload with these values, and its memory as tensors that may be written to until it is given out."""
        payload = self._full.encode(values)
        return payload, self._full.view(payload)

    def _coded(self, codec: Codec, module: _Module, values: Tensors) -> Snapshot:
        """The update from the module's values to `values`, encoded. Writes into `values` what it is decoded to."""
        version = module.snapshot.version
        payload = module.feedback.around(codec, version, 0).encode_difference(values, module.values)
        module.feedback.settle([Settled(round=version, fragment=0, accepted=True)])
        for name, update in codec.view(payload).items():
            torch.add(module.values[name], update, out=values[name])
        return replace(module.snapshot, version=version + 1, base_version=version, payload=payload)

    def _stats(self, module: _Module, step: _Step) -> CommitStats:
        scratch = buffers.flat(max(value.numel() for value in module.values.values()))
        update_square = 0.0
        for name, value in module.values.items():
            update = torch.sub(value, step.before[name], out=scratch[: value.numel()].view(value.shape))
            update_square += _dot(update, update)
        measured = step.chosen[:MEASURED_SOURCES]
        deltas = [self._codec.view(contribution.payload) for contribution, _ in measured]
        gram = [[0.0] * len(measured) for _ in measured]
        for i, (_, verdict) in enumerate(measured):
            gram[i][i] = verdict.norm**2
        for i, j in itertools.combinations(range(len(measured)), 2):
            gram[i][j] = gram[j][i] = sum(_dot(value, deltas[j][name]) for name, value in deltas[i].items())
        return CommitStats(
            module=step.commit.module,
            round=step.commit.round,
            version=module.snapshot.version,
            update_square=update_square,
            sources=step.commit.sources,
            weights=step.commit.weights,
            gram=tuple(map(tuple, gram)),
            rounds=tuple(round_ for round_, _ in step.commit.keys),
            staleness=tuple(module.snapshot.version - 1 - sent.base_version for sent, _ in step.chosen),
            scale=step.commit.scale,
        )

    def _module_from(self, key: ModuleKey, state: State) -> _Module:
        found = {n.removeprefix("values/"): t for n, t in state.tensors.items() if n.startswith("values/")}
        payload, values = self._copy(found)
        module = _Module(
            rule=self._rule(key),
            snapshot=Snapshot(module=key, version=state.meta["version"], base_version=None, payload=payload),
            values=values,
            outer={n.removeprefix("outer/"): t for n, t in state.tensors.items() if n.startswith("outer/")},
        )
        residual = {n.removeprefix("residual/"): t for n, t in state.tensors.items() if n.startswith("residual/")}
        module.feedback.load({"residual": residual, "pending": {}})
        module.inbox = Inbox.loaded(key, state.tensors, state.meta)
        return module


def _norm(tensors: Tensors) -> float:
    """L2 norm over all elements; not finite only if one of them is not."""
    values = list(tensors.values())
    norm = float(torch.stack(torch._foreach_norm(values)).norm())
    if not math.isfinite(norm):  # once more in float64, since squares of large float32 overflow
        norm = math.sqrt(sum(float(value.double().square().sum()) for value in values))
    return norm


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


def _module_state(module: _Module) -> State:
    sent = module.inbox.state()
    tensors = {f"values/{name}": value.clone() for name, value in module.values.items()}
    tensors |= {f"outer/{name}": value.clone() for name, value in module.outer.items()}
    tensors |= module.feedback.state() | sent.tensors
    return State(tensors=tensors, meta={"version": module.snapshot.version, **sent.meta})
