"""`diloco plan`: what is said of a configuration, with and without a step time and a link; nothing is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from diloco.plan import Plan
from diloco.planner import lines, mends, rows, warning
from experiments.cli import main
from experiments.planning import shapes_of
from tests.toy import Constant, Line

LINE = ["--import", "tests.toy", "workload=line", "runtime=local", "inner_steps=4", "rounds=3"]
PARAMETERS = 4 * 4 + 4 * 4  # of the perceptron of tests/toy.py: the weight of its tied layers, two biases, a norm
TINY = 1_315_968  # of workload.model=tiny


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON of a plan, which leaves nothing behind."""
    assert main(["plan", "--json", *arguments]) == 0
    assert not list(Path.cwd().iterdir())
    return json.loads(capsys.readouterr().out)


def test_a_plan_in_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, *LINE, "--step-s", "0.5", "--link", "200mbit", "islands=4", "store.shards=2")
    assert (found["parameters"], found["fragments"]) == (PARAMETERS, [PARAMETERS])
    assert (found["islands"], found["inner_steps"], found["rounds"], found["lag"]) == (4, 4, 3, 0)
    assert (found["bits_up"], found["bytes_up"], found["bytes_down"]) == (32, 4 * PARAMETERS, 4 * PARAMETERS)
    assert found["link_gbits"] == pytest.approx(0.2)
    wire_s = 2 * 32 * PARAMETERS * 3 / 2 / 0.2e9  # three other islands and two shards
    assert [found["wire_s"], found["exposed_s"]] == pytest.approx([wire_s, wire_s], rel=1e-6)
    assert found["utilization"] == pytest.approx(2 / (2 + wire_s))
    assert set(found["required_gbits"]) == {"50", "80", "90", "95", "99"}
    assert found["required_gbits"]["50"] == pytest.approx(0.2 * wire_s / 2)
    assert found["required_gbits_at_1_s"]["50"] == pytest.approx(found["required_gbits"]["50"] / 2)
    assert found["warning"] is None


def test_nothing_is_invented(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "+experiment=quickstart", "codec=bfloat16")
    assert found["parameters"] == TINY and found["bits_up"] == 16
    assert found["bytes_up"] == 2 * TINY and found["bytes_down"] == 4 * TINY
    unknown = ("step_s", "link_gbits", "wire_s", "exposed_s", "utilization", "required_gbits", "warning")
    assert [found[key] for key in unknown] == [None] * len(unknown)
    assert main(["plan", *LINE]) == 0
    said = capsys.readouterr().out
    assert "unknown: give --step-s" in said and "unknown: give --link" in said and "utilisation" not in said


def test_a_slow_link_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["+experiment=quickstart", "islands=4", "--step-s", "0.2", "--link"]
    assert main(["plan", *given, "1mbit"]) == 0
    said = capsys.readouterr().out
    assert "warning: islands will train" in said and "inner_steps=" in said
    assert "codec=int4 codec@codec_down=int4" in said and "layout=fragments schedule.lag=5" in said
    assert main(["plan", *given, "1gbit"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_the_members_of_an_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "+experiment=compare", "--link=1")
    assert [plan["member"] for plan in found] == ["one_worker", "data_parallel", "diloco_h10", "diloco_h50"]
    assert "not counted" in found[1]["notes"][0]
    assert main(["plan", "+experiment=compare"]) == 0
    assert capsys.readouterr().out.count("\nplan compare ") == 3


def test_steps_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, *LINE, "--measure", "data.batch=8", "workers=2")
    assert 0 < found["step_s"] < 10
    assert found["link_gbits"] is None
    assert ["step: median" in found["notes"][1], "one node has none" in found["notes"][2]] == [True, True]
    assert found["required_gbits"]["80"] > 0
    given = told(capsys, *LINE, "--measure", "--step-s", "3", "--link", "2")
    assert (given["step_s"], given["link_gbits"], given["notes"]) == (3, 2, [])


def test_a_cluster_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main(["plan", *LINE, "--measure", "--step-s", "1"]) == 2
    assert "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1" in capsys.readouterr().err
    assert told(capsys, *LINE, "--measure", "--step-s", "1", "--link", "1")["utilization"] > 0.9  # nobody is asked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--link", "3parsec"], "'3parsec' is no bandwidth"),
        (["--link", "0"], "is no bandwidth"),
        (["--link=-1gbit"], "is no bandwidth"),
        (["--step-s", "0"], "is no time"),
        (["--step-s", "nan"], "is no time"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["-m", "islands=1,2"], "unrecognized arguments: -m"),
    ],
)
def test_bad_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert words in said.err and len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["islands=none"], "islands=none"),
        (["islnds=2"], "did you mean islands"),
        (["codec=nonsense"], "there is no such choice"),
        (["inner_steps=0"], "inner_steps=0 is too small"),
        (["--import", "not_there"], "--import not_there"),
        (["workload.model=./nowhere"], "there is no such folder"),
        (["--import", "tests.toy", "workload=with_batch_norm"], "keeps batch statistics"),
        (["--measure", "data.files=none.txt"], "none.txt"),
        (["resume=nowhere"], "resume=nowhere"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err and "Traceback" not in said.err and said.out == ""
    assert len([line for line in said.err.splitlines() if not line.startswith("measuring")]) <= 2
    assert not list(here.iterdir())


class Looking(Constant):
    """A model that cannot be built without values."""

    def build_model(self, seed: int) -> Any:
        model = super().build_model(seed)
        first: Tensor = next(model.parameters())
        assert float(first.sum()) == 3.0
        return model


def test_shapes_need_no_values_where_the_model_does_not() -> None:
    assert shapes_of(Constant(), 0) == shapes_of(Looking(), 0) == {"a": (3,), "b": (2, 2)}
    assert set(shapes_of(Line(), 0)) == {"first.weight", "first.bias", "last.bias", "norm.weight", "norm.bias"}


def test_a_pretrained_model(here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from diloco.workloads.causal_lm import CausalLM

    folder = tmp_path_factory.mktemp("pretrained")
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    )
    model.save_pretrained(folder)
    assert shapes_of(CausalLM(model=str(folder)), 0) == {n: tuple(p.shape) for n, p in model.named_parameters()}


# --- the texts ---


def make(**settings: Any) -> Plan:
    usual = {"fragments": (1_000_000,), "bits_up": 32, "bits_down": 32, "islands": 2, "shards": 2, "inner_steps": 50}
    return Plan(**{**usual, **settings})


@pytest.mark.parametrize("plan", [make(), make(islands=1), make(fragments=(999_999_999,) * 36, inner_steps=10_000)])
def test_a_run_says_its_plan_in_two_lines(plan: Plan) -> None:
    said = lines(plan)
    assert all(line.startswith("plan: ") and line.isascii() and len(line) <= 120 for line in said)
    assert (", 80 % utilisation needs " in said[1]) == (plan.islands > 1)


def test_what_mends_a_slow_link_reaches_what_it_says() -> None:
    plan = make(step_s=0.1, link_gbits=0.001)
    assert plan.utilization is not None and plan.utilization < 0.8
    first = mends(plan)[0]
    steps = int(first.partition("=")[2].partition(" ")[0])
    more, fewer = (make(step_s=0.1, link_gbits=0.001, inner_steps=n).utilization for n in (steps, steps // 2))
    assert more is not None and fewer is not None and fewer < 0.8 <= more
    assert warning(make(step_s=0.1)) == warning(make(islands=1, step_s=0.1)) == ""


def test_fragments_are_told_of_one_by_one() -> None:
    found = dict(rows(make(fragments=(10**6, 2 * 10**6), step_s=1.0, link_gbits=0.1, lag=1), rounds=2))
    assert found["parameters"].endswith("in 2 fragments")
    assert found["on the wire"] == "0.96 s a round; a fragment 0.32 to 0.64 s"
    assert found["waiting"] == "0 s beside 50 s of steps" and found["utilisation"] == "100 %"
