"""Where a run starts: fresh, from given weights, or where an earlier run's newest checkpoint left off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diloco import checkpoint as ckpt
from diloco import config as configuration
from diloco import rundir, seats
from diloco.config import RunConfig
from diloco.messages import Modules
from diloco.norms import Norms
from diloco.views import RunView
from diloco.workload import Corpus

MAX_TRIES = 3
COUNTED = ("recoveries", "rounds_again")
ELASTIC = ("min_islands", "max_islands", "patience")
MAY_DIFFER = ("islands", "workers", "rounds", "runtime", "checkpoint", "metrics", "threads_per_worker", *ELASTIC)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run begins with."""

    config: RunConfig
    directory: Path
    checkpoint: str = ""  # empty = fresh
    manifest: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    earlier_s: float = 0.0  # that the run took before this process
    recoveries: int = 0  # returns to a checkpoint so far
    rounds_again: int = 0  # rounds that had been committed, and were lost by them
    goes_on: bool = False  # started again by itself, after a loss: it makes do with the places that are left
    tries: int = 0  # in this process since it last found a newer checkpoint


def resolve(config: RunConfig, directory: Path | None, *, goes_on: bool = False) -> Start:
    """Find what `config.resume` names, and clear away what a killed run left half-written there.

    `goes_on`: it is known that the run was killed, also where no round was lost by that.
    Raises ValueError, before anything is touched, where the configuration cannot be gone on with.
    """
    found = Path(config.resume).resolve() if config.resume else None
    if config.resume == "auto":
        found = newest(config.name)
    if found is None:
        return Start(config=config, directory=directory or rundir.new_directory(config.name), goes_on=goes_on)
    if not found.is_dir():
        raise ValueError(f"resume={config.resume} is no directory; give a run's directory, or auto")
    return _resumed(config, found, goes_on)


def again(start: Start, reason: str) -> Start:
    """Where to go on after the store was lost: the newest complete checkpoint, or the start where there is none.

    Raises RuntimeError where the last few attempts have brought no newer one.
    """
    folder = ckpt.CheckpointFolder(checkpoint_root(start.config, start.directory))
    folder.clean()
    path, manifest = folder.newest() if folder.names() else ("", None)
    tries = 1 if path != start.checkpoint else start.tries + 1
    reason = reason.rstrip(".")
    if tries > MAX_TRIES:
        raise RuntimeError(f"{reason}; gave up after {MAX_TRIES} attempts without a new checkpoint")
    round_ = manifest["view"]["round"] if manifest else 0
    lost = _lost_rounds(rundir.last_records(start.directory), round_)
    saved = manifest["view"]["counters"] if manifest else {}
    recoveries, rounds_again = _counted(start.directory, saved, lost, again=True)
    return replace(
        start,
        checkpoint=path,
        manifest=manifest,
        notes=(*start.notes, _going_on(reason, round_, lost)),
        recoveries=recoveries,
        rounds_again=rounds_again,
        goes_on=True,
        tries=tries,
    )


def _going_on(reason: str, round_: int, lost: int) -> str:
    return f"{reason}; the run goes on from round {round_}, {lost} round(s) before"


def _lost_rounds(told: Sequence[Mapping[str, Any]], round_: int) -> int:
    """Rounds after that one which the newest records tell of."""
    return max(int(_most(told, "total/rounds")) - round_, 0)


def _most(told: Sequence[Mapping[str, Any]], figure: str) -> float:
    """The most that records tell of a figure."""
    return max((record.get(figure, 0) for record in told), default=0)


def _counted(directory: Path, saved: Mapping[str, int], lost: int, *, again: bool) -> tuple[int, int]:
    """The run's returns to a checkpoint and the rounds lost by them: `saved` in that one, and this return if it is one.

    What the last process began with counts too: no checkpoint has it where that ended before its first one. A process
    or attempt that never began has counted nothing, so that its return is this one.
    """
    begun = rundir.last_start(directory)
    recoveries, rounds_again = (max(each.get(name, 0) for each in (saved, begun)) for name in COUNTED)
    return recoveries + again, rounds_again + lost


def newest(name: str) -> Path | None:
    """The directory of the newest run of this name that has a complete checkpoint."""
    for found in rundir.candidates(name):
        with suppress(ValueError):  # of another version, or broken off
            saved = configuration.load(found / "config.yaml")
            if saved.name == name and ckpt.CheckpointFolder(checkpoint_root(saved, found)).names():
                return found
    return None


def checkpoint_root(config: RunConfig, directory: Path) -> str:
    """Where a run keeps its checkpoints: in its directory, or below `checkpoint.path` under its name."""
    if not config.checkpoint.path:
        return str(directory / "checkpoints")
    below = directory.relative_to(rundir.RUNS.absolute()) if directory.is_relative_to(rundir.RUNS.absolute()) else None
    name = "_".join(below.parts) if below is not None else directory.name
    return f"{config.checkpoint.path.rstrip('/')}/{name}"


def starting_folder(init_from: str) -> str:
    """Where the weights that `init_from` names lie: a run's newest checkpoint, or the folder itself."""
    path = Path(init_from)
    if not (path / "config.yaml").is_file():
        return str(path.resolve()) if path.exists() else init_from
    saved = configuration.load(path / "config.yaml")
    return ckpt.CheckpointFolder(checkpoint_root(saved, path.resolve())).newest()[0]


def _resumed(config: RunConfig, directory: Path, goes_on: bool) -> Start:
    saved = configuration.load(directory / "config.yaml")
    config = _as_begun(config, saved)
    differing = _differences(saved, config)
    if differing:
        raise ValueError(
            f"resume={config.resume}: only {', '.join(MAY_DIFFER)} may differ from the saved configuration, but"
            f" {'; '.join(differing[:3])}"
        )
    folder = ckpt.CheckpointFolder(checkpoint_root(saved, directory))
    folder.clean()  # a replacement that was broken off is put back
    path, manifest = folder.newest()
    round_ = manifest["view"]["round"]
    if round_ > config.rounds:
        raise ValueError(f"rounds={config.rounds}: the checkpoint has {round_} already; give more")
    notes = tuple(f"passed over a damaged checkpoint: {problem}" for problem in folder.problems)
    if saved.workers != config.workers:
        notes += (f"resumed with workers={config.workers} instead of {saved.workers}: sums have another order",)
    told = rundir.last_records(directory)
    lost = _lost_rounds(told, round_)  # if it was killed
    if goes_on:
        notes += (_going_on("the run's process was killed", round_, lost),)
    counters = manifest["view"]["counters"]
    recoveries, rounds_again = _counted(directory, counters, lost, again=goes_on or lost > 0)
    return Start(
        config=config,
        directory=directory,
        checkpoint=path,
        manifest=manifest,
        notes=notes,
        earlier_s=max(manifest["wall_s"], _most(told, "time_s")),  # what was lost took its time too
        recoveries=recoveries,
        rounds_again=rounds_again,
        goes_on=goes_on,
    )


def _as_begun(config: RunConfig, saved: RunConfig) -> RunConfig:
    """`config` with what it leaves to be derived as the run has derived it, once, at its start."""
    if config.layout.num_paths() == saved.layout.num_paths():  # else they differ, which is told with the rest
        config = replace(config, workload=config.workload.for_paths(config.layout.num_paths()))
    if config.store.shards == 0:
        config = replace(config, store=replace(config.store, shards=saved.store.shards))
    if type(config.outer) is type(saved.outer):
        derived = vars(config.outer.resolved(1))  # whatever the number: to see which settings are left open
        kept = {name: vars(saved.outer)[name] for name, value in vars(config.outer).items() if derived[name] != value}
        config = replace(config, outer=replace(config.outer, **kept))
    return config


def _differences(saved: RunConfig, given: RunConfig) -> list[str]:
    before, after = (rundir.flat(configuration.plain(config)) for config in (saved, given))
    found = []
    for key in sorted({*before, *after}):
        top = key.removeprefix("choices.").partition(".")[0]
        if top not in (*MAY_DIFFER, "resume", "experiment", "imports") and before.get(key) != after.get(key):
            found.append(f"{key}={after.get(key)} was {before.get(key)}")
    return found


def starting_view(config: RunConfig, corpus: Corpus, modules: Modules) -> RunView:
    """What the coordinator knows at a run's start."""
    view = RunView(
        paths=modules.paths,
        fragments=modules.fragments if config.schedule.by_fragment else (),
        seed=config.seed,
        rounds=config.rounds,
        inner_steps=config.inner_steps,
        segment_steps=config.segment_steps,
        eval_every=config.eval_every,
        save_every=config.checkpoint.every,
        shard_examples=corpus.shard_examples(),
        free=config.schedule.free,
        moving=config.schedule.moving,
        norms=Norms(mads=config.store.norm_mads),
        patience=0.0 if config.runtime.waits_for_all else config.patience,
        min_islands=config.min_islands,
        splits=tuple(config.workload.splits()),
    )
    pooled = config.schedule.free and not config.schedule.moving  # else each source keeps to its own data
    view.pool = view.new_pool(config.schedule.drawn) if pooled else None
    seats.begin(view, modules, config.islands)
    return view
