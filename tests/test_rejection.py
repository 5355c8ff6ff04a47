"""Bad contributions: rejected whole, counted by their reason, and without a trace in what the sender keeps."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from diloco import saved_view, seats, summary
from diloco.async_.schedule import FirstCome
from diloco.codec import BFloat16
from diloco.counters import Counters
from diloco.events import Push, Received, Respawn, Save
from diloco.feedback import Feedback
from diloco.formats import format_reasons
from diloco.messages import Reason, SourceId, Task, Verdict
from diloco.norms import Norms
from diloco.schedule import Barrier, Schedule
from tests.toy import FakeRuntime, make_view

NONE_OF_ALL = {reason.value: 0 for reason in Reason}


class WithBad(FakeRuntime):
    """What `spoil` makes of the last part of what source 1 sends to round 1."""

    def __init__(self, spoil: Callable[[Verdict], Verdict], schedule: Schedule | None = None, **settings: Any) -> None:
        super().__init__(make_view(**{"islands": 3, **settings}), schedule)
        self.view.norms = Norms(mads=6.0)
        self._spoil = spoil

    def verdicts(self, task: Task) -> tuple[Verdict, ...]:
        found = super().verdicts(task)
        bad = (task.source, task.round) == (1, 1)
        return (*found[:-1], self._spoil(found[-1])) if bad else found


SPOILED: dict[Reason, Callable[[Verdict], Verdict]] = {
    Reason.shape: lambda verdict: replace(verdict, shape_ok=False, finite=False, norm=math.nan),
    Reason.version: lambda verdict: replace(verdict, version_ok=False),
    Reason.not_finite: lambda verdict: replace(verdict, finite=False, norm=math.inf),
    Reason.norm: lambda verdict: replace(verdict, norm=100.0),
}
WORDS = {
    Reason.shape: "the wrong names or shapes in module whole.1/0",
    Reason.version: "from a version that module whole.1/0 never had",
    Reason.not_finite: "not finite in module whole.1/0",
    Reason.norm: r"absurd norm (100, at most 8.485)",  # six times the root of two
}


def told(runtime: FakeRuntime) -> list[Mapping[str, Any]]:
    return [record for record in runtime.logged("warning") if "reason" in record]


@pytest.mark.parametrize("reason", SPOILED)
def test_each_reason_is_counted_and_told(reason: Reason) -> None:
    runtime = WithBad(SPOILED[reason], islands=12)
    runtime.start()
    runtime.go()
    others = tuple(source for source in range(12) if source != 1)
    assert [c.sources for c in runtime.commits() if c.round == 1] == [others, others]  # whole: on no module
    counters = runtime.view.counters
    assert (counters.accepted, counters.rejected, counters.late, counters.stale) == (35, 1, 0, 0)
    assert counters.rejected_by_reason == {reason.value: 1}
    (record,) = told(runtime)
    module = "whole.0/0" if reason is Reason.norm else "whole.1/0"
    found = {key: record[key] for key in ("source", "module", "of_round", "reason", "round")}
    assert found == {"source": 1, "module": module, "of_round": 1, "reason": reason.value, "round": 1}
    assert "source 1 to round 1" in record["message"] and WORDS[reason] in record["message"]


@pytest.mark.parametrize("reason", SPOILED)
def test_what_the_sender_keeps_of_its_codec_stays_as_it_was(reason: Reason) -> None:
    """The tasks of source 1, played to its error feedback: what the bad round lost is not added to the residual."""
    runtime = WithBad(SPOILED[reason], islands=12, rounds=4)
    runtime.start()
    runtime.go()
    feedback, codec = Feedback(), BFloat16(error_feedback=True)
    residuals = {}
    for task in runtime.tasks(1):
        feedback.settle(task.settled)
        residuals[task.round] = {name: value.clone() for name, value in feedback.residual.items()}
        if task.send:
            feedback.around(codec, task.round, task.fragment).encode({"w": torch.full((2,), 1.001 + task.round)})
    assert residuals[0] == {} and residuals[1]["w"].abs().sum() > 0
    assert torch.equal(residuals[2]["w"], residuals[1]["w"])
    assert not torch.equal(residuals[3]["w"], residuals[2]["w"])
    fresh = [task.round for task in runtime.tasks(1) if task.fresh]
    assert fresh == [2]


@pytest.mark.parametrize("schedule", [Barrier(), FirstCome(draw=False), FirstCome(draw=False, batch=3)])
@pytest.mark.parametrize("when", ["at once", "rounds later"])
def test_the_same_one_twice_counts_once(schedule: Schedule, when: str) -> None:
    runtime = FakeRuntime(make_view(islands=3, rounds=6, free=schedule.free), schedule)
    if schedule.free:
        runtime.view.pool = runtime.view.new_pool(schedule.drawn)
    runtime.start()
    runtime.go(until=lambda: any(isinstance(c, Push) for c in runtime.asked))
    push = next(c for c in runtime.asked if isinstance(c, Push))
    runtime.answer(push)
    if when == "rounds later":
        runtime.go(until=lambda: runtime.view.round == 4)
    verdicts = runtime.verdicts(push.task)
    before = (len(runtime.commits()), len(runtime.tasks()), runtime.view.counters.tokens)
    given = {"now_s": runtime.now_s(), "turn": push.task.turn, "attempt": push.task.attempt}
    for _ in range(2):
        runtime.tell(Received(**given, verdicts=verdicts))
    assert (len(runtime.commits()), len(runtime.tasks()), runtime.view.counters.tokens) == before
    assert [record["reason"] for record in told(runtime)] == ["duplicate"] * 2
    runtime.go()
    counters = runtime.view.counters
    assert counters.rejected_by_reason == {"duplicate": 2} and (counters.rejected, counters.late) == (2, 0)
    assert (counters.accepted, counters.tokens) == (18, 10 * 6 * 18)


def test_one_of_an_island_that_was_given_up_is_a_zombie_and_what_is_trained_again_counts() -> None:
    runtime = FakeRuntime(make_view(islands=1, rounds=2))
    runtime.start()
    runtime.go(Respawn, until=lambda: any(isinstance(c, Push) for c in runtime.asked))
    push = next(c for c in runtime.asked if isinstance(c, Push))
    runtime.lose(0)
    runtime.answer(push)
    (record,) = told(runtime)
    assert (record["reason"], record["source"], record["of_round"]) == ("zombie", 0, 0)
    assert "given up with its island" in record["message"]
    runtime.go()
    assert runtime.view.counters.rejected_by_reason == {"zombie": 1}
    assert runtime.view.counters.accepted == 2
    assert not any(task.fresh for task in runtime.tasks())  # its weights were not bad


@pytest.mark.parametrize("seed", range(6))
def test_what_was_heard_after_a_checkpoints_round_is_no_duplicate_when_it_comes_again(seed: int) -> None:
    """With a lag an island may have sent a fragment of the next round before the last one of this was committed."""
    given: dict[str, Any] = {"islands": 3, "rounds": 5, "fragments": (("whole.0",), ("whole.1",))}
    runtime = FakeRuntime(make_view(**given), Barrier(lag=5), seed=seed)
    ahead = 0
    runtime.start()
    while runtime.stop is None:
        said = runtime.answer(random.Random(f"{seed}/{len(runtime.said)}").choice(runtime.ready()))
        for save in [command for command in said if isinstance(command, Save)]:
            view = make_view(**given)
            ahead += sum(source.heard[1] >= save.view["round"] for source in runtime.view.sources.values())
            saved_view.load(view, json.loads(json.dumps(save.view)))
            seats.place(view, 3)
            resumed = FakeRuntime(view, Barrier(lag=5), seed=seed)
            resumed.start()
            resumed.go()
            assert resumed.stop is not None and resumed.stop.status == "finished"
            assert (view.counters.rejected, view.counters.accepted) == (0, 3 * 5 * 2)
    assert ahead


def test_a_resumed_run_knows_what_it_has_heard() -> None:
    runtime = FakeRuntime(make_view())
    runtime.start()
    runtime.go(until=lambda: runtime.view.round == 1)
    push = next(c for c in runtime.said if isinstance(c, Push) and c.task.source == 0)
    view = make_view()
    saved_view.load(view, json.loads(json.dumps(saved_view.to_json(runtime.view))))
    resumed = FakeRuntime(view)
    resumed.start()
    resumed.tell(Received(now_s=1.0, turn=push.task.turn, verdicts=runtime.verdicts(push.task)))
    assert view.sources[SourceId(0)].has_heard(push.task.turn)
    assert view.counters.rejected_by_reason == {"duplicate": 1}


def test_reasons_in_the_summary_and_as_text() -> None:
    counters = Counters(accepted=5)
    for reason in (Reason.norm, Reason.not_finite, Reason.norm):
        counters.reject(reason)
    found = summary.outcome(counters, islands=2, parameters=10, wall_s=1.0)
    assert found["contributions"] == {"accepted": 5, "rejected": 3, "late": 0, "stale": 0}
    assert found["rejected_by_reason"] == {**NONE_OF_ALL, "not_finite": 1, "norm": 2}
    assert format_reasons(found["rejected_by_reason"]) == "1 not finite, 2 norm"
    assert format_reasons(NONE_OF_ALL) == format_reasons(None) == format_reasons({}) == ""
    counted = counters.minus(Counters())
    assert counted.rejected_by_reason == counters.rejected_by_reason
