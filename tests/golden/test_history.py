"""Whole parameter histories under constant gradients, against JSON; `pytest --regenerate-golden` writes it anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diloco.checkpoint import Checkpoint, read_modules
from diloco.config import RunConfig
from diloco.inner import Sgd
from diloco.messages import ModuleKey
from diloco.outer import Nesterov
from diloco.runtime.base import Store
from diloco.schedule import Barrier
from diloco.starting import read_values
from tests.toy import Constant, launch, records, warned

FILE = Path(__file__).with_name("history.json")
ROUNDS, STEPS = 5, 2
# Islands with gradients of 1 and 3 everywhere: in a round of two steps of rate 0.1 they move by -0.2 and -0.6.
BASE: dict[str, Any] = {
    "workload": Constant(gradients=[1.0, 3.0], start=1.0),
    "islands": 2,
    "rounds": ROUNDS,
    "inner_steps": STEPS,
    "segment_steps": 1,
    "inner": Sgd(lr=0.1),
    "outer": Nesterov(lr=0.7, momentum=0.9),
    "store": Store(shards=2),
    "checkpoint": Checkpoint(every=1, keep=100),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropping": {"schedule": Barrier(drop_probability=0.4), "seed": 11},
    # the gradient of shard 1 is not finite in step 3, which is in round 1
    "poisoned": {"workload": Constant(gradients=[1.0, 3.0], start=1.0, poisoned_steps=[3], poisoned_shards=[1])},
}


def history(directory: Path, variant: str) -> list[dict[str, Any]]:
    """After each round: all parameters, their momentum, and whose contributions counted."""
    config = {**BASE, **VARIANTS[variant]}
    result = launch(directory, **config)
    assert result.summary["status"] == "finished"
    contributors = {record["round"]: record["outer/contributors"] for record in records(directory, "commit")}
    found = []
    for round_ in range(1, RunConfig(**config).rounds + 1):
        folder = str(directory / "checkpoints" / f"round-{round_:06d}")
        states = read_modules(folder, [ModuleKey("whole.0/0"), ModuleKey("whole.1/0")])
        momentum = {
            name.rpartition("/")[2]: tensor.tolist()
            for state in states.values()
            for name, tensor in state.tensors.items()
            if name.startswith("outer/momentum/")
        }
        found.append(
            {
                "round": round_,
                "contributors": contributors.get(round_, []),
                "values": {name: value.tolist() for name, value in sorted(read_values(folder).items())},
                "momentum": dict(sorted(momentum.items())),
            }
        )
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_history_is_the_golden_one(runs: Path, variant: str, regenerate: bool) -> None:
    found = history(runs / variant, variant)
    golden = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if regenerate:
        FILE.write_text(json.dumps({**golden, variant: found}, indent=1) + "\n")
        pytest.skip(f"{FILE.name} was written anew: review its difference")
    assert found == golden[variant]


def everywhere(value: float) -> Any:
    return {"a": pytest.approx([value] * 3, abs=1e-6), "b": [pytest.approx([value] * 2, abs=1e-6)] * 2}


def test_the_first_rounds_by_hand() -> None:
    """delta = (0.2 + 0.6) / 2 = 0.4 each round; m = 0.4, 0.76, 1.084; step = 0.7 (0.4 + 0.9 m)."""
    first, second, third = json.loads(FILE.read_text())["plain"][:3]
    assert first["values"] == everywhere(1 - 0.532)
    assert first["momentum"] == everywhere(0.4)
    assert second["values"] == everywhere(0.468 - 0.7588)
    assert second["momentum"] == everywhere(0.76)
    assert third["values"] == everywhere(-0.2908 - 0.96292)
    assert third["momentum"] == everywhere(1.084)
    assert [r["contributors"] for r in (first, second, third)] == [[0, 1]] * 3


def test_poison_by_hand() -> None:
    """In round 1 only island 0 counts, with delta = 0.2: m = 0.9 * 0.4 + 0.2 = 0.56; then both count again."""
    first, second, third = json.loads(FILE.read_text())["poisoned"][:3]
    assert first["values"] == everywhere(0.468)
    assert second["contributors"] == [0]
    assert second["momentum"] == everywhere(0.56)
    assert second["values"] == everywhere(0.468 - 0.7 * (0.2 + 0.9 * 0.56))
    assert third["contributors"] == [0, 1]
    assert third["momentum"] == everywhere(0.9 * 0.56 + 0.4)


def test_poison_is_counted_and_named(runs: Path) -> None:
    result = launch(runs / "run", **{**BASE, **VARIANTS["poisoned"]})
    assert result.summary["contributions"] == {"accepted": 2 * ROUNDS - 1, "rejected": 1, "late": 0, "stale": 0}
    assert result.summary["tokens"] == (2 * ROUNDS - 1) * STEPS
    assert any("source 1" in message and "round 1" in message for message in warned(runs / "run"))


def test_dropping_by_hand() -> None:
    """Whoever was dropped keeps its weights, and later contributes all that it moved since: written out in floats."""
    rounds = json.loads(FILE.read_text())["dropping"]
    patterns = [tuple(record["contributors"]) for record in rounds]
    assert len(set(patterns)) > 1, "no round or every round drops: choose another seed"
    moves = (0.2, 0.6)
    theta, momentum, local = 1.0, 0.0, [1.0, 1.0]
    kept = [False, False]
    for record in rounds:
        deltas = []
        for source in (0, 1):
            start = local[source] if kept[source] else theta
            local[source] = start - moves[source]
            if source in record["contributors"]:
                deltas.append(theta - local[source])
        kept = [source not in record["contributors"] for source in (0, 1)]
        if deltas:
            delta = sum(deltas) / len(deltas)
            momentum = 0.9 * momentum + delta
            theta -= 0.7 * (delta + 0.9 * momentum)
        assert record["values"] == everywhere(theta)
        assert record["momentum"] == everywhere(momentum)


def test_all_poisoned_stops_the_run_with_the_weights_of_the_round_before(runs: Path) -> None:
    workload = Constant(gradients=[1.0, 3.0], start=1.0, poisoned_steps=[3], poisoned_shards=[0, 1])
    result = launch(runs / "run", **{**BASE, "workload": workload})
    assert result.summary["status"] == "stopped"
    assert "all 2 contributions to round 1 were rejected" in result.summary["reason"]
    assert result.summary["rounds"] == 1
    plain = launch(runs / "plain", **{**BASE, "rounds": 1})
    assert result.summary["weights_sha256"] == plain.summary["weights_sha256"]
    assert result.summary["outer_state_sha256"] == plain.summary["outer_state_sha256"]
