"""The writer of metrics.jsonl, the display and the W&B sink."""

from __future__ import annotations

import builtins
import io
import json
import resource
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from rich.console import Console

from diloco.formats import format_bytes, format_count, format_duration
from diloco.metrics import (
    Display,
    Metrics,
    MetricsWriter,
    Record,
    Sink,
    WandbMode,
    open_metrics,
)
from diloco.outcome import summary_table
from tests.toy import logged

SUMMARY: dict[str, object] = {
    "name": "quickstart",
    "status": "finished",
    "initial_val_loss": 7.6,
    "val_loss": 5.1,
    "tokens": 1_234_567,
    "tokens_per_s": 12_345.6,
    "wall_s": 93.2,
    "bytes_up": 37_000_000,
    "bytes_down": 37_000_000,
    "bytes_sent": 74_000_000,
    "bytes_data_parallel": 3_100_000_000,
    "run_directory": "runs/2026_quickstart",
    "export": "runs/2026_quickstart/export",
}


def read(folder: Path) -> list[dict[str, object]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def segment(island: int, loss: float | None) -> dict[str, object]:
    rates = {"inner/loss": loss, "inner/tokens_per_s": 6000.0, "comm/seconds_waiting": 0.25}
    return {"event": "segment", "round": 2, "island": island, **rates}


def commit(rounds_done: int) -> dict[str, object]:
    sent = {"total/bytes_up": rounds_done * 2e6, "total/bytes_down": rounds_done * 1e6}
    sent |= {"total/bytes_sent": rounds_done * 3e6}
    return {"event": "commit", "round": rounds_done, "total/tokens": rounds_done * 4096, **sent}


def play(sink: Sink, rounds: int = 20) -> None:
    """A short run, one round every ten seconds."""
    sink.write({"time_s": 5.0, "event": "start", "round": 0})
    sink.write({"time_s": 5.0, "event": "evaluation", "round": 0, "eval/loss": 7.5})
    for done in range(1, 4):
        sink.write({"time_s": 5.0 + 10 * done, **segment(0, 6.0 - done)})
        sink.write({"time_s": 5.0 + 10 * done, **segment(1, 5.0 - done)})
        sink.write({"time_s": 5.0 + 10 * done, **commit(done)})
    sink.write({"time_s": 36.0, "event": "evaluation", "round": 3, "eval/loss": 5.25})
    sink.write({"time_s": 36.0, "event": "lost", "island": 1, "message": "its process [died]"})
    sink.write({"time_s": 36.0, "event": "warning", "message": "odd [but] fine"})


class Recorder:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.closed = 0

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed += 1


class Broken(Recorder):
    def write(self, record: Record) -> None:
        raise RuntimeError("no")


# --- writer ---


def test_records_are_lines_of_json_with_the_time_first(tmp_path: Path) -> None:
    sink = Recorder()
    writer = MetricsWriter(tmp_path, sinks=[sink])
    writer.write({"event": "start", "round": 0, "where": tmp_path, "mode": WandbMode.off, "none": None})
    assert len(read(tmp_path)) == 1  # flushed, so that it can be tailed
    writer.write({"event": "commit", "norms": (np.float32(0.5), 2), "ok": True, "n": np.int64(3)})
    writer.close()
    writer.close()
    first, second = read(tmp_path)
    assert next(iter(first)) == "time_s" and isinstance(first["time_s"], float)
    assert first["where"] == str(tmp_path) and first["none"] is None
    assert second["norms"] == [0.5, 2] and second["ok"] is True and second["n"] == 3
    assert sink.records == [first, second] and sink.closed == 1
    assert writer.nbytes == (tmp_path / "metrics.jsonl").stat().st_size


def test_a_number_that_is_not_finite_is_null_and_said_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for loss in (float("nan"), float("inf"), 1.0):
        writer.write({"event": "segment", "round": 4, "inner/loss": loss, "norms": [1.0, -loss]})
    writer.close()
    records = read(tmp_path)
    assert [r.get("inner/loss") for r in records if r["event"] == "segment"] == [None, None, 1.0]
    assert records[0]["norms"] == [1.0, None]
    warnings = [str(r["message"]) for r in records if r["event"] == "warning"]
    assert [text.split(":")[0] for text in warnings] == [
        "inner/loss is nan in round 4",
        "norms is nan in round 4",
    ]


def test_resuming_cuts_the_file_back_and_goes_on_in_time(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"event": "commit", "round": 1})
    saved = writer.nbytes
    writer.write({"event": "commit", "round": 2})
    writer.close()
    resumed = MetricsWriter(tmp_path, resume_bytes=saved, earlier_s=100.0)
    assert resumed.nbytes == saved
    resumed.write({"event": "commit", "round": 2, "again": True})
    resumed.close()
    records = read(tmp_path)
    assert [r["round"] for r in records] == [1, 2] and records[1]["again"] is True
    assert float(str(records[1]["time_s"])) >= 100.0


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "commit"}\n{"event": "com')
    writer = MetricsWriter(tmp_path)
    writer.write({"event": "end"})
    writer.close()
    assert [r["event"] for r in read(tmp_path)] == ["commit", "end"]


def test_missing_lines_are_warned_of_on_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "commit"}\n')
    MetricsWriter(tmp_path, resume_bytes=1000).close()
    assert "20 bytes of the 1000" in str(read(tmp_path)[1]["message"])


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """As on a disk that fills up: files of this process stay below `nbytes`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_lines_and_stops_nothing(tmp_path: Path) -> None:
    sink = Recorder()
    writer = MetricsWriter(tmp_path, sinks=[sink])
    writer.write({"event": "start"})
    whole = writer.nbytes
    with largest_file(whole + 10):
        writer.write({"event": "commit", "round": 1, "text": "x" * 100})
        writer.write({"event": "commit", "round": 2, "text": "x" * 100})
        assert writer.nbytes == whole
    writer.write({"event": "commit", "round": 3})
    writer.close()
    assert [r["event"] for r in read(tmp_path)] == ["start", "commit"]
    warnings = [r for r in sink.records if r["event"] == "warning"]
    assert len(warnings) == 1 and "loses lines" in str(warnings[0]["message"])


def test_a_sink_that_fails_is_dropped(tmp_path: Path) -> None:
    good, broken = Recorder(), Broken()
    writer = MetricsWriter(tmp_path, sinks=[broken, good])
    writer.write({"event": "start"})
    writer.write({"event": "end"})
    writer.close()
    assert [r["event"] for r in good.records] == ["warning", "start", "end"]
    assert "Broken failed" in str(good.records[0]["message"]) and "RuntimeError: no" in str(good.records[0])


# --- display ---


def test_plain_lines_and_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(tmp_path, rounds=20)
    display.message("preparing")
    play(display)
    display.summary(SUMMARY)
    display.close()
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[:3] == [
        "preparing",
        "round  0/20  validation loss 7.500  best 7.500",
        "round  1/20  loss 4.500  val 7.500  12.0 k tokens/s  sent 3.00 MB  left 3:10",
    ]
    assert "round  3/20  loss 2.500  val 7.500  410 tokens/s  sent 9.00 MB  left 2:50" in lines
    assert "round  3/20  validation loss 5.250  best 5.250" in lines
    assert "island 1 lost: its process [died]" in lines and "warning: odd [but] fine" in lines
    assert "validation loss  7.600 before, 5.100 after" in lines
    assert logged(tmp_path) == out.splitlines()


def test_live_drawing(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, height=40, color_system=None)
    display = Display(tmp_path, rounds=20, console=console)
    play(display)
    display.message("a [line] above")
    display.write({"time_s": 40.0, "event": "end", "round": 20})
    display.summary(SUMMARY)
    display.close()
    shown = stream.getvalue()
    for text in (
        "round  3/20",
        "inner loss",
        "2.000",
        "5.250",
        "9.00 MB",
        "6.00 k",
        "lost",
        "odd [but] fine",
    ):
        assert text in shown, text
    assert "a [line] above" in shown and "41.9 times less" in shown and "runs/2026_quickstart/export" in shown
    log = (tmp_path / "log.txt").read_text()
    assert "\x1b" not in log and "round  3/20  loss 2.500" in log and "exported model" in log


@pytest.mark.parametrize("size", [(1, 1), (2, 40), (15, 3), (200, 2)])
def test_any_size_of_terminal(tmp_path: Path, size: tuple[int, int]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=size[0], height=size[1])
    display = Display(tmp_path, rounds=20, console=console)
    play(display)
    for island in range(100):
        display.write({"time_s": 37.0, **segment(island, None)})
    display.summary(SUMMARY)
    display.close()


def test_many_islands_leave_room_for_the_rest(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=20, color_system=None)
    display = Display(tmp_path, rounds=20, console=console)
    for island in range(100):
        display.write({"time_s": 1.0, **segment(island, 5.0)})
    with console.capture() as capture:
        console.print(display)
    drawn = capture.get()
    assert "and 90 more" in drawn and len(drawn.splitlines()) <= 20
    display.close()


def test_live_off_prints_lines_on_a_terminal_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    display = Display(tmp_path, rounds=20, live=False, console=console)
    display.write({"time_s": 1.0, **commit(1)})
    display.close()
    assert "round  1/20" in capsys.readouterr().out


def test_a_reader_that_went_away_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    display = Display(tmp_path, rounds=20)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Closed())
        display.message("said")
    display.close()
    assert logged(tmp_path) == ["said"]


def render(summary: Mapping[str, object]) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    with console.capture() as capture:
        console.print(summary_table(summary))
    return capture.get()


def test_summary_compares_with_data_parallel() -> None:
    assert "41.9 times less than data parallel" in render(SUMMARY)
    assert "2 times more than data parallel" in render({**SUMMARY, "bytes_data_parallel": 37_000_000})
    assert "data parallel" not in render({**SUMMARY, "bytes_data_parallel": 0})  # one island
    assert "2,000" not in render(SUMMARY) and "164.0 after" in render(SUMMARY)
    assert "stopped: all rejected" in render({**SUMMARY, "status": "stopped", "reason": "all rejected"})
    assert "rejected contributions" not in render({**SUMMARY, "rejected_by_reason": {"norm": 0}})
    rejected = render({**SUMMARY, "rejected_by_reason": {"not_finite": 3, "norm": 0, "zombie": 1}})
    assert "rejected contributions" in rejected and "3 not finite, 1 zombie" in rejected
    assert "tokens" in render({})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999.4, "999"),
        (999.6, "1.00 k"),
        (12_345, "12.3 k"),
        (99_960, "100 k"),
        (1e6, "1.00 M"),
        (3e18, "3000 P"),
    ],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text
    assert format_bytes(value) == (f"{text}B" if " " in text else f"{text} B")


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "?"), (-3, "0:00"), (43.2, "0:43"), (59.6, "1:00"), (3723, "1:02:03")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


# --- W&B ---


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account on this machine."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_settings"))


def test_wandb_offline_writes_into_the_run_directory(tmp_path: Path) -> None:
    settings = Metrics(wandb=WandbMode.offline)
    settings.check()
    writer, _ = open_metrics(tmp_path, settings, name="quickstart", rounds=20, config={"islands": 2})
    writer.write(segment(0, 4.0))
    writer.write({"event": "warning", "message": "no number, no round"})
    writer.write(commit(1))
    writer.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    for _ in range(200):  # wandb's own process writes it
        if b"inner/loss" in file.read_bytes():
            break
        time.sleep(0.1)
    assert b"inner/loss" in file.read_bytes()


def test_settings_come_from_a_command_line() -> None:
    given = OmegaConf.from_dotlist(["wandb=offline", "live=false"])
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Metrics), given))
    assert settings == Metrics(wandb=WandbMode.offline, live=False)


def test_wandb_online_needs_a_key(no_key: None) -> None:
    with pytest.raises(ValueError, match="metrics.wandb=online needs an API key"):
        Metrics(wandb=WandbMode.online).check()


def test_without_wandb_the_run_goes_on_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = builtins.__import__

    def lacking(name: str, *rest: object) -> object:
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return whole(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", lacking)
    settings = Metrics(wandb=WandbMode.online)
    settings.check()
    writer, _ = open_metrics(tmp_path, settings, name="quickstart", rounds=20, config={})
    writer.write(commit(1))
    writer.close()
    assert capsys.readouterr().out.count("metrics.wandb=online is off") == 1
    assert [r["event"] for r in read(tmp_path)] == ["warning", "commit"]
