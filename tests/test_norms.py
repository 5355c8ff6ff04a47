"""Norms: what is absurd beside what counted before, and that a resumed run judges the same."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diloco import saved_view
from diloco.checkpoint import Checkpoint
from diloco.inner import AdamW, RateSchedule
from diloco.messages import Commit, ModuleKey, SourceId
from diloco.norms import FEWEST, FLOOR, LEAST, MOST, Norms, bound
from diloco.progress import Arrival, ModuleView
from diloco.runtime.base import Store
from experiments.benchmarks.poisoned import Poison, Poisoned
from tests.resume.test_resume_local import Broken, at_event, die
from tests.toy import Line, digests, launch, make_view, records

KEY, OTHER = ModuleKey("whole.0/0"), ModuleKey("whole.1/0")


def remember(norms: Norms, values: Sequence[float], *, sources: int = 1, key: ModuleKey = KEY) -> None:
    arrivals = {(0, SourceId(i)): Arrival(examples=1.0, tokens=1, norm=value) for i, value in enumerate(values)}
    order = tuple(SourceId(i) for i in range(len(values)))
    commit = Commit(module=key, round=0, sources=order, weights=(1.0,) * len(order))
    norms.remember([commit], {key: ModuleView(arrivals=arrivals)}, sources)


def test_the_bound_by_hand() -> None:
    """Median 4; deviations 4 3 2 1 0 0 1 2 3 4 have the median 2; six times that is more than the floor."""
    logs = [0.0, 1.0, 2.0, 3.0, 4.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert bound(logs, 6.0) == 4.0 + 12.0
    assert bound(logs, 0.1) == 4.0 + FLOOR
    assert bound([4.0] * 10, 6.0) == 4.0 + FLOOR  # however alike they are


def test_nothing_is_judged_by_too_few_or_where_it_is_off() -> None:
    assert bound([0.0] * (LEAST - 1), 6.0) == math.inf
    assert bound([0.0] * LEAST, 6.0) < math.inf
    assert bound([0.0] * 100, 0.0) == math.inf


@given(
    honest=st.lists(st.floats(-0.5, 0.5), min_size=11, max_size=30),
    wrong=st.floats(-50, 50),
    share=st.floats(0.0, 0.45),
)
@settings(max_examples=100, deadline=None)
def test_up_to_half_may_be_wrong(honest: list[float], wrong: float, share: float) -> None:
    logs = honest[: len(honest) - int(share * len(honest))]
    logs += [wrong] * (len(honest) - len(logs))
    assert -0.5 + FLOOR <= bound(logs, 6.0) <= 0.5 + 6.0 * 1.0
    assert bound(sorted(logs), 6.0) == bound(logs, 6.0)  # their order says nothing


def test_a_warm_up_does_not_trip_it() -> None:
    """The inner rate grows linearly over so many rounds, and so do the norms of two or of many islands."""
    for islands in (2, 5, 64):
        for rounds in (3, 10, 100):
            norms = Norms(mads=Store().norm_mads)
            for round_ in range(2 * rounds):
                size = min(round_ + 0.5, rounds)
                assert size < norms.allowed(KEY)
                remember(norms, [size] * islands, sources=islands)


def test_only_the_last_rounds_are_remembered_but_all_sources_are() -> None:
    norms = Norms(mads=6.0)
    for _ in range(100):
        remember(norms, [1.0] * 8, sources=8)
    assert len(norms.logs[KEY]) == 4 * 8
    remember(norms, [1.0], sources=1)
    assert len(norms.logs[KEY]) == FEWEST
    for _ in range(3):
        remember(norms, [1.0] * 1000, sources=1000)
    assert len(norms.logs[KEY]) == MOST


def test_each_module_has_its_own() -> None:
    norms = Norms(mads=6.0)
    remember(norms, [1.0] * LEAST)
    remember(norms, [1000.0] * LEAST, key=OTHER)
    assert norms.allowed(KEY) == pytest.approx(6.0)
    assert norms.allowed(OTHER) == pytest.approx(6000.0)
    assert norms.allowed(ModuleKey("unseen")) == math.inf


def test_norms_of_zero_say_nothing_and_huge_ones_do_not_overflow() -> None:
    norms = Norms(mads=6.0)
    remember(norms, [0.0] * 100)
    assert norms.logs[KEY] == [] and norms.allowed(KEY) == math.inf
    remember(norms, [1e308] * LEAST)
    assert norms.allowed(KEY) == math.inf


@pytest.mark.parametrize("mads", [-1.0, math.inf, math.nan])
def test_a_setting_that_is_none_is_refused(mads: float) -> None:
    with pytest.raises(ValueError, match=r"store\.norm_mads=.* must not be negative; 0 accepts any norm"):
        Store(norm_mads=mads)


def test_they_are_part_of_what_is_saved() -> None:
    view = make_view()
    view.norms = Norms(mads=6.0)
    remember(view.norms, [0.1, 0.7, 3.0])
    saved = json.loads(json.dumps(saved_view.to_json(view)))
    remember(view.norms, [5.0])  # does not change what was saved
    loaded = make_view()
    loaded.norms = Norms(mads=6.0)
    saved_view.load(loaded, saved)
    assert loaded.norms == Norms(mads=6.0, logs={KEY: [math.log(0.1), math.log(0.7), math.log(3.0)]})


# --- in runs ---

RUN: dict[str, Any] = {
    "workload": Line(),
    "inner": AdamW(lr=0.01, warmup_steps=0, rate=RateSchedule.constant),
    "islands": 5,
    "rounds": 6,
    "checkpoint": Checkpoint(every=1, keep=100),
    "runtime": Poisoned(poison=Poison.flipped, bad=3, first_round=3),
    "store": Store(norm_mads=6.0, shards=2),
}


def test_an_absurd_one_is_rejected_whole_and_named(tmp_path: Path) -> None:
    given = {**RUN, "rounds": 4}
    found = launch(tmp_path, **given)
    assert found.summary["contributions"] == {"accepted": 19, "rejected": 1, "late": 0, "stale": 0}
    assert found.summary["rejected_by_reason"]["norm"] == sum(found.summary["rejected_by_reason"].values()) == 1
    (told,) = [record for record in records(tmp_path, "warning") if "reason" in record]
    named = {key: told[key] for key in ("source", "module", "round", "of_round", "reason")}
    assert named == {"source": 3, "module": "whole.0/0", "round": 3, "of_round": 3, "reason": "norm"}
    assert "absurd norm (" in told["message"]
    contributors = [r["outer/contributors"] for r in records(tmp_path, "commit")]
    assert contributors == [[0, 1, 2, 3, 4]] * 3 + [[0, 1, 2, 4]]
    same = launch(tmp_path / "nan", **{**given, "runtime": Poisoned(poison=Poison.nan, bad=3, first_round=3)})
    assert digests(same) == digests(found)  # nothing of it is in the weights
    assert same.summary["rejected_by_reason"]["not_finite"] == 1


def test_where_it_is_off_or_nobody_sends_poison_it_changes_nothing(tmp_path: Path) -> None:
    off = launch(tmp_path / "off", **{**RUN, "store": Store(norm_mads=0.0, shards=2)})
    assert off.summary["contributions"]["rejected"] == 0
    honest = {**RUN, "runtime": Poisoned(first_round=100)}
    found, same = (
        launch(tmp_path / f"{mads}", **{**honest, "store": Store(norm_mads=mads, shards=2)}) for mads in (0.0, 6.0)
    )
    assert digests(found) == digests(same) != digests(off)


@pytest.mark.parametrize("death", [60, 75, 90, 105])
def test_a_resumed_run_decides_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: int) -> None:
    monkeypatch.chdir(tmp_path)
    whole = launch(Path("runs", "whole").absolute(), **RUN)
    directory = Path("runs", "broken").absolute()
    with at_event(death, die), pytest.raises(Broken):
        launch(directory, **RUN)
    resumed = launch(directory, **{**RUN, "resume": str(directory)})
    assert digests(resumed) == digests(whole)
    kept = ("contributions", "rejected_by_reason", "tokens", "outer_steps")
    assert {key: resumed.summary[key] for key in kept} == {key: whole.summary[key] for key in kept}


def test_another_bound_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = Path("runs", "run").absolute()
    launch(directory, **{**RUN, "store": Store(norm_mads=6.0)})  # shards are derived
    again = {**RUN, "resume": str(directory), "store": Store(norm_mads=5.0)}
    with pytest.raises(ValueError, match=r"store\.norm_mads=5\.0 was 6\.0"):
        launch(directory, **again)
