"""The islands as the display shows them: steps, staleness, what each does now; with a barrier and without."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from diloco.display import Display
from diloco.fleet import Fleet, Record
from tests.toy import logged


def segment(island: int, steps: int = 10) -> dict[str, object]:
    rates = {"inner/loss": 5.0, "inner/tokens_per_s": 6000.0, "comm/seconds_waiting": 0.25}
    return {"event": "segment", "round": 2, "island": island, "steps": steps, **rates}


def commit(contributors: list[int], staleness: list[int], **more: object) -> dict[str, object]:
    keys = {"event": "commit", "round": 1, "outer/contributors": contributors, "outer/stalenesses": staleness}
    return {**keys, "total/tokens": 100, "total/bytes_sent": 1000, **more}


def drawn(fleet: Fleet, *told: Record, most: int = 20) -> list[list[str]]:
    """The table's lines as words."""
    for record in told:
        fleet.take(record)
    console = Console(file=io.StringIO(), width=100, color_system=None)
    with console.capture() as capture:
        console.print(fleet.table(most))
    lines = capture.get().splitlines()
    assert all(len(line) <= 100 for line in lines)
    return [line.split() for line in (lines[0], *lines[2:])]


def test_steps_speed_and_what_each_island_does() -> None:
    fleet = Fleet()
    fleet.watch(lambda: {0: True, 1: False, 3: True})
    lines = drawn(fleet, segment(0), segment(0), segment(1, 4), segment(2), {"event": "lost", "island": 2})
    assert lines == [
        ["island", "round", "steps", "loss", "tokens/s", "waited", "state"],
        ["0", "3", "20", "5.000", "6.00", "k", "0.2", "s", "training"],
        ["1", "3", "4", "5.000", "6.00", "k", "0.2", "s", "waiting"],
        ["2", "3", "10", "5.000", "6.00", "k", "0.2", "s", "lost"],
        ["3", "1", "0", "-", "-", "-", "training"],  # nothing was heard of it yet
    ]
    states = [line[-1] for line in drawn(fleet, {"event": "joined", "island": 2}, {"event": "lost", "island": 1})]
    assert states[1:] == ["training", "lost", "starting", "training"]
    assert [line[-1] for line in drawn(fleet, {"event": "end"})][1:4] == ["done", "lost", "done"]


def test_paths_without_an_island_of_their_own_have_no_row() -> None:
    lines = drawn(Fleet(), segment(0), segment(1), commit([0, 1, 2, 3], [0, 0, 0, 0]))
    assert [line[0] for line in lines] == ["island", "0", "1"]


def test_staleness_has_a_column_where_there_is_any() -> None:
    fleet = Fleet()
    assert "staleness" not in drawn(fleet, segment(0), segment(1), commit([0, 1], [0, 0]))[0]
    lines = drawn(fleet, commit([1], [3]))
    assert lines[0][-2:] == ["staleness", "state"] and [line[-2] for line in lines[1:]] == ["0", "3"]
    refused = drawn(fleet, {"event": "stale", "island": 0, "staleness": 12})
    assert refused[1][-3:] == ["12,", "refused", "training"]
    assert drawn(fleet, commit([0], [1]))[1][-2] == "1"
    assert drawn(fleet, most=1)[-1] == ["and", "1", "more"]


def test_a_resumed_run_knows_what_was_before(tmp_path: Path) -> None:
    """The steps of each island, the best loss and the newest version, which log.txt names."""
    fleet = Fleet()
    for number in range(5):
        fleet.recall(segment(number % 2))
    assert drawn(fleet, segment(0, 1))[1][2] == "31"
    evaluations = [{"event": "evaluation", "round": n, "eval/loss": loss} for n, loss in enumerate([3.0, 1.5, 2.0])]
    before = [*evaluations, commit([0], [0], **{"outer/version": 7}), segment(0)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in before))
    display = Display(tmp_path, rounds=9, live=False)
    display.write({"time_s": 5.0, "event": "start", "round": 2})
    display.write({"time_s": 5.0, "event": "warning", "round": 2, "message": "said"})
    display.write({"time_s": 6.0, "event": "evaluation", "round": 3, "eval/loss": 1.75})
    display.close()
    log = (tmp_path / "log.txt").read_text()
    assert " round 2 version 7: warning: said" in log and "validation loss 1.750  best 1.500" in log


def test_without_a_barrier_a_round_is_told_once_when_it_is_over(tmp_path: Path) -> None:
    """Each commit names the round that is being made."""
    display = Display(tmp_path, rounds=2, live=False)
    display.write({"time_s": 0.0, "event": "start", "round": 0})
    for number, (round_, over) in enumerate([(1, 0), (1, 0), (1, 1), (2, 1), (2, 1), (2, 2)]):
        record = commit([number % 2], [1], **{"round": round_, "total/rounds": over, "fragments": 1})
        display.write({"time_s": 1.0 + number, **record})
    display.write({"time_s": 7.0, "event": "stale", "island": 0, "staleness": 9, "message": "is 9 versions old"})
    display.close()
    lines = logged(tmp_path)
    assert [line.split("  ")[0] for line in lines] == ["round 1/2", "round 2/2", "stale: is 9 versions old"]
    assert lines[0].endswith("left 0:03") and lines[1].endswith("left 0:00")
