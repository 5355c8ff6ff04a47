"""Runs without a barrier: rounds with several outer steps, staleness, a virtual clock; and those with one as before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure as Canvas

from diloco.report import arrivals, series, write_report
from diloco.report.drawing import SERIES
from diloco.report.figures import Figure, figures
from diloco.report.history import History, Refusal
from diloco.report.runs import read_runs
from diloco.report.series import Bar, Point
from tests.report.made import commit, free_records, records, segment, start, step, summary, task, write_run
from tests.report.test_page import check, words
from tests.report.test_series import of


def drawn(figure: Figure) -> list[list[tuple[list[float], list[float]]]]:
    """The points of each line of each panel."""
    found = []
    for panel in figure.panels:
        axes = Canvas().subplots()
        panel.draw(axes)
        found.append([([*map(float, line.get_xdata())], [*map(float, line.get_ydata())]) for line in axes.lines])
    return found


def test_what_kind_of_run_it_was() -> None:
    free, barrier = of(*free_records()), of(*records())
    assert free.free and free.virtual and free.paced and arrivals.told(free)
    assert not (barrier.free or barrier.virtual or barrier.paced or arrivals.told(barrier))
    alike = of(task(1, 0, 5.0, 5.0), task(1, 1, 5.0, 5.0), commit(2, 1))
    assert alike.virtual and not alike.paced  # equal islands behind a barrier: the clock only counts steps
    unlike = of(task(1, 0, 5.0, 5.0), task(1, 1, 9.0, 9.0), commit(2, 1))
    assert unlike.paced and not unlike.free
    wall = segment(2, 0, 5.0, steps=5, clock_s=2.1, clock_seconds=1.0)
    on_the_wall = of(wall, step(2, 1, 2, 0, 0), step(3, 1, 3, 1, 1))
    assert on_the_wall.free and not on_the_wall.virtual


def test_outer_steps_of_a_round_have_equal_parts_of_it() -> None:
    free = of(*free_records())
    assert [at for at, _ in series.places(free)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.5, 2.0])
    assert [spread.round for spread in series.norms(free)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.5, 2.0])
    streaming = of(*(commit(n, 1, fragment=n, fragments=4) for n in range(4)))
    assert [at for at, _ in series.places(streaming)] == [0.25, 0.5, 0.75, 1.0]


def test_losses_and_bytes_of_rounds_with_several_steps() -> None:
    free = of(*free_records())
    assert series.validation(free) == [
        Point(0, 0.0, 0.0, 1.5, 8.0, 0.0),
        Point(1, 300.0, 4000.0, 4.5, 7.0, 15.0),
        Point(2, 500.0, 8000.0, 7.0, 6.0, 32.0),
    ]
    assert [(p.round, p.tokens, p.clock_s) for p in series.training(free)] == [(1, 300.0, 15.0), (2, 500.0, 32.0)]
    assert [(t.round, t.up) for t in series.traffic(free)] == [(1, 1000.0), (2, 1000.0)]
    skipping = of(commit(1, 1), commit(2, 3), commit(3, 5))  # a step that ends two rounds at once
    assert [(t.round, t.up) for t in series.traffic(skipping)] == [(1, 1000.0), (3, 1000.0), (5, 1000.0)]


def test_the_timeline_is_by_the_virtual_clock() -> None:
    found = series.timeline(of(*free_records()))
    assert found.virtual and found.islands == (0, 1)
    assert [bar for bar in found.training if bar.island == 0] == [
        *(Bar(0, 0.0, 5.0), Bar(0, 6.0, 11.0), Bar(0, 11.0, 16.0), Bar(0, 27.0, 32.0)),
    ]
    assert [bar for bar in found.training if bar.island == 1] == [Bar(1, 0.0, 15.0), Bar(1, 15.0, 30.0)]
    assert [(bar.island, bar.begin_s, bar.end_s) for bar in found.waiting] == [(0, 5.0, 6.0), (0, 16.0, 27.0)]
    assert not series.timeline(of(*records())).virtual


def test_staleness_and_participation_are_what_the_run_told(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "free", free_records())])
    assert run.history.refusals == [Refusal(1, 5, 6.0, 30.0)]
    staleness, participation = arrivals.figures([run])
    dots, sums = drawn(staleness)
    assert dots == [
        ([5.0, 11.0, 16.0, 32.0], [0.0, 0.0, 1.0, 0.0]),
        ([15.0], [2.0]),
        ([30.0], [5.0]),  # refused
    ]
    assert sums == [([5.0, 11.0, 16.0, 32.0], [1.0, 2.0, 3.0, 4.0]), ([15.0], [1.0])]
    at = pytest.approx([1 / 3, 2 / 3, 1.0, 1.5, 2.0])
    assert drawn(participation) == [
        [(at, [2.0] * 5)],
        [(at, [1.0] * 5)],
        [([1.0, 2.0], [2.0, 1.0])],  # in the second round only one of them
        [(at, [0.5] * 5)],
    ]
    assert [panel.title for panel in figures([run])[0].panels][-1] == "against virtual time"
    assert drawn(figures([run])[0])[-1] == [([0.0, 15.0, 32.0], [8.0, 7.0, 6.0]), ([15.0, 32.0], [6.0, 6.0])]


def test_the_page_of_a_run_without_a_barrier(tmp_path: Path) -> None:
    run = write_run(tmp_path / "free", free_records())
    page = write_report([run], tmp_path / "out").read_text(encoding="utf-8")
    check(page)
    text = words(page)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"index.html", "loss.png", "bytes.png", "contributions.png", "staleness.png", "participation.png",
                     "timeline.png"}  # fmt: skip
    assert "island 0: 4, mean 0.25, at most 1; island 1: 1, mean 2, at most 2; refused: 1, mean 5" in page
    assert "by the virtual clock they trained for 0:50, waited for 0:12" in page
    assert "island 0 20 400 4 80 % 0.2 1 0 0:20 0:12" in text and "island 1 10 200 1 20 % 2.0 2 1 0:30 0:00" in text
    assert "cosine between" not in text and "alive / participating / weight 2 / 1 / 50 %" in text
    assert "validation: from 8 at 0 to 6 at 32" in page


def test_with_one_that_waits_for_all(tmp_path: Path) -> None:
    """Its clock is that on the wall, so there is no axis that both have."""
    folders = [write_run(tmp_path / "free", free_records(), name="free"), write_run(tmp_path / "all", name="all")]
    page = write_report(folders, tmp_path / "out").read_text(encoding="utf-8")
    check(page)
    staleness, _ = arrivals.figures(read_runs(folders))
    assert "against virtual time" not in page and "wall time" in staleness.panels[0].description
    assert len(re.findall("Timeline of 2 islands", page)) == 2


@pytest.mark.parametrize("count", range(1, len(free_records()), 3))
def test_runs_that_did_not_come_far(tmp_path: Path, count: int) -> None:
    run = write_run(tmp_path / "run", free_records()[:count])
    check(write_report([run], tmp_path / "out").read_text(encoding="utf-8"))
    over = {record.get("total/rounds", 0) for record in free_records()[:count]}
    assert read_runs([run])[0].summary["rounds"] == max(over)


def test_a_barrier_where_all_take_part_has_nothing_more(tmp_path: Path) -> None:
    def told(taking: int) -> list[dict[str, Any]]:
        outer = {"outer/contributors": [0, 1], "outer/stalenesses": [0, 0], "outer/alive": 2}
        steps = [commit(2.0 * n, n, **outer, **{"outer/participating": 2, "outer/weight": 1.0}) for n in (1, 2)]
        steps[-1] |= {"outer/participating": taking}
        return [start(), *steps, segment(5, 0, 5.0)]

    (whole,) = read_runs([write_run(tmp_path / "whole", told(2), summed=summary("whole"))])
    (lacking,) = read_runs([write_run(tmp_path / "lacking", told(1), summed=summary("lacking"))])
    assert arrivals.figures([whole]) == [] and arrivals.by_island(whole) == ""
    assert [figure.name for figure in arrivals.figures([lacking])] == ["participation"]
    assert [panel.title for panel in arrivals.figures([lacking])[0].panels] == [
        *("alive", "participating in a step", "contributing weight"),
    ]


def test_many_islands_and_steps_stay_small(tmp_path: Path) -> None:
    told = [start()]
    for n in range(1, 5001):
        told += [task(n, n % 64, 10.0 * n, 5.0 + n % 3), step(n, 1 + n // 500, 10.0 * n, n % 64, n % 70)]
    run = write_run(tmp_path / "run", told)
    page = write_report([run], tmp_path / "out").read_text(encoding="utf-8")
    check(page)
    assert len(page) < 2_000_000 and "all islands" in page and len(SERIES) < 64
    assert History().clock_s == 0.0 and arrivals.contributions(History()) == []
