"""One writer of metrics: JSONL always; the display and Weights & Biases take the same records as sinks.

A record has `event` and most often `round`; `island` where it has one; and metric keys such as `inner/loss`.
Events: start, segment (an island finished a task; its bytes are that task's), commit (`round` counts the
rounds done, without a barrier also the one that is being made; `total/` is the whole run's; `outer/alive` and
`outer/participating` count islands, `outer/weight` is the share of all examples that is behind the step), stale (a
contribution was refused), evaluation, checkpoint, warning, late, lost, joined, process (on Ray, one of the run's),
sample (what the trained model writes), end. A start has the time of day, `unix_s`, and `defaults`: those of the
configuration's keys that differ from them; `recoveries` and `rounds_again` are those so far, with the return that this
start is. `clock_s` is the runtime's clock, virtual in runtime local, and `clock_seconds` what a task took by it.
Of several paths a start has their modules and `routing`, an evaluation `eval/loss/PATH` and `eval/load/PATH`. For each
run of `metrics.beside` an evaluation has `beside/LABEL`: its loss after as many inner steps.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from diloco import beside
from diloco.beside import Beside
from diloco.display import Display
from diloco.fleet import Record
from diloco.redaction import redacted

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

__all__ = ["Display", "Metrics", "MetricsWriter", "Record", "Sink", "WandbMode", "WandbSink", "open_metrics"]


class WandbMode(Enum):
    """Whether records also go to Weights & Biases, and how."""

    off = "off"
    offline = "offline"  # into the run directory; `wandb sync` uploads it later
    online = "online"


@dataclass(kw_only=True)
class Metrics:
    """Settings: the Hydra group `metrics`."""

    wandb: WandbMode = WandbMode.off
    wandb_project: str = "diloco"
    live: bool = True  # draw the progress where the output is a terminal; else one line a round
    beside: list[str] = field(default_factory=list)  # directories of runs whose losses are told beside this one's

    def __post_init__(self) -> None:
        # The real directory: runs/latest will soon be another, and a report may be made in another folder.
        self.beside = [os.path.realpath(os.path.expanduser(folder)) for folder in self.beside]

    def check(self) -> None:
        """Raise ValueError where these settings cannot work here: online without a key, beside what is no run."""
        beside.check(self.beside)
        if self.wandb is not WandbMode.online:
            return
        with suppress(ImportError):  # without wandb the run goes on, with a warning
            import wandb

            if not wandb.login(prompt=False, verify=False):
                raise ValueError(
                    "metrics.wandb=online needs an API key: run `wandb login`, or use metrics.wandb=offline"
                )


class Sink(Protocol):
    """Takes every record that the writer writes; one that raises is dropped with a warning."""

    def write(self, record: Record) -> None:
        """Take one record, `time_s` included; it holds JSON values only."""

    def close(self) -> None:
        """Finish; called once."""


class MetricsWriter:
    """Appends records to `metrics.jsonl`: a JSON object a line, flushed so that it can be tailed."""

    def __init__(
        self,
        folder: Path,
        *,
        sinks: Sequence[Sink] = (),
        beside: Beside | None = None,
        resume_bytes: int | None = None,
        resume_round: int = 0,
        resume_steps: Mapping[int, int] | None = None,
        earlier_s: float = 0.0,
    ) -> None:
        """Cut the file in `folder` back to `resume_bytes` (None: keep it) and to whole lines.

        What is told of a round after it is saved (its commit and its checkpoint) stays up to `resume_round`; what was
        told before of steps that are trained again, those after `resume_steps` (by source), goes.
        `earlier_s` is the time that the run took before it was resumed. Evaluations also tell of those `beside`.
        `warned` are the messages of warnings that stayed.
        """
        self._sinks, self._beside = list(sinks), beside
        self._start_s = time.monotonic() - earlier_s
        self._nonfinite: set[str] = set()  # keys that were reported
        self._full = False
        self._file = (folder / "metrics.jsonl").open("ab", buffering=0)
        before = (folder / "metrics.jsonl").read_bytes()
        kept = before[:resume_bytes]
        whole = self._nbytes = kept.rfind(b"\n") + 1
        self._file.truncate(self._nbytes)
        lines = kept[:whole].splitlines(keepends=True)
        self.warned = {json.loads(line).get("message") for line in lines if b'"event": "warning"' in line}
        once = [line for line in lines if not _is_again(line, resume_steps or {})]
        if len(once) < len(lines):
            self._file.truncate(0)
            self._nbytes = self._file.write(b"".join(once))
        for line in before[len(kept) :].splitlines(keepends=True):
            if _is_kept(line, resume_round):
                self._append(line)
        if resume_bytes is not None and whole < resume_bytes:
            text = f"metrics.jsonl lacks lines: {whole} bytes of the {resume_bytes} of the checkpoint"
            self.write({"event": "warning", "message": text})

    @property
    def nbytes(self) -> int:
        """Size of metrics.jsonl now; what `resume_bytes` takes."""
        return self._nbytes

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run's start, those before a resume included."""
        return time.monotonic() - self._start_s

    def write(self, record: Record) -> None:
        """Write one record, `time_s` first, and hand it to the sinks; a non-finite number becomes null."""
        bad: dict[str, float] = {}
        if self._beside is not None and record["event"] == "evaluation":
            record = {**record, **self._beside.losses(record)}
        clean: dict[str, object] = {"time_s": round(self.elapsed_s, 3)}
        clean |= {key: _json_value(value, key, bad) for key, value in record.items()}
        self._append(json.dumps(clean, allow_nan=False).encode() + b"\n")
        self._tell(clean)
        for key in sorted(bad.keys() - self._nonfinite):
            self._nonfinite.add(key)
            text = f"{key} is {bad[key]} in round {record.get('round')}: written as null, said only once"
            self.write({"event": "warning", "message": text})

    def close(self) -> None:
        """Close the sinks and the file; further calls do nothing."""
        while self._sinks:
            self._sinks.pop().close()
        self._file.close()

    def _append(self, line: bytes) -> None:
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk is full")
            self._nbytes += len(line)
        except OSError as error:  # a full disk must not stop a run: what is lost are lines of a log
            with suppress(OSError):
                self._file.truncate(self._nbytes)
            if not self._full:
                self._full = True
                self._tell({"event": "warning", "message": f"metrics.jsonl loses lines: {error}"})

    def _tell(self, record: Record) -> None:
        for sink in tuple(self._sinks):
            try:
                sink.write(record)
            except Exception as error:  # nor must a display or a tracker stop it
                self._sinks.remove(sink)
                text = f"{type(sink).__name__} failed and is off from now on: {type(error).__name__}: {error}"
                self.write({"event": "warning", "message": text})


class WandbSink:
    """Logs the numbers of each record to Weights & Biases under the same keys, with `round` as the x axis.

    Raises what wandb raises where it is missing or cannot start.
    """

    def __init__(self, folder: Path, settings: Metrics, *, name: str, config: Mapping[str, object]) -> None:
        """Start a run of `settings.wandb_project` named `name`; its files go to `folder`/wandb."""
        import wandb

        self._run: Run = wandb.init(
            project=settings.wandb_project,
            name=name,
            dir=folder,
            mode="online" if settings.wandb is WandbMode.online else "offline",
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Not wandb's own step: that must never go back, and islands are not all in the same round.
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def write(self, record: Record) -> None:
        """Log the numbers of one record."""
        numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
        if "round" in numbers:
            self._run.log(numbers)

    def close(self) -> None:
        """Finish wandb's run."""
        self._run.finish()


def open_metrics(
    folder: Path,
    settings: Metrics,
    *,
    name: str,
    rounds: int,
    config: Mapping[str, object],
    resume_bytes: int | None = None,
    resume_round: int = 0,
    resume_steps: Mapping[int, int] | None = None,
    earlier_s: float = 0.0,
    more: Sequence[Sink] = (),
) -> tuple[MetricsWriter, Display]:
    """The writer with the sinks that `settings` ask for and `more`, and the display for messages and the summary.

    Closing the writer closes all. Where W&B does not start, one warning says so and the run goes on.
    """
    display = Display(folder, rounds=rounds, live=settings.live)
    sinks: list[Sink] = [display, *more]
    problem = ""
    if settings.wandb is not WandbMode.off:
        try:
            sinks.append(WandbSink(folder, settings, name=name, config=config))
        except Exception as error:  # of many kinds: wandb missing, no network, no space
            problem = f"metrics.wandb={settings.wandb.value} is off: {type(error).__name__}: {error}"
    others = Beside(settings.beside, config)
    writer = MetricsWriter(
        folder,
        sinks=sinks,
        beside=others,
        resume_bytes=resume_bytes,
        resume_round=resume_round,
        resume_steps=resume_steps,
        earlier_s=earlier_s,
    )
    for text in [*filter(None, [problem]), *others.doubts]:
        writer.write({"event": "warning", "message": text})
    return writer, display


def _is_kept(line: bytes, up_to_round: int) -> bool:
    """Whether a line of metrics.jsonl is whole and tells of the commit or checkpoint of a round up to this one."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n") and record["event"] in ("commit", "checkpoint") and record["round"] <= up_to_round


def _is_again(line: bytes, steps: Mapping[int, int]) -> bool:
    """Whether a line tells of a segment of a source that went on after this step."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return bool(record["event"] == "segment" and record["step"] > steps.get(record["source"], record["step"]))


def _json_value(value: object, key: str, bad: dict[str, float]) -> object:
    """`value` as JSON has it; non-finite numbers become None and are noted in `bad` under `key`."""
    if isinstance(value, str):
        return redacted(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        if math.isfinite(number):
            return number
        bad[key] = number
        return None
    if isinstance(value, Mapping):
        return {str(name): _json_value(item, key, bad) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_json_value(item, key, bad) for item in value]
    return str(value)
