"""The page: valid, whole without anything else, and right; what runs wrote is text and nothing more."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import html5lib
import pytest
from matplotlib.figure import Figure as Canvas
from PIL import Image

from diloco.report import write_report
from diloco.report.charts import Axis, Chart, Line, draw
from diloco.report.drawing import DARK_PAPER, PAPER, SERIES, Key, Panel, png
from diloco.report.figures import figures
from diloco.report.runs import read_runs
from tests.report.made import commit, evaluation, records, segment, start, summary, write_run, write_sweep

HOSTILE = "<script>alert(1)</script>\"'&amp; $x_1$ \x00\x1b[31m \ud800 \ufffe"


def report(*runs: Path) -> str:
    return write_report(runs, runs[0].parent / "out").read_text(encoding="utf-8")


def check(page: str) -> None:
    """Parse by the letter of the specification; ids once; no reference that leads out of the page."""
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    tree = parser.parse(page)
    ids = Counter(element.get("id") for element in tree.iter() if element.get("id"))
    assert all(count == 1 for count in ids.values())
    targets = set(re.findall(r'(?:href="|url\(|src=")([^")]*)', page))
    assert targets <= {f"#{name}" for name in ids}, targets
    assert "@import" not in page and not re.search(r"https?:|//[a-z]", page) and "<script" not in page
    pictures = [element for element in tree.iter() if str(element.tag).endswith("svg") and element.get("role") == "img"]
    assert all(picture.get("aria-label") for picture in pictures)
    tables = [element for element in tree.iter("table")]
    assert tables and all(table.find("caption") is not None and table.find("thead") is not None for table in tables)


def words(page: str) -> str:
    """The page's text without its markup."""
    return " ".join(" ".join(html5lib.parse(page, namespaceHTMLElements=False).itertext()).split())


def test_one_run(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run"))
    check(page)
    text = words(page)
    assert "8.000 \N{RIGHTWARDS ARROW} 6.000" in text and "perplexity 2,981.0 \N{RIGHTWARDS ARROW} 403.4" in text
    assert "8.00 kB" in text and "10 times less than data parallel (80.0 kB)" in text
    assert "once upon a time" in text and "c0ffee" in text and "after 2 rounds" in text
    assert "inner.lr 0.001 0.0004" in text and "rounds 2 10" in text and "beta1" in text  # changed; all of it
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"index.html", "loss.png", "bytes.png", "contributions.png", "timeline.png"}
    assert "validation: from 8 at 0 to 6 at 400; training: from 7.75 at 200 to 6.5 at 400" in page
    assert "in sum they trained for 0:04, waited for 0:03" in page


def test_several_runs_have_one_figure_to_compare_them(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, records(loss), name=name) for name, loss in (("a", 6.0), ("b", 5.5))]
    page = report(*folders)
    check(page)
    assert "a: from 8 at 0 to 6 at 400; b: from 8 at 0 to 5.5 at 400" in page
    with Image.open(tmp_path / "out" / "comparison.png") as image:
        assert image.width > 2.5 * image.height and image.width >= 1600
        colours = {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height) or []}
    for expected in SERIES[:2]:
        assert tuple(bytes.fromhex(expected[1:])) in colours
    (inches,) = {figure.inches for figure in figures(read_runs(folders))}
    assert inches[0] > inches[1]


def test_what_is_drawn_are_the_points_of_the_runs(tmp_path: Path) -> None:
    found = {figure.name: figure for figure in figures(read_runs([write_run(tmp_path / "run")]))}
    drawn = []
    for panel in found["loss"].panels:
        axes = Canvas().subplots()
        panel.draw(axes)
        drawn.append([(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[:2]])
        assert axes.get_xlabel() and axes.get_ylabel() == "loss (nats/token)"
    validation, training = [8.0, 7.0, 6.0], [7.75, 6.5]
    assert drawn[0] == [([0, 200, 400], validation), ([200, 400], training)]
    assert drawn[1] == [([4000, 8000], validation[1:]), ([4000, 8000], training)]  # before: no bytes yet
    assert drawn[2] == [([1.5, 4.0, 8.0], validation), ([3.5, 7.0], training)]
    axes = Canvas().subplots()
    found["bytes"].panels[0].draw(axes)
    assert list(axes.lines[0].get_ydata()) == [4000, 8000] and axes.get_yscale() == "log"
    assert list(axes.lines[1].get_ydata()) == [80_000, 80_000]  # data parallel


def test_the_best_of_a_sweep_is_marked_and_what_failed_says_why(tmp_path: Path) -> None:
    page = report(write_sweep(tmp_path / "sweep"))
    check(page)
    text = words(page)
    assert page.count("(best)") == 1 and "inner.lr=0.002 finished 5.0000 (best)" in text
    assert "inner.lr=-1: failed, inner.lr=-1: too small" in text and "inner.lr=-1 failed -" in text
    assert "2 finished, 1 failed; lowest validation loss 5.0000: inner.lr=0.002" in text
    configuration = text[text.index("Settings that differ between the runs") :]
    assert configuration.startswith("Settings that differ between the runs run inner.lr inner.lr=0.001 0.001")
    assert "inner.lr=-1 -1" in configuration and "beta1" not in text


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_runs_that_did_not_come_far(tmp_path: Path, count: int) -> None:
    alone = write_run(tmp_path / "alone", records()[:count])
    page = report(alone)
    check(page)
    assert "unfinished" in page
    check(report(alone, write_run(tmp_path / "whole", name="whole")))


def test_a_run_that_diverged(tmp_path: Path) -> None:
    told = [start(), evaluation(1, 0, None), segment(2, 0, None), commit(3, 1, **{"outer/cosines": [None]})]
    told += [{"time_s": 3.0, "event": "warning", "round": n, "message": "eval/loss is nan"} for n in range(3)]
    told += [{"time_s": 4.0, "event": "lost", "round": 1, "island": 0, "message": "its process died"}]
    stopped = summary("made", status="stopped", reason="all were rejected", val_loss=None, initial_val_loss=None)
    stopped["rejected_by_reason"] = {"not_finite": 3, "norm": 0, "zombie": 1}
    page = report(write_run(tmp_path / "run", told, summed=stopped))
    check(page)
    text = words(page)
    assert "rejected 3 not finite, 1 zombie" in text
    assert "stopped all were rejected" in text and "0:03, 3 times eval/loss is nan" in text
    assert "island 0 was lost: its process died" in text and "Nothing yet" in page


def test_what_runs_write_is_only_text(tmp_path: Path) -> None:
    told = [*records(), {"time_s": 9, "event": "warning", "round": 1, "message": HOSTILE}]
    told += [{"time_s": 9, "event": "sample", "round": 2, "text": HOSTILE}]
    folders = []
    for number in range(2):
        found = summary(f"_{number}{HOSTILE}", status="stopped", reason=HOSTILE, git_commit=HOSTILE)
        folders.append(write_run(tmp_path / f"{number}<b>&'", told, name=f"{number}<i>", summed=found))
    for page in report(*folders), report(folders[0]):
        check(page)
        text = words(page)
        assert text.count("<script>alert(1)</script>") >= 3 and "<b>&'" in text and "\x1b" not in page


def test_ten_thousand_rounds_and_64_islands_stay_small(tmp_path: Path) -> None:
    told = [start()]
    for done in range(1, 10_001):
        told += [segment(2.0 * done, done % 64, 5.0 + done % 7, **{"comm/seconds_waiting": 0.5})]
        told += [commit(2.0 * done, done), evaluation(2.0 * done, done, 5.0 + done % 5)]
        told += [{"time_s": 2.0 * done, "event": "warning", "round": done, "message": f"round {done} is odd"}]
    page = report(write_run(tmp_path / "run", told))
    assert len(page) < 2_000_000 and "and 9950 more in metrics.jsonl" in page
    check(page)


def test_many_runs(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"run{number}", name=f"run{number}") for number in range(26)]
    page = report(*folders)
    check(page)
    assert "Those of the other 18 runs" in page and len(page) < 2_000_000


def test_a_log_scale_only_for_decades(tmp_path: Path) -> None:
    key = Key(label="_hidden $", colour=SERIES[0])
    for most, scale in ((9.0, "linear"), (11.0, "log")):
        line = Line(key=key, x=[0.0, 1.0, most], y=[1.0, 2.0, 3.0])
        axes = Canvas().subplots()
        draw(Chart(title="x", x=Axis(label="x", unit="B", log=True), y=Axis(label="y"), lines=[line]), axes)
        assert axes.get_xscale() == scale and ("log scale" in axes.get_xlabel()) == (scale == "log")
    png([Panel(title="$", description="", draw=lambda axes: None)], [key, key], tmp_path / "x.png")


def test_a_report_replaces_the_one_before(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = write_report([run], run / "report")
    assert write_report([run], run / "report") == first == run / "report" / "index.html"
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written to"):
        write_report([run], tmp_path / "file")


def test_light_and_dark_have_colours_of_their_own(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run"))
    style, body = page.split("</style>")
    assert f"--paper: {PAPER}" in style and f"--paper: {DARK_PAPER}" in style
    assert not re.search(r"#[0-9a-f]{6}\b(?!\")", re.sub(r"c0ffee", "", body)), "a colour that does not follow the page"
    used, known = set(re.findall(r"var\(--([\w-]+)\)", page)), set(re.findall(r"--([\w-]+):", style))
    assert used <= known


def test_it_starts_without_torch_and_ray() -> None:
    code = "import sys, diloco.report; print([name for name in ('torch', 'ray', 'hydra') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_names_of_the_package_stay_what_they_are() -> None:
    code = "import diloco.train; from diloco import RunConfig, Result, train;"
    code += "print(RunConfig(), Result, train.__name__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith("RunConfig(") and told.endswith("train\n")


def aligned(reward: float) -> list[dict[str, object]]:
    """Two evaluations of an alignment run, and a table of samples."""
    told = [record for record in records() if record["event"] not in ("evaluation", "sample")]
    measures = {"eval/kl": 0.0, "eval/reward": 0.1, "eval/length": 9.0, "eval/diversity": 0.9, "eval/refused": 0.0}
    later = {"eval/kl": 2.0, "eval/reward": reward, "eval/length": 8.0, "eval/diversity": 0.8, "eval/refused": 0.0}
    rows = [{"prompt": "Say <b>", "before": "no", "reward before": "0.1", "after": HOSTILE, "reward after": "0.9"}]
    return [
        *told[:-1],
        {**evaluation(1.5, 0, -0.1), **measures},
        {**evaluation(8.0, 2, -reward), **later},
        {"time_s": 9.0, "event": "sample", "round": 2, "text": "Say no", "table": rows},
        told[-1],
    ]


def test_what_an_alignment_run_measures(tmp_path: Path) -> None:
    """Reward over divergence first; what it wrote before and after, side by side; no perplexity of a loss with none."""
    runs = [
        write_run(
            tmp_path / name, aligned(reward), name=name,
            summed=summary(name, -reward, perplexity=None, reward_before=0.1, reward_after=reward, kl=2.0),
        )
        for name, reward in (("mild", 0.5), ("wild", 0.9))
    ]  # fmt: skip
    page = report(runs[0])
    check(page)
    assert page.index("Measures") < page.index("<h2>Loss") and "reward over divergence" in page
    assert "2.000 nats from the reference" in page and "perplexity" not in page
    assert "reward before" in page and "Say &lt;b&gt;" in page and "refused" not in page
    from diloco.report import measures

    (figure,) = measures.figures(read_runs(runs))
    assert [panel.title for panel in figure.panels] == [
        "reward over divergence", "reward", "kl", "length", "diversity"
    ]  # fmt: skip
    both = report(*runs)
    check(both)
    assert "divergence" in both
    assert not measures.figures(read_runs([write_run(tmp_path / "plain")]))
