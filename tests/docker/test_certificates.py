"""docker/make-certificates.sh: an authority and a certificate for nodes, keys for the owner alone."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

MAKE = Path(__file__).resolve().parents[2] / "docker" / "make-certificates.sh"


def make(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MAKE, *arguments], capture_output=True, text=True)


def shown(certificate: Path, *what: str) -> str:
    command = ["openssl", "x509", "-in", certificate, "-noout", *what]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_certificates_and_keys(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "tls"
    answer = make(folder, "10.0.0.1", "node1.example.org", "fd00::1")
    assert answer.returncode == 0 and f"RAY_TLS_SERVER_KEY={folder}/node.key" in answer.stdout
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes.pop("ca.srl", 0o600) == 0o600
    assert modes == {"ca.crt": 0o644, "ca.key": 0o600, "node.crt": 0o644, "node.key": 0o600}
    subprocess.run(["openssl", "verify", "-CAfile", folder / "ca.crt", folder / "node.crt"], check=True)
    names = shown(folder / "node.crt", "-ext", "subjectAltName,extendedKeyUsage")
    for address in ("127.0.0.1", "10.0.0.1", "FD00:0:0:0:0:0:0:1"):
        assert f"IP Address:{address}" in names
    assert "DNS:node1.example.org" in names
    assert "TLS Web Server Authentication, TLS Web Client Authentication" in names


def test_more_names_keep_the_authority(tmp_path: Path) -> None:
    assert make(tmp_path, "10.0.0.1").returncode == 0
    authority, first = (tmp_path / "ca.crt").read_bytes(), (tmp_path / "node.crt").read_bytes()
    assert make(tmp_path, "10.0.0.1", "10.0.0.2").returncode == 0
    assert (tmp_path / "ca.crt").read_bytes() == authority and (tmp_path / "node.crt").read_bytes() != first
    assert "10.0.0.2" in shown(tmp_path / "node.crt", "-ext", "subjectAltName")
    subprocess.run(["openssl", "verify", "-CAfile", tmp_path / "ca.crt", tmp_path / "node.crt"], check=True)


@pytest.mark.parametrize("arguments", [[], ["tls", "a b"], ["tls", "x,DNS:evil"], ["tls", "-subj"]])
def test_mistakes(tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = make(*arguments)
    assert answer.returncode == 2 and not list(tmp_path.iterdir())
    assert "no name of a host" in answer.stderr if arguments else "make-certificates.sh DIR" in answer.stdout
