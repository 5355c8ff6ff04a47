"""The page in a real browser, in light and dark, on a phone and on a wide screen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from diloco.report import write_report
from tests.report.browser import CHROMIUM, Browser, browser
from tests.report.made import free_records, write_routed, write_run, write_sweep

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the report in: apt install chromium")

TOO_WIDE = """
[...document.querySelectorAll('main > section > *, header > *, figure')]
    .filter(element => !element.closest('.scroll') && element.getBoundingClientRect().right > innerWidth + 1)
    .map(element => element.outerHTML)
"""
OUTSIDE = """
[...document.querySelectorAll('figure svg')].flatMap(svg => [...svg.querySelectorAll('text')].filter(text => {
    const [box, all] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];
    return box.left < all.left - 1 || box.right > all.right + 1 || box.top < all.top - 1 || box.bottom > all.bottom + 1;
}).map(text => text.textContent))
"""
LUMINANCE = """
((element) => getComputedStyle(element).color.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0))
(document.body) - getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)
    .reduce((sum, part) => sum + +part, 0)
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("kind", ["run", "sweep", "free", "paths", "many"])
def test_a_browser_has_nothing_to_say(page: Browser, tmp_path: Path, kind: str) -> None:
    make = {
        "run": write_run,
        "sweep": write_sweep,
        "free": lambda folder: write_run(folder, free_records()),
        "paths": write_routed,
        "many": lambda folder: write_routed(folder, 16, rows=[(a, b) for a in range(4) for b in range(4)]),
    }
    folder = make[kind](tmp_path / "run")
    path = write_report([folder], tmp_path / "out")
    for width in (400, 1280):
        for dark in (False, True):
            page.open(path, width=width, dark=dark)
            assert page.complaints() == [] and page.requests() == [path.resolve().as_uri()]
            assert page.value("document.documentElement.scrollWidth") == width  # only its tables scroll sideways
            assert page.value(TOO_WIDE) == [] and page.value(OUTSIDE) == []
            assert (page.value(LUMINANCE) > 300) == dark and abs(page.value(LUMINANCE)) > 300
            drawn = page.value("[...document.querySelectorAll('figure svg path')].length")
            assert drawn > 40
            size = page.value("parseFloat(getComputedStyle(document.querySelector('.panels svg text')).fontSize) *"
                              " document.querySelector('.panels svg').getScreenCTM().a")  # fmt: skip
            assert size >= 9  # CSS pixels: it can be read


def test_a_screenshot_can_be_taken(page: Browser, tmp_path: Path) -> None:
    page.open(write_report([write_run(tmp_path / "run")], tmp_path / "out"))
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
