"""Secrets: refused in a configuration, and taken out of whatever a run writes or says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from diloco import RunConfig, config, redaction
from diloco.checkpoint import Checkpoint
from diloco.data import Data
from diloco.metrics import Metrics, open_metrics
from diloco.redaction import redacted, redacted_values
from diloco.runtime.local import Local
from diloco.workloads.causal_lm import CausalLM
from experiments.cli import main
from tests.toy import Line, launch

SECRET = "wJalr/XUtn+FEMI"
TOKEN = "hf_0123456789abcdef"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One with a secret; the one that was is read anew afterwards."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    redaction._environment.cache_clear()
    yield
    redaction._environment.cache_clear()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"s3://AKIAXYZ:{SECRET}@bucket/runs", "s3://***@bucket/runs"),
        ("cannot open ftp://me:pass@host:21/x, really", "cannot open ftp://***@host:21/x, really"),
        ("https://ghp_abcdef@example.org/x.git", "https://***@example.org/x.git"),
        ("GET https://x/y?X-Amz-Signature=abc&z=1", "GET https://x/y?X-Amz-Signature=***&z=1"),
        ("abfs://c@account/x?sig=a%2Bb", "abfs://c@account/x?sig=***"),
        (f"the header was Bearer {TOKEN}.", "the header was Bearer ***."),
    ],
)
def test_credentials_are_taken_out(text: str, shown: str) -> None:
    assert redacted(text) == shown and redacted_values({"a": [text, 1.5]}) == {"a": [shown, 1.5]}


@pytest.mark.parametrize(
    "text",
    [
        *("runs/2026-01-01_run", "s3://bucket/a@b", "sftp://me@host/x", "abfs://c@account.dfs/x", "user@host"),
        *("http://127.0.0.1:8265/api", "http://host:8265/a@b", "hf://datasets/a/b@main/c.parquet", "outer.lr=0.7"),
    ],
)
def test_all_else_stays(text: str) -> None:
    assert redacted(text) == text


def test_variables_that_are_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_CREDENTIALS", str(tmp_path))  # a file with some
    monkeypatch.setenv("SHORT_TOKEN", "word")
    monkeypatch.setenv("RAY_AUTH_MODE", "token-mode")
    redaction._environment.cache_clear()
    text = f"a word of {tmp_path}, token-mode"
    assert redacted(text) == text


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"checkpoint": Checkpoint(path=f"s3://AKIAXYZ:{SECRET}@bucket")}, "checkpoint.path"),
        ({"data": Data(files=["a.txt", f"https://me:{SECRET}@host/b.txt"])}, "data.files"),
        ({"workload": CausalLM(model=f"https://me:{SECRET}@host/model")}, "workload.model"),
        ({"init_from": f"ftp://me:{SECRET}@host/run"}, "init_from"),
    ],
)
def test_a_configuration_with_credentials_is_refused(settings: dict[str, object], key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}=\S+:/+\*\*\*@.*FSSPEC_") as caught:
        replace(RunConfig(runtime=Local()), **settings)  # type: ignore[arg-type]
    assert SECRET not in str(caught.value)


def test_the_command_says_so_without_telling(capsys: pytest.CaptureFixture[str], runs: Path) -> None:
    for given in (
        f"checkpoint.path=s3://K:{SECRET}@b",
        f"checkpoint.keep=s3://K:{SECRET}@b",
        f"+x.y=s3://K:{SECRET}@b",
    ):
        assert main(["train", "runtime=local", given]) == 2
        said = capsys.readouterr()
        assert SECRET not in said.out + said.err and 1 <= len(said.err.splitlines()) <= 2
    assert not list(runs.iterdir())


def test_a_run_with_a_path_without_credentials_is_resumed(runs: Path) -> None:
    given = {"name": "kept", "checkpoint": Checkpoint(path=str(runs.parent / "me@host"), every=1)}
    first = launch(runs / "1_kept", rounds=1, **given)
    again = launch(runs / "1_kept", rounds=2, resume=str(first.directory), **given)
    assert again.summary["rounds"] == 2
    assert config.load(first.directory / "config.yaml").checkpoint.path.endswith("me@host")


def test_nothing_that_a_failing_run_leaves_has_secrets(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = f"https://me:{SECRET}@host/x refuses the token {TOKEN}"

    def fail(self: Line, *arguments: object) -> int:
        raise OSError(message)

    monkeypatch.setattr(Line, "tokens", fail)
    with pytest.raises(OSError, match="refuses the token"):
        launch(runs / "1_run")
    left = {path.name: path.read_bytes() for path in (runs / "1_run").rglob("*") if path.is_file()}
    assert b"refuses the token ***" in left["summary.json"] and "config.yaml" in left
    assert not [name for name, content in left.items() if SECRET.encode() in content or TOKEN.encode() in content]


def test_metrics_display_and_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer, display = open_metrics(tmp_path, Metrics(live=False), name="n", rounds=1, config={})
    told = f"s3://K:{SECRET}@b could not be written: {TOKEN}"
    writer.write({"event": "warning", "round": 1, "message": told, "more": {"paths": [told]}})
    display.message(told)
    writer.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["message"] == record["more"]["paths"][0] == "s3://***@b could not be written: ***"
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        assert text.count("s3://***@b could not be written: ***") == 2
