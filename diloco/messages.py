"""The records that travel between coordinator, islands and store: frozen, without behaviour.

Shapes and units are in the fields' comments. Nothing here imports torch, Ray or a clock, so the
coordinator can be tested by events alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NewType, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Tensors: TypeAlias = "dict[str, Tensor]"  # canonical parameter name -> full (unsharded) tensor
Shape: TypeAlias = tuple[int, ...]

# Ids are typed, so that a rank can never be looked up in a list of something else (pitfall L22).
SourceId = NewType("SourceId", int)  # who contributes: the island in DiLoCo, the path in DiPaCo
IslandId = NewType("IslandId", int)  # a group of workers; EVALUATOR trains nothing
ShardId = NewType("ShardId", int)  # a part of the training data
SlotName = NewType("SlotName", str)  # a named group of parameters
ModuleKey = NewType("ModuleKey", str)  # "slot/index": one set of values that fits a slot

EVALUATOR = IslandId(-1)


@dataclass(frozen=True, kw_only=True)
class Modules:
    """What a `Layout` built: slots partition the trainable parameters; a path names a module for each slot."""

    slots: Mapping[SlotName, tuple[str, ...]]  # the parameter names of each slot, in the model's order
    paths: tuple[Mapping[SlotName, ModuleKey], ...]  # path index -> which module fills which slot
    shards: Mapping[ModuleKey, int]  # which shard of the store holds a module
    fragments: tuple[tuple[SlotName, ...], ...] = ()  # slots that are exchanged together, in order; () = all at once

    def __post_init__(self) -> None:
        if not self.fragments:
            object.__setattr__(self, "fragments", (tuple(self.slots),))

    def slot_of(self, module: ModuleKey) -> SlotName:
        """The slot that `module` fills: the part of its key before the last slash."""
        return SlotName(module.rpartition("/")[0])


@dataclass(frozen=True, kw_only=True, order=True)
class Turn:
    """One source's turn to contribute: of a round it has one for each fragment, in their order."""

    source: SourceId
    round: int
    fragment: int


@dataclass(frozen=True, kw_only=True)
class Settled:
    """What became of a contribution. Told again and again, so that no lost task matters."""

    round: int
    fragment: int
    accepted: bool


@dataclass(frozen=True, kw_only=True)
class KeepBest:
    """Write the evaluated model to `folder` if its `stop_loss` is `below` that of the best round so far."""

    folder: str
    below: float


@dataclass(frozen=True, kw_only=True)
class Task:
    """Install these modules, train some steps on this data, contribute those slots: a unit of an island's work."""

    source: SourceId
    island: IslandId
    round: int
    segment: int  # which part of the round; only the first installs, only the last sends
    modules: Mapping[SlotName, ModuleKey]  # the path: a whole runnable model
    install: Mapping[SlotName, int]  # slots to install before training -> the version to install
    keep: float  # share of the local weights that survives the install: 0 = take the global ones, 1 = keep its own
    shard: ShardId
    first_step: int  # position in the shard's data and in the rate schedule
    steps: int
    send: tuple[SlotName, ...]
    last: bool  # ends the source's round
    round_steps: int = 0  # of the source's round in all
    fragment: int = 0  # whose turn in the round these steps belong to
    ends: bool = False  # ends that turn: what is sent, or was dropped, is this fragment
    fresh: bool = False  # start with empty optimizer state, since the source's weights were refused
    attempt: int = 0  # how often the source's work was given out anew; a later one replaces an earlier one
    evaluate: str | None = None  # a split to evaluate after installing
    keep_best: KeepBest | None = None  # where early stopping looks at the evaluation
    save: bool = False  # export the source's state after the last step, for a checkpoint
    sheds: bool = False  # which leaves weights out, since the source's next task installs all of them anew
    settled: tuple[Settled, ...] = ()  # what became of this source's last contributions, for error feedback

    @property
    def turn(self) -> Turn:
        """Whose contribution, of which round and fragment, the task works for."""
        return Turn(source=self.source, round=self.round, fragment=self.fragment)


@dataclass(frozen=True, kw_only=True, eq=False)
class Payload:
    """Encoded tensors: a small header and one contiguous buffer."""

    codec: str
    header: bytes  # JSON
    body: np.ndarray[Any, np.dtype[np.uint8]]  # uint8[n_bytes]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return len(self.header) + int(self.body.nbytes)

    def sha256(self) -> str:
        """Of the values, as they are encoded."""
        return hashlib.sha256(self.body.data).hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Contribution:
    """Anchor minus local weights of one module by one source. Idempotence key: (module, source, round, attempt)."""

    module: ModuleKey
    source: SourceId
    island: IslandId
    round: int
    base_version: int
    payload: Payload
    attempt: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """A module's values at a version. `base_version` None: full float32; else an update on exactly that version."""

    module: ModuleKey
    version: int
    base_version: int | None
    payload: Payload


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an island says of a finished task: under 4 kB, the only thing that the driver fetches."""

    task: Task
    tokens: int
    seconds: float  # spent in inner steps
    waiting_s: float  # between the end of the previous task and the start of this one
    clock_s: float = 0.0  # spent in inner steps by the runtime's clock, which may be virtual
    bytes_up: int
    bytes_down: int
    bytes_inside: int = 0  # between the workers of the island, by the formula of ring collectives
    metrics: Mapping[str, float] = field(default_factory=dict)


class Reason(Enum):
    """Why a contribution is rejected: the first three are found by the store, the others by the coordinator."""

    shape = "shape"  # wrong names or shapes, or bytes that cannot be decoded
    version = "version"  # made from a version that the module never had
    not_finite = "not_finite"
    norm = "norm"  # absurdly large beside those that counted before
    duplicate = "duplicate"  # of this source, round and attempt one was heard already, and counts
    zombie = "zombie"  # of an attempt that was given up together with its island


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the shard that holds a module found in one contribution to it."""

    module: ModuleKey
    source: SourceId
    round: int
    finite: bool
    shape_ok: bool
    norm: float  # L2 norm of the decoded contribution
    attempt: int = 0
    version_ok: bool = True

    @property
    def reason(self) -> Reason | None:
        """Why this part of the contribution may not count, if it may not."""
        if not self.shape_ok:
            return Reason.shape
        if not self.version_ok:
            return Reason.version
        return None if self.finite else Reason.not_finite

    @property
    def good(self) -> bool:
        """Whether it may count."""
        return self.reason is None


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Take one outer step on `module` with the contributions of these sources, in this order.

    What else was pushed by then of these rounds, or earlier ones, is dropped: by all sources, or with `rounds` by
    those that are named.
    """

    module: ModuleKey
    round: int
    sources: tuple[SourceId, ...]
    weights: tuple[float, ...]  # the examples behind each contribution; the merge normalises them
    rounds: tuple[int, ...] = ()  # of each contribution, where every source counts its own; () = all of `round`
    planned: tuple[float, ...] = ()  # where contributions are folded as they come: the weights of all that were awaited
    scale: float = 1.0  # multiplies the merged result: staleness damping, sqrt(P)

    @property
    def keys(self) -> tuple[tuple[int, SourceId], ...]:
        """Round and source of each contribution."""
        return tuple(zip(self.rounds or (self.round,) * len(self.sources), self.sources, strict=True))


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Add these contributions to what was heard of `module` in this round: the next ones, in order of source."""

    module: ModuleKey
    round: int
    sources: tuple[SourceId, ...]
    weights: tuple[float, ...]  # the examples behind each
    planned: tuple[float, ...]  # the weights of all that are awaited in the round


@dataclass(frozen=True, kw_only=True)
class CommitStats:
    """What one module's outer step looked like; squares and dot products add up over modules."""

    module: ModuleKey
    round: int
    version: int  # after the step
    update_square: float  # squared L2 norm of (new values - old values)
    sources: tuple[SourceId, ...]
    weights: tuple[float, ...]  # of each contribution: the examples behind it
    gram: tuple[tuple[float, ...], ...]  # dot products of the contributions of the first few of `sources`
    rounds: tuple[int, ...]  # of each contribution
    staleness: tuple[int, ...]  # of each contribution: versions that the module took while it was made
    scale: float  # as in the commit


@dataclass(kw_only=True)
class State:
    """Named tensors and JSON values: what a source, a workload or a module saves."""

    tensors: Tensors = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What the trained model writes: a text, and rows of a table, all with the same columns."""

    text: str = ""
    table: list[dict[str, str]] = field(default_factory=list)
