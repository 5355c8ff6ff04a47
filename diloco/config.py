"""RunConfig: the objects themselves are the configuration. Every default stands in its own dataclass."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from diloco import codec as codecs
from diloco import inner as inners
from diloco import merge as merges
from diloco import outer as outers
from diloco import redaction
from diloco import schedule as schedules
from diloco.checkpoint import Checkpoint
from diloco.codec import Codec
from diloco.data import Data
from diloco.inner import Inner
from diloco.layout import Fragments, Layout, Whole
from diloco.merge import Merge
from diloco.metrics import Metrics
from diloco.outer import OuterOptimizer
from diloco.registry import GROUPS as GROUPS
from diloco.registry import choice_of as choice_of
from diloco.registry import choices as choices
from diloco.registry import part as part
from diloco.registry import register as register
from diloco.replica import ReplicaKind
from diloco.runtime.base import Runtime, Store
from diloco.runtime.local import Local
from diloco.runtime.ray_cluster import RayCluster
from diloco.runtime.spmd import Spmd
from diloco.schedule import Schedule
from diloco.workload import Workload
from diloco.workloads.causal_lm import CausalLM
from diloco.workloads.online import Online
from diloco.workloads.preference import Preference
from diloco.workloads.reward_model import RewardModel
from diloco.workloads.sft import SFT
from diloco.workloads.unpaired import Unpaired


@dataclass(kw_only=True)
class RunConfig:
    """One run. Every field is a key of the command line; the groups hold the parts themselves."""

    name: str = "run"
    experiment: str = ""  # the named experiment that this came from
    seed: int = 0
    islands: int = 2
    min_islands: int = 0  # places for so many are enough to start, and with fewer no outer step is taken; 0 = all, any
    max_islands: int = 0  # as nodes join, up to so many; 0 = `islands`
    patience: float = 10.0  # how far beyond the usual is waited for an island; 0 = for ever. See diloco/patience.py
    workers: Any = 1  # processes in each island, or a list with one number an island
    replica: ReplicaKind = ReplicaKind.ddp  # how the workers of an island share the model
    inner_steps: int = 50  # H: inner steps a round
    rounds: int = 10
    segment_steps: int = 10  # a round is cut into tasks of at most so many steps; changes no result. 0 = uncut
    eval_every: int = 1  # rounds; 0 = only at the start and the end
    resume: str = ""  # a run's directory, or auto
    init_from: str = ""  # a run's directory or a folder with safetensors: where the weights start
    threads_per_worker: int = 1
    gpus_per_worker: float = 0.0
    imports: list[str] = field(default_factory=list)  # modules with the user's own parts (--import)
    workload: Workload = field(default_factory=CausalLM)
    data: Data = field(default_factory=Data)
    inner: Inner = field(default_factory=inners.AdamW)
    layout: Layout = field(default_factory=Whole)
    schedule: Schedule = field(default_factory=schedules.Barrier)
    merge: Merge = field(default_factory=merges.Mean)
    outer: OuterOptimizer = field(default_factory=outers.Nesterov)
    codec: Codec = field(default_factory=codecs.Float32)
    codec_down: Codec = field(default_factory=codecs.Float32)
    store: Store = field(default_factory=Store)
    runtime: Runtime = field(default_factory=RayCluster)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        least = {"seed": 0, "islands": 1, "inner_steps": 1, "rounds": 1, "segment_steps": 0, "eval_every": 0}
        least |= {"min_islands": 0, "max_islands": 0, "patience": 0, "threads_per_worker": 1, "gpus_per_worker": 0}
        for key, minimum in least.items():
            if not vars(self)[key] >= minimum:
                wrong = "too small" if vars(self)[key] < minimum else "no number"
                raise ValueError(f"{key}={vars(self)[key]} is {wrong}; give at least {minimum}")
        self._check_range()
        known = [kind.value for kind in ReplicaKind]
        if self.replica not in [*ReplicaKind, *known]:
            raise ValueError(f"replica={self.replica} is unknown; use {' or '.join(known)}")
        self.replica = ReplicaKind(self.replica)  # config.yaml has its name
        for workers in self.workers_by_island():
            parts = workers * self.data.accumulation
            if self.data.batch % parts:
                raise ValueError(
                    f"workers={workers} with data.accumulation={self.data.accumulation} do not divide"
                    f" data.batch={self.data.batch}, an island's sequences a step; use a multiple of {parts},"
                    " or fewer workers"
                )
            if parts > 1 and (reason := self.workload.needs_whole_batch()):
                raise ValueError(f"{reason}: use workers=1 and data.accumulation=1")
        if self.replica is ReplicaKind.fsdp2 and isinstance(self.layout, Whole | Fragments):
            derived = isinstance(self.layout, Fragments) or not self.layout.patterns
            self.layout = replace(self.layout, keep_blocks=derived)
        self._check_paths()
        redaction.check(self)
        if not self.name or "/" in self.name:
            raise ValueError(f"name={self.name!r} becomes part of a folder's name; use letters, digits, - and _")

    def _check_range(self) -> None:
        """With `max_islands`, that is how many there are to be; those without a place yet are waited for."""
        if self.max_islands and self.max_islands < self.islands:
            raise ValueError(f"max_islands={self.max_islands} is less than islands={self.islands}; give at least that")
        if self.max_islands:
            self.min_islands = self.min_islands or self.islands
            self.islands = self.max_islands
        if self.min_islands > self.islands:
            most = f"max_islands={self.islands}" if self.max_islands else f"islands={self.islands}"
            raise ValueError(f"min_islands={self.min_islands} is more than {most}; give fewer, or more max_islands")
        if self.min_islands and self.runtime.waits_for_all:
            raise ValueError(
                "min_islands and max_islands need islands that come and go: use runtime=ray_cluster,"
                f" and not {choice_of('runtime', self.runtime)}, whose processes wait for each other"
            )

    def _check_paths(self) -> None:
        paths = self.layout.num_paths()
        if not self.schedule.moving and paths > self.islands:
            raise ValueError(
                f"islands={self.islands} are fewer than the layout's {paths} paths, of which each island trains one;"
                f" use schedule=path_rounds, where they take turns, or islands={paths}"
            )
        if paths > 1 and self.schedule.free and not self.schedule.moving:
            raise ValueError(
                f"schedule={choice_of('schedule', self.schedule)} takes data from a pool for all islands, and each of"
                f" the layout's {paths} paths has data of its own: use schedule=path_rounds or path_first_come"
            )
        self.workload.for_paths(paths)  # raises where it cannot be, as the next does
        if self.workload.num_blocks():
            self.layout.check_depth(self.workload.num_blocks())
        if self.replica is ReplicaKind.fsdp2:
            moves = "what belongs to a path is spread over its workers, and paths move"
            reason = moves if self.schedule.moving else self.workload.needs_whole_model()
            if reason:
                raise ValueError(f"replica=fsdp2: {reason}; use ddp")

    def workers_by_island(self) -> tuple[int, ...]:
        """How many workers each island has. Raises ValueError where `workers` does not say that."""
        given = self.workers if isinstance(self.workers, list | tuple) else [self.workers] * self.islands
        if not all(isinstance(w, int) and not isinstance(w, bool) and w >= 1 for w in given):
            raise ValueError(f"workers={self.workers}: give a number of at least 1, or a list of them")
        if len(given) != self.islands:
            raise ValueError(
                f"workers={self.workers} has {len(given)} numbers for islands={self.islands}; give one each"
            )
        return tuple(given)

    def notes(self) -> list[str]:
        """What may not be meant."""
        notes, paths = [], self.layout.num_paths()
        if self.min_islands and not self.runtime.loses_islands:
            runtime = choice_of("runtime", self.runtime)
            notes.append(f"runtime={runtime} has a place for all {self.islands} islands: min_islands changes nothing")
        if paths > 1 and not self.schedule.moving:
            notes.append(
                f"schedule={choice_of('schedule', self.schedule)} keeps each of the {paths} paths on islands of its own"
                ", and the steps of shared modules as short as they come out: for DiPaCo choose schedule=path_rounds"
            )
        return notes

    def num_sources(self) -> int:
        """How many contribute: as many as islands, or as the layout has paths for."""
        return self.schedule.num_sources(self.islands, self.layout.num_paths())

    def resolved(self) -> RunConfig:
        """The same with all that is left to be derived from the number of islands; once, at a run's start.

        What depends on how many paths a module is part of is left to the store, which has it for each module.
        """
        store, paths = replace(self.store, shards=self.store.resolved(self.islands)), self.layout.num_paths()
        outer = self.outer if paths > 1 else self.outer.resolved(self.schedule.commits_a_round(self.islands))
        return replace(self, workload=self.workload.for_paths(paths), store=store, outer=outer)


SINGLE = {"data": Data, "store": Store, "checkpoint": Checkpoint, "metrics": Metrics}
_DEFAULTS = {
    "workload": "causal_lm", "inner": "adamw", "layout": "whole", "schedule": "barrier", "merge": "mean",
    "outer": "nesterov", "codec": "float32", "codec_down": "float32", "runtime": "ray_cluster",
}  # fmt: skip


def plain(config: RunConfig) -> dict[str, Any]:
    """The resolved configuration as plain values, with the class of each group by name under `choices`."""
    values = {f.name: vars(config)[f.name] for f in fields(config)}
    for key in (*GROUPS, *SINGLE):
        values[key] = OmegaConf.to_container(OmegaConf.structured(values[key]), enum_to_str=True)
    values["replica"] = config.replica.value
    return {"choices": {key: choice_of(key, vars(config)[key]) for key in GROUPS}, **values}


def defaults_of_changed(config: RunConfig) -> dict[str, Any]:
    """The defaults of those keys that differ from them, such as `{"islands": 2, "inner.lr": 0.0004}`.

    The settings of a part are compared with the defaults of its own class.
    """
    values, usual = plain(config), plain(RunConfig())
    chosen, usually_chosen = values.pop("choices"), usual.pop("choices")
    found = {key: usually_chosen[key] for key in chosen if chosen[key] != usually_chosen[key]}
    for key, value in values.items():
        if key in GROUPS or key in SINGLE:
            own: Any = OmegaConf.to_container(OmegaConf.structured(type(vars(config)[key])), enum_to_str=True)
            found |= {f"{key}.{name}": own[name] for name in own if value[name] != own[name]}
        elif value != usual[key]:
            found[key] = usual[key]
    return found


def to_yaml(config: RunConfig) -> str:
    """`plain(config)` as the text of `config.yaml`."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def load(path: Path) -> RunConfig:
    """Read a run's `config.yaml` back, importing the user's own parts that it names. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the directory of a run")
    try:
        return from_mapping(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]
    except ImportError as error:
        raise ValueError(f"{path}: one of its imports fails: {error}") from error
    except (OmegaConfBaseException, YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of this version: {error}") from error


def from_mapping(saved: Mapping[str, Any]) -> RunConfig:
    """A RunConfig from plain values with `choices`, as `to_yaml` writes them."""
    saved = dict(saved)
    chosen = saved.pop("choices")
    for module in saved.get("imports", []):
        importlib.import_module(module)
    parts: dict[str, Any] = {}
    for key, value in saved.items():
        if key in GROUPS:
            if chosen[key] not in choices(GROUPS[key]):
                raise ValueError(f"{key}={chosen[key]} is not registered; --import the module that registers it")
            node = part(GROUPS[key], chosen[key])
            parts[key] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(node), value))
        elif key in SINGLE:
            parts[key] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SINGLE[key]), value))
        else:
            parts[key] = value
    return RunConfig(**parts)


def _register_own() -> None:
    own: dict[str, dict[str, type]] = {
        "workload": {
            "causal_lm": CausalLM,
            "sft": SFT,
            "preference": Preference,
            "unpaired": Unpaired,
            "reward_model": RewardModel,
            "online": Online,
        },
        "inner": {"adamw": inners.AdamW, "muon": inners.Muon, "sgd": inners.Sgd},
        "layout": {"whole": Whole, "fragments": Fragments},
        "schedule": {"barrier": schedules.Barrier},
        "merge": {"mean": merges.Mean, "rda": merges.RDA, "slerp": merges.Slerp, "trimmed_mean": merges.TrimmedMean},
        "outer": {"sgd": outers.Sgd, "nesterov": outers.Nesterov},
        "codec": {
            "float32": codecs.Float32,
            "bfloat16": codecs.BFloat16,
            "int8": codecs.Int8,
            "int4": codecs.Int4,
            "topk": codecs.TopK,
        },
        "runtime": {"local": Local, "ray_cluster": RayCluster, "spmd": Spmd},
    }
    for group, nodes in own.items():
        for name, node in nodes.items():
            register(group=group, name=name, node=node)
    store = ConfigStore.instance()
    # The schema is an instance with its groups open: a class default of another class would block a group choice.
    schema = RunConfig()
    for key in GROUPS:
        setattr(schema, key, MISSING)
    store.store(name="schema", node=schema)
    defaults: list[Any] = ["schema"]
    defaults += [{key if key == group else f"{group}@{key}": _DEFAULTS[key]} for key, group in GROUPS.items()]
    store.store(name="config", node={"defaults": [*defaults, "_self_"]})


_register_own()
