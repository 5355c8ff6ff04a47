"""The section of a run's paths: every figure against the hand-made run; few paths and many; what is missing."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure as Canvas

from diloco.report import arrivals, path_charts, series, write_report
from diloco.report.drawing import DASHES, SERIES
from diloco.report.figures import figures
from diloco.report.paths import Paths, paths_of
from diloco.report.runs import Run, read_runs
from diloco.report.series import Spread
from tests.report.made import LEVELS, evaluated, modules, routed_records, routing, start, write_routed, write_run
from tests.report.test_page import HOSTILE, check, report, words

ARROW = "\N{RIGHTWARDS ARROW}"
SIXTEEN = list(itertools.product(range(4), range(4)))


def read(folder: Path) -> tuple[Run, Paths]:
    (run,) = read_runs([folder])
    found = paths_of(run)
    assert found is not None
    return run, found


def section(page: str) -> str:
    found = re.search(r"<section>\s*<h2>Paths</h2>.*?</section>", page, re.DOTALL)
    assert found is not None
    return found[0]


def rows(page: str) -> list[list[str]]:
    """The words of each cell of each row below the names of the columns, of all tables."""
    found = re.findall(r"<tr>(<th scope=\"row\".*?)</tr>", page, re.DOTALL)
    return [[words(cell) for cell in re.split(r"(?=<t[dh])", row)[1:]] for row in found]


def test_every_figure_of_a_path(tmp_path: Path) -> None:
    page = report(write_routed(tmp_path / "run"))
    check(page)
    table = rows(section(page))
    losses = [f"{math.log(400):.3f} {ARROW} {math.log(perplexity):.3f}" for perplexity in (4, 5, 6, 7)]
    shares = ["10.0 %", "20.0 %", "30.0 %", "40.0 %"]
    for path, (first, second) in enumerate(LEVELS):
        assert table[path] == [
            f"path {path}",
            *(str(first), str(second)),
            *(str(10 * path + 10), shares[path], str(path + 1), "25.0 %"),
            *(losses[path], f"400.0 {ARROW} {4 + path}.0"),
            f"domain-{path} 50 % (88 % of it); all 10 % ({20 + path / 10:.0f} % of it)",
        ]
    assert table[4:6] == [["path 0", "domain-0", f"typical of 0, {rank}"] for rank in ("first", "second")]
    assert len(table) == 4 + 8


def test_the_whole_what_is_beside_it_and_the_router(tmp_path: Path) -> None:
    text = words(section(report(write_routed(tmp_path / "run"))))
    whole = (4 * 5 * 6 * 7) ** 0.25  # the perplexity of a mean loss is a geometric mean
    assert f"perplexity, routed {whole:.1f} loss {math.log(whole):.3f}" in text
    above = f"{math.log(9) - math.log(whole):.3f} above the routed"
    assert f"beside: dense 9.0 loss {math.log(9):.3f} after as many steps, {above}" in text
    assert "router k-means" in text and "one of the 2 of level 0, one of the 2 of level 1;" in text
    assert "purity 50 % of a path's documents are of its commonest domain; held out 40 %" in text
    assert "concentration 75 % of a domain's documents go to its commonest path; held out 60 %" in text
    assert "2.1250" in words(report(write_routed(tmp_path / "again")))  # dense beside, among all figures


def test_the_lines_are_the_paths_and_the_bold_one_all(tmp_path: Path) -> None:
    run, paths = read(write_routed(tmp_path / "run"))
    figure = path_charts.figure(run.history, paths)
    axes = [Canvas().subplots() for _ in figure.panels]
    for panel, on in zip(figure.panels, axes, strict=True):
        panel.draw(on)
    tokens, newer, loads = axes
    lines = {key.label: line for key, line in zip(figure.keys, tokens.lines, strict=True)}
    assert list(lines) == ["all, routed", *(f"path {path}" for path in range(4)), "beside: dense"]
    for path in range(4):
        expected = [400.0, *((4 + path) * 6 / done for done in range(1, 7))]
        assert list(lines[f"path {path}"].get_ydata()) == pytest.approx(expected)
        assert lines[f"path {path}"].get_color() == SERIES[path]
    assert list(lines["all, routed"].get_xdata()) == [200 * done for done in range(7)]
    assert lines["all, routed"].get_linewidth() > 2 * lines["path 0"].get_linewidth()
    assert lines["beside: dense"].get_linewidth() == lines["path 0"].get_linewidth()
    assert {key.label: bool(DASHES[key.dash][1]) for key in figure.keys} == {
        label: label == "beside: dense" for label in lines
    }
    assert list(newer.lines[0].get_xdata()) == [3, 4, 5, 6]  # rounds
    heights = [round(bar.get_height(), 2) for bar in loads.patches]
    assert heights == [10, 20, 30, 40, 25, 25, 25, 25] and loads.lines[0].get_ydata()[0] == 25


def test_of_many_paths_there_are_a_median_and_a_range(tmp_path: Path) -> None:
    folder = write_routed(tmp_path / "run", 16, rows=SIXTEEN)
    run, paths = read(folder)
    panel = path_charts.figure(run.history, paths).panels[0]
    axes = Canvas().subplots()
    panel.draw(axes)
    assert len(axes.lines) == 3  # all, the median, dense
    assert axes.lines[1].get_ydata()[-1] == pytest.approx((11 * 12) ** 0.5)  # between the 8th and the 9th loss
    (band,) = axes.collections
    (corners,) = [path.vertices for path in band.get_paths()]
    last = [y for x, y in corners if x == 1200]
    assert min(last) == pytest.approx(4) and max(last) == pytest.approx(19)
    page = section(report(folder))
    check(f"<!DOCTYPE html><title>x</title>{page}")
    table = rows(page)
    assert [row[1:3] for row in table[:16]] == [[str(first), str(second)] for first, second in SIXTEEN]
    assert len(table) == 16 + 32 and "<details><summary>Typical documents" in page and "All 16 paths" not in page


def test_very_many_paths_are_folded(tmp_path: Path) -> None:
    page = section(report(write_routed(tmp_path / "run", 64, rows=list(itertools.product(range(8), range(8))))))
    assert "<details><summary>All 64 paths" in page and len(rows(page)) == 64 + 128 and len(page) < 200_000


def test_a_run_that_goes_on_tells_what_it_said_at_its_start(tmp_path: Path) -> None:
    """Neither summary nor export are there yet."""
    told = routed_records(paths=modules(), routing=routing())[:-1]
    folder = write_run(tmp_path / "run", told)
    assert not (folder / "summary.json").exists()
    table = rows(section(report(folder)))
    assert [row[1:6] for row in table[:2]] == [["0", "0", "10", "10.0 %", "1"], ["0", "1", "20", "20.0 %", "2"]]
    assert table[4][2] == "typical of 0, first"


@pytest.mark.parametrize("count", range(1, 5))
def test_a_run_that_has_just_begun(tmp_path: Path, count: int) -> None:
    told = routed_records(paths=modules())[:count]
    page = report(write_run(tmp_path / "run", told))
    check(page)
    assert ("<h2>Paths" in page) == (count > 1)  # before there is nothing to draw
    if count > 1:  # loads by the evaluation
        losses = [f"5.991 {ARROW} 5.991", f"400.0 {ARROW} 400.0"]
        assert rows(section(page))[0] == ["path 0", "0", "0", "-", "-", "-", "25.0 %", *losses]
        assert "purity" not in section(page)


def test_what_was_exported_counts_and_what_is_broken_does_not(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", routed_records(paths=modules()))
    (folder / "export").mkdir()
    exported = folder / "export" / "paths.json"
    exported.write_text(json.dumps({"paths": modules([(1, 0), (1, 1), (0, 0), (0, 1)])}))
    assert [list(path.modules) for path in read(folder)[1].paths] == [["1", "0"], ["1", "1"], ["0", "0"], ["0", "1"]]
    for text in ("", "[", "[]", '{"paths": 3}'):
        exported.write_text(text)
        (run,) = read_runs([folder])
        found = paths_of(run)
        assert found is not None and list(found.paths[1].modules) == ["0", "1"]


def test_one_path_has_no_section(tmp_path: Path) -> None:
    assert "<h2>Paths" not in report(write_run(tmp_path / "run"))
    told = [start(paths=modules()[:1]), evaluated(1.0, 0, [8.0])]
    assert "<h2>Paths" not in report(write_run(tmp_path / "other", told))


def test_without_a_router_and_with_one_domain(tmp_path: Path) -> None:
    sent = routing()
    sent["router"] = "iid"
    for path in sent["by_path"]:
        path["domains"] = [{"name": "only", "documents": 3, "share": 1.0, "of_domain": 0.25}]
    text = words(section(report(write_routed(tmp_path / "run", data={"routing": sent}))))
    assert "router chance" in text and "of its largest domain" in text
    assert "purity" not in text and "specialises" not in text and "only" not in text


def test_fragments_are_one_level_and_private_parts_another(tmp_path: Path) -> None:
    told = [
        {f"{slot}.fragment{part}": f"{slot}.fragment{part}/{index if slot == 'private' else index % 2}"
         for slot in ("level0", "private") for part in (0, 1)}
        for index in range(4)
    ]  # fmt: skip
    folder = write_run(tmp_path / "run", [start(paths=told), evaluated(1.0, 0, [8.0] * 4)])
    _, paths = read(folder)
    assert paths.levels == ["level0", "private"] and paths.sizes == [2, 4] and not paths.shared
    assert [list(path.modules) for path in paths.paths] == [["0", "0"], ["1", "1"], ["0", "2"], ["1", "3"]]
    assert "shared by all" not in section(report(folder))


def test_modules_that_step_apart_are_no_islands_that_run_free(tmp_path: Path) -> None:
    run, _ = read(write_routed(tmp_path / "run"))
    assert run.history.by_module and not run.history.free and not arrivals.told(run.history)
    assert arrivals.figures([run]) == [] and arrivals.by_island(run) == ""
    assert series.norms(run.history)[0] == Spread(1, 2.0, 1.0, 3.0)  # of 1, 2 and 2, 3
    assert len(series.norms(run.history)) == 6
    assert {figure.name for figure in figures([run])} == {"loss", "bytes", "contributions"}


def test_documents_are_only_text(tmp_path: Path) -> None:
    sent = routing()
    for path in sent["by_path"]:
        for told in (*path["domains"], *path["typical"]):
            told |= {key: HOSTILE for key in told if key in ("name", "domain", "text")}
    sent["by_path"][0]["domains"][0]["name"] = "other"
    folder = write_routed(tmp_path / "run", data={"routing": sent})
    page = report(folder)
    check(page)
    assert words(page).count("<script>alert(1)</script>") >= 8


def test_several_runs_say_how_many_paths_each_has(tmp_path: Path) -> None:
    page = report(write_routed(tmp_path / "a"), write_run(tmp_path / "b", name="b"))
    check(page)
    assert "<h2>Paths" not in page
    head, *_ = re.findall(r"<thead>.*?</thead>", page, re.DOTALL)
    names = [words(name) for name in re.findall(r"<th .*?</th>", head)]
    a, b = (dict(zip(names, row, strict=True)) for row in rows(page)[:2])
    assert (a["paths"], a["dense beside"]) == ("4", "2.1250") and (b["paths"], b["dense beside"]) == ("-", "-")


def test_the_figure_is_beside_the_page(tmp_path: Path) -> None:
    write_report([write_routed(tmp_path / "run")], tmp_path / "out")
    assert (tmp_path / "out" / "paths.png").stat().st_size > 10_000
