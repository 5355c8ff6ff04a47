"""train(config) -> Result: build the parts, hand them to a runtime, and drive it with the coordinator."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diloco import checkpoint as ckpt
from diloco import config as configuration
from diloco import planner, resume, rundir, saved_view, stopping, summary, tasks
from diloco.config import RunConfig
from diloco.coordinator import Coordinator
from diloco.display import Display
from diloco.events import Event, Log, Run, Save, Started, Stop
from diloco.interrupts import interruptible
from diloco.jobs import make_job
from diloco.layout import check_blocks
from diloco.messages import IslandId, Modules, Shape, Written
from diloco.metrics import MetricsWriter, open_metrics
from diloco.replica import ReplicaKind
from diloco.runtime.base import Backend, Final, StoreLost
from diloco.views import RunView
from diloco.workload import Corpus


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to: `summary.json`, and where the run's directory is."""

    summary: dict[str, Any]
    directory: Path


def train(config: RunConfig, directory: Path | None = None, *, goes_on: bool = False) -> Result:
    """Run `config` to its end, in `directory` (default: a new one below `runs/`).

    `goes_on`: started again by itself; it makes do with the places that are left of the cluster, and waits for them.
    Returns also where the run stopped by its own rule or was interrupted; `summary["status"]` says which.
    Raises ValueError for a mistake in the configuration or input, before anything is written. Of the processes that a
    launcher starts for runtime `spmd`, rank 0 drives the run and writes; the others follow it to the same result.
    """
    begun_s = time.monotonic()
    config.runtime.suited(config.schedule)
    told = config.runtime.follow(config.workers_by_island())
    if told is not None:
        return Result(summary=dict(told), directory=Path(told["run_directory"]))
    config.metrics.check()
    start = resume.resolve(config, directory, goes_on=goes_on)
    while True:
        try:
            return _attempt(start, begun_s)
        except StoreLost as lost:
            start = resume.again(start, str(lost))
            _say(start.notes[-1])


def _attempt(start: resume.Start, begun_s: float) -> Result:
    """From where `start` says to the run's end. Raises StoreLost where another attempt can go on."""
    config = start.config.resolved()
    ckpt.check_writable(resume.checkpoint_root(config, start.directory))
    job = replace(make_job(config), goes_on=start.goes_on)
    init_from = resume.starting_folder(config.init_from) if config.init_from and not start.checkpoint else ""
    _say("preparing the corpus and the tokenizer")
    corpus = job.corpus()
    if start.manifest is not None and start.manifest["data_sha256"] != corpus.sha256:
        raise ValueError(
            f"resume={start.directory}: the data is no longer what it was (sha256 {corpus.sha256[:12]} now,"
            f" {start.manifest['data_sha256'][:12]} then); restore it, or start a run with init_from={start.directory}"
        )
    _say(f"starting {config.islands} island(s)")
    backend = config.runtime.open(job)
    try:
        shapes = backend.shapes()
        modules = config.layout.build(shapes, job.shards)
        config.schedule.check(config.inner_steps, len(modules.fragments), config.islands)
        if config.replica is ReplicaKind.fsdp2:
            check_blocks(modules)
        if start.manifest is not None:
            ckpt.check_layout(start.manifest["layout"], modules, shapes)
        backend.setup(modules)
        backend.check_folder(resume.checkpoint_root(config, start.directory))
        view = resume.starting_view(config, corpus, modules)
        session = _Session(replace(start, config=config), backend, view, modules, shapes, corpus)
        if start.manifest is None:
            view.hold(backend.fill(init_from))
        else:
            session.take_up(start.manifest["view"])
        _say("\n".join(planner.lines(planner.plan_of(config, modules, shapes))))
        return session.run(begun_s)
    finally:
        backend.close()


class _Session:
    """One run from its first event to its last, in its directory."""

    def __init__(
        self,
        start: resume.Start,
        backend: Backend,
        view: RunView,
        modules: Modules,
        shapes: Mapping[str, Shape],
        corpus: Corpus,
    ) -> None:
        self._start, self._config, self._directory = start, start.config, start.directory
        self._backend, self._view, self._modules, self._shapes = backend, view, modules, shapes
        self._corpus = corpus
        self._root = resume.checkpoint_root(self._config, self._directory)
        self._notes = [*start.notes, *start.config.notes(), *start.config.workload.warnings(corpus)]
        self._parameters = sum(math.prod(shape) for shape in shapes.values())
        self._environment = rundir.environment()
        view.best_folder = str(self._directory.absolute() / "best") if self._config.workload.stops_early() else ""

    def take_up(self, saved: Mapping[str, Any]) -> None:
        """Go on where a checkpoint left off."""
        before = len(saved["sources"])
        saved_view.load(self._view, saved)
        if before != self._config.num_sources():
            self._view.restart_rounds()
            self._notes.append(
                f"resumed with {self._config.islands} islands instead of {before}: the data was assigned anew"
            )
        sources = {source: source for source in self._view.sources if source < before}
        islands = {source: IslandId(source) for source in sources}
        self._backend.load(self._start.checkpoint, islands, saved["now_s"])

    def run(self, begun_s: float) -> Result:
        """The main loop, and what is left behind. `begun_s`: when the run was asked for, by the monotonic clock."""
        counters = self._view.counters
        counters.recoveries, counters.rounds_again = self._start.recoveries, self._start.rounds_again
        self._directory.mkdir(parents=True, exist_ok=True)
        summary.write_text(self._directory / "config.yaml", configuration.to_yaml(self._config))
        rundir.point_latest(self._directory)
        manifest = self._start.manifest or {}
        # Where sources run free, checkpoints wait until all is handed over, and positions are those of drawn shards.
        ordered = self._view.sources.values() if self._view.pool is None else ()
        writer, display = open_metrics(
            self._directory,
            self._config.metrics,
            name=self._config.name,
            rounds=self._config.rounds,
            config=configuration.plain(self._config),
            resume_bytes=manifest.get("metrics_bytes", 0 if self._start.tries else None),
            resume_round=self._view.round,
            resume_steps={source.source: source.position for source in ordered},
            earlier_s=self._start.earlier_s + time.monotonic() - begun_s,
            more=self._backend.sinks(self._directory.name),
        )
        try:
            stop, final = self._drive(writer, display)
            result = self._conclude(stop, final, writer.elapsed_s)
            if final.written.text:
                told = {"text": final.written.text, "table": final.written.table}
                writer.write({"event": "sample", "round": self._view.round, **told})
            writer.write({"event": "end", "round": self._view.round, "status": stop.status})
            _show(display, result, final)
            self._backend.conclude(result.summary)
            return result
        except StoreLost:
            raise
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self._conclude(Stop(status=status, reason=f"{type(error).__name__}: {error}"), None, writer.elapsed_s)
            raise
        finally:
            writer.close()

    def _drive(self, writer: MetricsWriter, display: Display) -> tuple[Stop, Final]:
        schedule = self._config.runtime.suited(self._config.schedule)
        coordinator = Coordinator(schedule=schedule, run=self._view)
        defaults = configuration.defaults_of_changed(self._config)
        paths = summary.told_at_start(self._view.paths, self._corpus.describe())
        lost = {name: vars(self._start)[name] for name in resume.COUNTED}
        now = {"round": self._view.round, "unix_s": time.time()}
        begun = {"event": "start", **now, **lost, **self._environment, "defaults": defaults, **paths}
        writer.write(begun)
        for note in self._notes:
            if not (self._start.tries and note in writer.warned):
                writer.write({"event": "warning", "round": self._view.round, "message": note})
        stop: Stop | None = None
        counters, start_s = self._view.counters, time.monotonic()
        event: Event = Started(now_s=self._backend.now_s(), absent=self._backend.absent())
        before_s, clock_before_s = counters.train_s, counters.clock_s - event.now_s
        islands = self._view.islands
        display.watch(lambda: {number: view.queued > 0 for number, view in islands.items() if view.alive})
        with interruptible(self._backend, display.message):
            while stop is None:
                counters.train_s = before_s + time.monotonic() - start_s
                counters.clock_s = clock_before_s + event.now_s
                for command in coordinator.handle(event):
                    match command:
                        case Log():
                            writer.write({**command.record, "clock_s": event.now_s})
                        case Save():
                            self._save(command, writer)
                        case Stop():
                            stop = command
                        case _:
                            self._backend.carry_out(command)
                if stop is None:
                    event = self._backend.next_event(coordinator.wake_s)
        if stop.status == "interrupted" and self._backend.relocates:
            raise StoreLost("a node that holds a part of the store is leaving")
        return stop, self._final(self._directory / "export" if stop.status == "finished" else None)

    def _final(self, export: Path | None) -> Final:
        """The result, exported; where there are several paths, a folder for each, beside what they share."""
        finals = []
        several = len(self._modules.paths) > 1
        for path in range(len(self._modules.paths)):
            present = tasks.present(self._view, path)
            folder = export / f"path{path}" if export and several else export
            run = Run(task=present, wants=self._view.evaluator.give(present))
            finals.append(self._backend.finish(run, str(folder) if folder else None, ""))
            best = self._view.best.get(path)
            if folder and best and best.round < self._view.round:  # a sample of the last weights is not one of these
                shutil.rmtree(folder)
                shutil.copytree(stopping.folder_of(self._view.best_folder, path, best.round), folder)
                finals[-1] = replace(finals[-1], written=Written())
        if export and several:
            table = {"paths": [dict(path) for path in self._modules.paths]}
            summary.write_text(export / "paths.json", json.dumps(table, indent=1) + "\n")
            self._config.workload.export_shared(self._corpus, export)
        return replace(finals[0], weights_sha256=summary.of_paths([final.weights_sha256 for final in finals]))

    def _save(self, command: Save, writer: MetricsWriter) -> None:
        manifest = {
            "view": command.view,
            "layout": ckpt.describe_modules(self._modules, self._shapes),
            "metrics_bytes": writer.nbytes,
            "wall_s": writer.elapsed_s,
            "data_sha256": self._corpus.sha256,
            "config": configuration.to_yaml(self._config),
            **self._environment,
        }
        self._backend.save(self._root, command.name, manifest, self._config.checkpoint.keep)
        if self._view.best_folder:
            saved = [int(name.split("-")[1]) for name in ckpt.CheckpointFolder(self._root).names()]
            stopping.prune(Path(self._view.best_folder), self._view.best, saved)

    def _conclude(self, stop: Stop, final: Final | None, wall_s: float) -> Result:
        config, view = self._config, self._view
        found: dict[str, Any] = {
            "name": config.name,
            "experiment": config.experiment,
            "seed": config.seed,
            "status": stop.status,
            "reason": stop.reason,
            "runtime": configuration.choice_of("runtime", config.runtime),
            "islands": config.islands,
            "workers": config.workers,
            "inner_steps": config.inner_steps,
            "rounds": view.round,
            "parameters": None if final is None else final.parameters,
            "trainable_parameters": self._parameters,
            **summary.outcome(view.counters, islands=config.islands, parameters=self._parameters, wall_s=wall_s),
            **summary.measured(view.counters, has_perplexity=config.workload.has_perplexity()),
            **summary.routed(view.counters, paths=len(view.paths), beside=config.metrics.beside),
            **summary.digests(final),
            **({"best_rounds": {path: best.round for path, best in view.best.items()}} if view.best else {}),
            "data_sha256": self._corpus.sha256,
            "data": self._corpus.describe(),
            "notes": self._notes,
            **self._environment,
            "run_directory": str(self._directory),
            "checkpoint": self._newest_checkpoint(),
            "export": str(self._directory / "export") if stop.status == "finished" else None,
        }
        summary.write(self._directory / "summary.json", found)
        return Result(summary=found, directory=self._directory)

    def _newest_checkpoint(self) -> str | None:
        names = ckpt.CheckpointFolder(self._root).names()
        return f"{self._root}/{names[-1]}" if names else None


def _show(display: Display, result: Result, final: Final) -> None:
    display.summary(result.summary)
    if final.written.table:
        display.table(final.written.table)
    elif final.written.text:
        display.message(f"sample:\n{final.written.text}")
    if result.summary["status"] == "interrupted":
        display.message(f"go on with: diloco train resume={result.directory}")
    if result.summary["reason"]:
        display.message(f"{result.summary['status']}: {result.summary['reason']}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
