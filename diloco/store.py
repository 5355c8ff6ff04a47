"""ModuleStore: the master values of some modules, their outer state, versions and what was sent to them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diloco.codec import Codec, Float32
from diloco.merge import Merge
from diloco.messages import (
    Commit,
    CommitStats,
    Contribution,
    ModuleKey,
    Payload,
    Snapshot,
    SourceId,
    State,
    Tensors,
    Verdict,
)
from diloco.outer import OuterOptimizer

MEASURED_SOURCES = 8  # pairwise cosines of at most so many contributions, so that their cost stays linear


@dataclass(kw_only=True)
class _Module:
    """One module: float32 master values and outer state, whatever the dtype of compute (pitfall L11)."""

    values: Tensors
    outer: Tensors
    version: int = 0
    inbox: dict[tuple[int, SourceId], Contribution] = field(default_factory=dict)  # by (round, source); still encoded
    verdicts: dict[tuple[int, SourceId], Verdict] = field(default_factory=dict)
    snapshot: Snapshot | None = None  # encoded once per version
    last: tuple[Commit, list[Contribution], Snapshot] | None = None  # kept until it is measured


class ModuleStore:
    """One shard of the store: plain, single-threaded, without Ray or clock.

    `codec` is that of contributions. Snapshots go down as full float32 values.
    """

    def __init__(self, *, outer: OuterOptimizer, merge: Merge, codec: Codec) -> None:
        self._outer, self._merge, self._codec = outer, merge, codec
        self._down = Float32()
        self._modules: dict[ModuleKey, _Module] = {}

    def fill(self, snapshots: Iterable[Snapshot]) -> None:
        """Take these modules as the starting values, with fresh outer state."""
        for snapshot in snapshots:
            values = self._down.decode(snapshot.payload)
            self._modules[snapshot.module] = _Module(
                values=values, outer=self._outer.init(values), version=snapshot.version
            )

    def push(self, contribution: Contribution) -> Verdict:
        """Keep the encoded contribution and say whether it is sound.

        A second push of the same (module, source, round) changes nothing and gets the first one's verdict, unless
        it is of a later attempt: then it takes the earlier one's place.
        """
        module = self._modules[contribution.module]
        key = (contribution.round, contribution.source)
        if key not in module.verdicts or module.verdicts[key].attempt < contribution.attempt:
            module.inbox.pop(key, None)
            verdict = self._judge(contribution, module)
            module.verdicts[key] = verdict
            if verdict.good:
                module.inbox[key] = contribution
        return module.verdicts[key]

    def commit(self, commit: Commit) -> int:
        """Merge the named contributions in their order, in float32, and take one outer step. Returns the new version.

        What was pushed for this round or an earlier one is dropped. The same order of sources gives the same
        bits, whatever the order of arrival.
        """
        module = self._modules[commit.module]
        chosen = [module.inbox[commit.round, source] for source in commit.sources]
        before = self._encoded(commit.module)
        merged = self._merge.combine((self._codec.view(c.payload) for c in chosen), commit.weights)
        if commit.scale != 1.0:
            torch._foreach_mul_(list(merged.values()), commit.scale)
        self._outer.step(module.values, merged, module.outer)
        module.version += 1
        module.last = (commit, chosen, before)
        module.snapshot = None
        for round_, source in [key for key in module.verdicts if key[0] <= commit.round]:
            module.inbox.pop((round_, source), None)
            del module.verdicts[round_, source]
        return module.version

    def pull(self, have: Mapping[ModuleKey, int | None]) -> list[Snapshot]:
        """Snapshots of the asked modules; a module of which the receiver has the newest version is left out."""
        return [self._encoded(key) for key, version in have.items() if version != self._modules[key].version]

    def keys(self) -> list[ModuleKey]:
        """The modules held here."""
        return list(self._modules)

    def measure(self) -> list[CommitStats]:
        """Norms and dot products of the last commits, each told once; asked off the way of a round."""
        measured = []
        for key, module in self._modules.items():
            if module.last is not None:
                measured.append(self._stats(key, module, *module.last))
                module.last = None
        return measured

    def state(self) -> dict[ModuleKey, State]:
        """Copies of all that must survive: values, outer state, version, inbox and verdicts."""
        return {key: _module_state(module) for key, module in self._modules.items()}

    def load_state(self, states: Mapping[ModuleKey, State]) -> None:
        """Hold exactly what `state()` gave."""
        self._modules = {key: _module_from(key, state) for key, state in states.items()}

    def outer_digests(self) -> dict[str, str]:
        """SHA-256 of each outer state tensor, by name; the names say which parameter it belongs to."""
        return {
            f"{key}:{name}": hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
            for key, module in self._modules.items()
            for name, value in module.outer.items()
        }

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
        )

    def _encoded(self, key: ModuleKey) -> Snapshot:
        module = self._modules[key]
        if module.snapshot is None:
            payload = self._down.encode(module.values)
            module.snapshot = Snapshot(module=key, version=module.version, base_version=None, payload=payload)
        return module.snapshot

    def _stats(
        self, key: ModuleKey, module: _Module, commit: Commit, chosen: Sequence[Contribution], before: Snapshot
    ) -> CommitStats:
        old = self._down.view(before.payload)
        update_square = sum(_dot(step, step) for step in (value - old[n] for n, value in module.values.items()))
        deltas = [self._codec.view(c.payload) for c in chosen[:MEASURED_SOURCES]]
        gram = [[sum(_dot(a[n], b[n]) for n in a) for b in deltas[: i + 1]] for i, a in enumerate(deltas)]
        return CommitStats(
            module=key,
            round=commit.round,
            version=module.version,
            update_square=update_square,
            sources=commit.sources,
            gram=tuple(tuple(gram[max(i, j)][min(i, j)] for j in range(len(gram))) for i in range(len(gram))),
        )


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
    tensors = {f"values/{name}": value.clone() for name, value in module.values.items()}
    tensors |= {f"outer/{name}": value.clone() for name, value in module.outer.items()}
    inbox: list[dict[str, Any]] = []
    for contribution in module.inbox.values():
        tensors[f"inbox/{len(inbox)}"] = torch.from_numpy(contribution.payload.body.copy())
        inbox.append(
            {
                "source": contribution.source,
                "island": contribution.island,
                "round": contribution.round,
                "base_version": contribution.base_version,
                "attempt": contribution.attempt,
                "codec": contribution.payload.codec,
                "header": contribution.payload.header.decode(),
            }
        )
    verdicts = [[v.source, v.round, v.finite, v.shape_ok, v.norm, v.attempt] for v in module.verdicts.values()]
    return State(tensors=tensors, meta={"version": module.version, "inbox": inbox, "verdicts": verdicts})


def _module_from(key: ModuleKey, state: State) -> _Module:
    module = _Module(
        values={n.removeprefix("values/"): t for n, t in state.tensors.items() if n.startswith("values/")},
        outer={n.removeprefix("outer/"): t for n, t in state.tensors.items() if n.startswith("outer/")},
        version=state.meta["version"],
    )
    for index, entry in enumerate(state.meta["inbox"]):
        payload = Payload(
            codec=entry["codec"],
            header=entry["header"].encode(),
            body=state.tensors[f"inbox/{index}"].numpy(),
        )
        module.inbox[entry["round"], entry["source"]] = Contribution(
            module=key,
            source=entry["source"],
            island=entry["island"],
            round=entry["round"],
            base_version=entry["base_version"],
            attempt=entry["attempt"],
            payload=payload,
        )
    for source, round_, finite, shape_ok, norm, attempt in state.meta["verdicts"]:
        module.verdicts[round_, source] = Verdict(
            module=key, source=source, round=round_, finite=finite, shape_ok=shape_ok, norm=norm, attempt=attempt
        )
    return module
