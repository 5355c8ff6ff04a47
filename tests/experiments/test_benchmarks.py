"""The benchmarks in their smallest sizes: they end, and say what they should. No time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.benchmarks import (
    codec,
    coordinator,
    dipaco_cost,
    inner_loop,
    memory,
    outer_parts,
    outer_round,
    peers,
    plan,
    slow_link,
    wan,
)

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = {
    "codec": codec,
    "coordinator": coordinator,
    "dipaco_cost": dipaco_cost,
    "inner_loop": inner_loop,
    "memory": memory,
    "outer_parts": outer_parts,
    "outer_round": outer_round,
    "plan": plan,
}
starts_ray = pytest.mark.timeout(300)  # twenty seconds on a free machine


def run(name: str, *options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", f"experiments.benchmarks.{name}", *options]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.run(
        command,
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def figures(name: str, *options: str, folder: Path) -> dict[str, Any]:
    """The last line of a quick run, which leaves nothing where it was started."""
    done = run(name, "--quick", *options, folder=folder)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["benchmark"] == name
    return found


def test_codec(tmp_path: Path) -> None:
    found = figures("codec", folder=tmp_path)
    assert set(found["codecs"]) == {"float32", "bfloat16", "int8", "int4", "topk"}
    assert found["memcpy_gbs"] > 0 and found["ratio"] > 0 and found["cpu_ratio"] > 0
    assert found["parameters"] >= 100_000
    for figure in found["codecs"].values():
        assert min(figure[f"{way}_gbs"] for way in ("encode", "decode", "difference")) > 0
    bits = {name: figure["bits"] for name, figure in found["codecs"].items()}
    assert bits == pytest.approx({"float32": 32, "bfloat16": 16, "int8": 8.13, "int4": 4.13, "topk": 0.235}, rel=0.2)


def test_coordinator(tmp_path: Path) -> None:
    found = figures("coordinator", folder=tmp_path)
    assert found["cost_ratio"] > 0 and found["cost_spread"] >= 1
    assert set(found["by_modules_per_path"]) == {"4", "2"}
    for width in found["by_modules_per_path"].values():
        for key in ("events_per_s", "seconds_per_task", "slowest_event_s"):
            assert set(width[key]) == {"10", "30"}
            assert all(value > 0 for value in width[key].values())


def test_outer_parts(tmp_path: Path) -> None:
    found = figures("outer_parts", folder=tmp_path)
    assert set(found["codecs"]) == set(outer_parts.WAYS)
    for name, figure in found["codecs"].items():
        parts = [figure[f"{part}_s"] for part in outer_parts.PARTS]
        assert min(parts) > 0 and figure["round_s"] == pytest.approx(sum(parts), rel=1e-3)
        down = 4.2 if name == "int4 both ways" else 32
        assert 8 * figure["bytes_down"] == pytest.approx(down * found["parameters"], rel=0.05)


def test_plan(tmp_path: Path) -> None:
    found = figures("plan", folder=tmp_path)
    assert found["cells"] == 25
    assert found["within_one_step"] >= 0.95 and found["exact"] >= 0.75


def test_dipaco_cost(tmp_path: Path) -> None:
    found = figures("dipaco_cost", folder=tmp_path)
    assert set(found["by_paths"]) == {"4", "9"} and (found["waves"]["paths"], found["waves"]["islands"]) == (9, 4)
    size = 4 * found["parameters"]
    for row in found["by_paths"].values():
        assert size < row["bytes up"] < 1.01 * size and size < row["bytes down"] < 1.01 * size
        assert row["parameters"] == row["anchors"] == size and row["island's tensors"] < row["process USS"]
        assert row["optimizer"] == pytest.approx(2 * size, rel=0.01)  # two moments, and counters
        assert all(value > 0 for value in row.values())
    alike = ("bytes up", "bytes down", "island's tensors", "kept of a source")
    assert [found["growth"][name] for name in alike] == pytest.approx([1] * 4, rel=1e-3)


@starts_ray
def test_inner_loop(tmp_path: Path) -> None:
    found = figures("inner_loop", folder=tmp_path)
    assert found["ratio"] > 0 and found["cpu_ratio"] > 0
    assert found["tokens_per_s"] > 0 and min(found["bare_tokens_per_s"].values()) > 0
    assert found["loss_difference"] < 1e-4  # the two did the same work


@starts_ray
def test_memory(tmp_path: Path) -> None:
    found = figures("memory", folder=tmp_path)
    assert found["extra_bytes"] == found["island_uss_bytes"] - found["bare_uss_bytes"]
    assert found["allowed_bytes"] == round(1.1 * 4 * (found["parameters"] + found["largest_slot"]))
    assert found["ratio"] == pytest.approx(found["extra_bytes"] / found["allowed_bytes"], rel=1e-5)


@starts_ray
@pytest.mark.skipif(find_spec("torchft") is None, reason="torchft is an optional extra")
def test_outer_round(tmp_path: Path) -> None:
    found = figures("outer_round", folder=tmp_path)
    assert found["ratio"] == found["islands"]["2"]["ratio"] > 0


def lacking() -> str:
    """What hosts on rate-limited links want and this machine has not."""
    try:
        with wan.hosts(1, rate_bit_s=10**9):
            return ""
    except ValueError as error:
        return str(error)


@starts_ray
def test_outer_round_over_links(tmp_path: Path) -> None:
    if why := lacking():
        pytest.skip(why)
    codec = ("--codec", "bfloat16")
    found = figures("outer_round", "--alone", "--wan", "100mbit", "--hosts", "2", *codec, folder=tmp_path)
    assert 80 < found["line_mbit"] < 100
    assert found["bytes_down"] == pytest.approx(4e5, rel=0.01)
    assert found["bytes_up"] == pytest.approx(2e5, rel=0.01)
    assert found["ratio_to_bound"] == pytest.approx(found["ours_s"] / found["bound_s"], rel=1e-4)
    assert found["ratio_to_bound"] > 1
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in left.splitlines() if line.startswith("wan") and not alive(line)]


def alive(line: str) -> bool:
    """Whether the process that made a namespace of this name is still there."""
    return Path(f"/proc/{line.removeprefix('wan').partition('-')[0]}").exists()


def test_the_bound_of_an_outer_round() -> None:
    """2N(1 - 1/R)/W: 120 MB each way, three hosts, 192 Mbit/s; with a lone host nothing crosses a link."""
    bound = outer_round.bound_s
    assert bound(2 * 120e6, hosts=3, line_mbit=192.0) == pytest.approx(2 * 960 * (2 / 3) / 192)
    assert bound(120e6 + 15e6, hosts=2, line_mbit=100.0) == pytest.approx((960 + 120) / 2 / 100)
    assert bound(120e6, hosts=1, line_mbit=100.0) == 0


def test_rates() -> None:
    assert wan.bits_per_s("200mbit") == 200_000_000
    assert wan.bits_per_s("1.5gbit") == 1_500_000_000
    for wrong in ("200", "fast", "200 mbit", "1kbit", "-1mbit", "99gbit"):
        with pytest.raises(ValueError, match="8kbit and 32gbit"):
            wan.bits_per_s(wrong)


def test_what_hosts_want_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("outer_round", "--quick", "--alone", "--wan")
    assert "is not a number" in refused(capsys, *options, "fast")
    assert "at least 2" in refused(capsys, *options, "1gbit", "--hosts", "1")
    monkeypatch.setattr(wan.shutil, "which", lambda name: None)
    assert "apt-get install iperf3 iproute2" in refused(capsys, *options, "1gbit")
    monkeypatch.setattr(wan.shutil, "which", lambda name: name)
    monkeypatch.setattr(wan.os, "geteuid", lambda: 1000)
    assert "needs root" in refused(capsys, *options, "1gbit")


def refused(capsys: pytest.CaptureFixture[str], name: str, *options: str) -> str:
    """What is said of options that cannot be: one line, with exit status 2."""
    try:
        status: Any = BENCHMARKS[name].main(options)
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr()
    assert (status, said.out, len(said.err.splitlines())) == (2, "", 1), said
    return said.err


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("options", (["--blocks", "0"], ["--blocks", "x"], ["--nonsense"], ["extra"]))
def test_bad_options(name: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert f"benchmarks.{name} --help" in refused(capsys, name, *options)


def test_options_that_do_not_fit_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        for name in ("codec", "inner_loop", "outer_parts"):
            assert "--device cpu" in refused(capsys, name, "--device", "cuda")
    assert "does not divide" in refused(capsys, "coordinator", "--modules", "10", "--modules-per-path", "3")
    few = refused(capsys, "coordinator", "--islands", "2", "--modules", "10", "--modules-per-path", "1")
    assert "2 islands leave modules untrained" in few
    assert "does not divide" in refused(capsys, "inner_loop", "--batch", "3", "--accumulation", "2")
    assert "at least 2" in refused(capsys, "inner_loop", "--steps", "1")
    assert "int3 is unknown" in refused(capsys, "outer_parts", "--ways", "int4,int3")
    assert "add --alone" in refused(capsys, "outer_round", "--gpus-per-worker", "1")


def test_a_missing_peer_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert "pip install torchft" in refused(capsys, "outer_round", "--quick")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        BENCHMARKS[name].main(["--help"])
    assert ended.value.code == 0
    assert "--quick" in capsys.readouterr().out


# --- slow links ---


def test_what_a_run_over_a_slow_link_came_to(tmp_path: Path) -> None:
    """Two islands of two segments each: from the first step's beginning to the last outer step."""
    told: list[dict[str, object]] = [
        {"event": "segment", "time_s": end_s, "seconds": 2.0, "island": i, "step": step, "tokens": 50}
        for i in (0, 1)
        for step, end_s in ((5, 12.0 + i), (10, 16.0 + i))
    ]
    told += [{"event": "commit", "time_s": 18.0}, {"event": "evaluation", "time_s": 30.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in told))
    (tmp_path / "summary.json").write_text(json.dumps({"bytes_sent": 1000, "val_loss": 2.5}))
    one = slow_link.ran(tmp_path)
    assert (one.steps, one.wall_s, one.inner_s, one.tokens) == (10, 18.0 - 10.0, 4.0, 200)
    figures = one.figures(inner_s=one.inner_s, val_loss=one.val_loss)
    assert (figures["utilization"], figures["tokens_per_s"], figures["bytes_sent_a_step"]) == (0.5, 25.0, 100.0)


@pytest.mark.parametrize(
    ("options", "message"), [(["--rates", "fast"], "rate 'fast'"), (["--hosts", "1"], "--hosts=1 has no links")]
)
def test_slow_links_that_cannot_be_made(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert slow_link.main(options) == 2
    assert message in capsys.readouterr().err
