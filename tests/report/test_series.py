"""What is drawn, against calculations by hand."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from diloco.report import history, series
from diloco.report.history import History, Segment
from diloco.report.series import Bar, Point, Spread, Traffic
from tests.report.made import commit, evaluation, records, segment


def of(*told: dict[str, object]) -> History:
    found = History()
    for record in told:
        found.add(record)
    return found


def test_validation_losses_stand_where_their_round_was_committed() -> None:
    assert series.validation(of(*records())) == [
        Point(0, 0.0, 0.0, 1.5, 8.0),
        Point(1, 200.0, 4000.0, 4.0, 7.0),  # though its commit stands after it
        Point(2, 400.0, 8000.0, 8.0, 6.0),
    ]


def test_training_losses_are_means_over_tokens_between_commits() -> None:
    first = (100 * 7.0 + 300 * 8.0) / 400
    assert series.training(of(*records())) == [
        Point(1, 200.0, 4000.0, 3.5, first),
        Point(2, 400.0, 8000.0, 7.0, 6.5),
    ]


def test_a_loss_that_is_no_number_is_left_out() -> None:
    told = of(evaluation(1, 0, None), segment(2, 0, None), segment(2, 1, 5.0), commit(3, 1), evaluation(3, 1, 4.0))
    assert [point.loss for point in series.validation(told)] == [4.0]
    assert [point.loss for point in series.training(told)] == [5.0]
    assert series.training(of(segment(2, 0, None), commit(3, 1))) == []


def test_bytes_between_workers_count_as_sent() -> None:
    told = of(commit(1, 1, inside=500), commit(2, 2, inside=500), evaluation(2, 2, 1.0))
    assert series.validation(told)[0].bytes_sent == 2 * (1000 + 3000 + 500)
    assert series.traffic(told) == [
        Traffic(1, 4500.0, 1000.0, 3000.0, 500.0),
        Traffic(2, 9000.0, 1000.0, 3000.0, 500.0),
    ]


def test_several_commits_of_a_round_are_one_round_of_traffic() -> None:
    told = of(commit(1, 1), commit(2, 1, **{"total/bytes_up": 1500}), commit(3, 2))
    assert [(t.round, t.up) for t in series.traffic(told)] == [(1, 1500.0), (2, 500.0)]


def test_spreads() -> None:
    told = of(commit(1, 1), commit(2, 2, **{"outer/cosines": [], "outer/update_norm": None}))
    assert series.norms(told)[0] == Spread(1, 2.0, 1.0, 3.0)
    assert series.cosines(told) == [Spread(1, 0.25, 0.25, 0.25)]
    assert series.update_norms(told) == [Spread(1, 0.5, 0.5, 0.5)]


def test_timeline_of_each_task() -> None:
    found = series.timeline(of(*records()))
    assert found.islands == (0, 1) and found.step_s == 0
    assert found.training == (Bar(0, 2.0, 3.0), Bar(1, 2.0, 3.0), Bar(0, 5.0, 6.0), Bar(1, 5.5, 6.5))
    # The second waited for longer than it was idle by the coordinator's clock: cut at its last task's end.
    assert [(bar.island, bar.begin_s, bar.end_s) for bar in found.waiting] == [(0, 4.5, 5.0), (1, 3.0, 5.5)]


def test_a_long_timeline_keeps_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    told, time_s = History(), {0: 0.0, 1: 0.0}
    for _ in range(500):
        for island in time_s:
            waited, seconds = draw.random(), draw.random()
            time_s[island] += waited + seconds
            told.segments.append(Segment(island, time_s[island], seconds, waited, 1.0, 1.0))
    whole = series.timeline(told)
    monkeypatch.setattr(series, "MOST_BARS", 400)
    short = series.timeline(told)
    assert len(whole.training) == 1000 and len(short.training) <= 202 and len(short.waiting) <= 202
    for name in "training", "waiting":
        seconds = [sum(bar.end_s - bar.begin_s for bar in vars(whole)[name])]
        seconds += [sum((bar.end_s - bar.begin_s) * bar.share for bar in vars(short)[name])]
        assert seconds[1] == pytest.approx(seconds[0], rel=1e-9)
    assert all(0 <= bar.base and bar.base + bar.share <= 1 + 1e-9 for bar in short.training + short.waiting)


def test_thinning_keeps_ends_and_peaks() -> None:
    values = [0.0] * 10_000
    values[1234], values[7777] = 9.0, -9.0
    numbers = series.thin(range(10_000), values, 100)
    assert len(numbers) <= 100 and {0, 1234, 7777, 9999} <= set(numbers) and numbers == sorted(numbers)
    assert series.thin([1, 2], [1, 2], 100) == [1, 2]


def test_lines_that_are_not_whole_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [b'{"event": "sample", "text": "a"}', b"[1]", b"null", b"\xff", b"", b'{"event": "sample", "text": "b"}']
    path.write_bytes(b"\n".join([*whole, whole[0][:20]]))
    assert [note.text for note in history.read(path).samples] == ["a", "b"]
    assert history.read(tmp_path / "nothing") == History()
