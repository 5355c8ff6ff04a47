"""What doctor says of links and clusters: buffers, round trips, versions, token and TLS."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from experiments import doctor, links, nodes
from experiments.cli import main
from experiments.doctor import MISSING, OK, WARNING, Findings
from experiments.nodes import NoAnswer, Node

SMALL = {"net.core.rmem_max": [212992], "net.core.wmem_max": [1 << 26], "net.ipv4.tcp_rmem": [4096, 131072, 6291456]}


def node(address: str, **more: object) -> Node:
    return Node(address=address, cpus=4, gpus=0, memory=8 << 30, **more)  # type: ignore[arg-type]


def states(findings: Findings) -> list[tuple[str, str]]:
    return [(row.what, row.state) for row in findings.rows]


# --- links ---


@pytest.mark.parametrize(("text", "seconds"), [("80ms", 0.08), ("0.08s", 0.08), (" 1.5 MS ", 0.0015), ("2s", 2.0)])
def test_times(text: str, seconds: float) -> None:
    assert links.seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["80", "ms", "-1ms", "1m", "", "nan s", "1" * 400 + "s"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 80ms"):
        links.seconds(text)


def test_a_buffer_holds_twice_what_is_under_way() -> None:
    assert links.wanted_bytes(1.0, 0.08) == 2 * 10**9 // 8 * 80 // 1000
    assert set(links.too_small(SMALL, 20_000_000)) == {"net.core.rmem_max", "net.ipv4.tcp_rmem"}
    assert not links.too_small(SMALL, 200_000)


def test_the_command_keeps_the_other_numbers() -> None:
    command = links.sysctl(links.too_small(SMALL, 20_000_000), 20_000_000)
    assert command == "sysctl -w net.core.rmem_max=33554432 'net.ipv4.tcp_rmem=4096 131072 33554432'"
    assert links.sysctl({"a.b": [1]}, 1 << 20) == f"sysctl -w a.b={1 << 20}"


def test_reading_what_the_system_has(tmp_path: Path) -> None:
    (tmp_path / "net" / "core").mkdir(parents=True)
    (tmp_path / "net" / "core" / "rmem_max").write_text("4194304\n")
    (tmp_path / "net" / "core" / "wmem_max").write_text("much\n")
    assert links.read_buffers(tmp_path) == {"net.core.rmem_max": [4194304]}
    assert links.read_buffers(tmp_path / "nowhere") == {}


def test_a_link_against_the_buffers(capsys: pytest.CaptureFixture[str]) -> None:
    findings = Findings()
    doctor.check_buffers(findings, SMALL, gbits=1.0, rtt_s=0.08)
    assert states(findings) == [("TCP buffers", WARNING)]
    assert "net.ipv4.tcp_rmem = 6 MiB: 1 Gbit/s over a round trip of 80 ms wants 19.1 MiB" in findings.rows[0].found
    assert "sysctl -w" in capsys.readouterr().out
    doctor.check_buffers(findings, SMALL, gbits=0.1, rtt_s=0.001, at="10.0.0.1")
    assert findings.rows[1].state == OK and "10.0.0.1: enough for 100 Mbit/s" in findings.rows[1].found
    doctor.check_buffers(findings, {}, gbits=0.1, rtt_s=0.001)  # another system
    assert len(findings.rows) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--link", "fast", "--rtt", "80ms"], "is no bandwidth"),
        (["--link", "1gbit", "--rtt", "80"], "is no time with its unit"),
        (["--link", "1gbit", "--quick"], "--link needs the round trip: --rtt 80ms"),
        (["--link", "1gbit"], "--link needs the round trip"),
        (["--round-trip", "1s"], "unrecognized arguments"),
    ],
)
def test_mistakes(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        status = main(["doctor", *arguments])
    except SystemExit as end:
        status = end.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert status == 2 and words in error and len(error.splitlines()) == 1


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(links, "read_buffers", lambda: SMALL)
    assert main(["doctor", "--quick", "--link", "200mbit", "--rtt", "300ms"]) == 0
    assert "200 Mbit/s over a round trip of 300 ms wants 14.3 MiB" in capsys.readouterr().out


# --- clusters ---


def test_nodes_with_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "own_version", lambda: "1 (sources a)")
    findings = Findings()
    doctor.check_cluster(findings, [node("n1", project="1 (sources a)")], gbits=None, rtt_s=None)
    assert states(findings) == [("project", OK)]
    found = [node("n1", project="1 (sources a)"), node("n2", project="1 (sources b)"), node("n3")]
    doctor.check_cluster(findings, [*found, node("n4", silent=True)], gbits=None, rtt_s=None)
    assert findings.rows[1].state == MISSING
    assert findings.rows[1].found == "here is 1 (sources a), but n2 has 1 (sources b); n3 has none"


def test_round_trips_and_buffers_of_all_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "own_version", lambda: "1")
    far = {"rtt_s": {"n2": 0.081, "n3": 0.0002}, "project": "1"}
    found = [node("n1", buffers=SMALL, **far), node("n2", buffers={"net.core.rmem_max": [1 << 30]}, project="1")]
    findings = Findings()
    doctor.check_cluster(findings, found, gbits=None, rtt_s=None)
    assert states(findings) == [("project", OK), ("round trip", OK), ("TCP buffers", WARNING), ("TCP buffers", OK)]
    assert findings.rows[1].found == "0.2 to 81 ms between nodes; n1 to n2 is the most"
    assert "n1: " in findings.rows[2].found and "1 Gbit/s over a round trip of 81 ms" in findings.rows[2].found
    findings = Findings()
    doctor.check_cluster(findings, found, gbits=0.01, rtt_s=0.001)  # what is given counts
    assert [row.state for row in findings.rows] == [OK] * 4
    doctor.check_cluster(findings, [], gbits=None, rtt_s=None)  # no cluster was found
    assert len(findings.rows) == 4


def test_a_node_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "listens", lambda address: True)
    monkeypatch.setattr(nodes, "ask", lambda address: [node("n1"), node("n2", silent=True)])
    findings = Findings()
    assert len(doctor.check_ray(findings, "n1:6379")) == 2
    assert [row.state for row in findings.rows] == [OK, OK, WARNING]
    assert findings.rows[2].found == "n2: 4 CPU, 0 GPU, 8.0 GiB, does not answer"


def test_a_ray_that_does_not_run_an_actor(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: str) -> list[Node]:
        raise NoAnswer("does not run an actor: AuthenticationError")

    monkeypatch.setattr(nodes, "ask", refuse)
    findings = Findings()
    assert doctor.check_ray(findings, "") == []
    assert findings.rows[0].found == "Ray on this machine does not run an actor: AuthenticationError"


def test_the_token(tmp_path: Path) -> None:
    path = tmp_path / "token"
    asked = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    off = nodes.token_state({"RAY_AUTH_TOKEN": "x"})
    assert not off.good and "whoever reaches the cluster's ports runs code on it" in off.found
    lacking = nodes.token_state(asked)
    assert not lacking.good and f"chmod 600 {path}" in lacking.mend
    path.write_text("x" * 64)
    path.chmod(0o644)
    readable = nodes.token_state(asked)
    assert not readable.good and "(mode 0644)" in readable.found and readable.mend == f"chmod 600 {path}"
    path.chmod(0o600)
    assert nodes.token_state(asked) == nodes.Secured(True, f"asked for, in {path}")
    assert nodes.token_state({**asked, "RAY_AUTH_TOKEN": "secret-of-mine"}).found == "asked for, in RAY_AUTH_TOKEN"


def test_tls(tmp_path: Path) -> None:
    assert nodes.tls_state({}).good and "off" in nodes.tls_state({}).found
    files = {name: str(tmp_path / name) for name in nodes.TLS_FILES}
    environment = {"RAY_USE_TLS": "1", **files}
    lacking = nodes.tls_state(environment)
    assert not lacking.good and "RAY_TLS_CA_CERT=" in lacking.found and "make-certificates.sh" in lacking.mend
    for path in files.values():
        Path(path).write_text("x")
        Path(path).chmod(0o644)
    assert nodes.tls_state(environment).mend == f"chmod 600 {files['RAY_TLS_SERVER_KEY']}"
    Path(files["RAY_TLS_SERVER_KEY"]).chmod(0o600)
    assert nodes.tls_state(environment) == nodes.Secured(True, "on")
    assert not nodes.tls_state({"RAY_USE_TLS": "true"}).good
