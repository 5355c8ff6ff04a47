"""Checkpoints: complete or absent, checked, and kept in number."""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from diloco.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointFolder,
    check_layout,
    describe_modules,
    probe,
    read_modules,
    read_source,
    sees,
    write_modules,
    write_source,
)
from diloco.layout import Whole, single_path
from diloco.messages import ModuleKey, Shape, SourceId, State
from diloco.starting import read_values
from tests.toy import Line, digests, launch, records, warned

SHAPES: dict[str, Shape] = {"a": (3,), "b": (2, 2), "c": ()}


def states() -> dict[ModuleKey, State]:
    tensors = {
        "values/a": torch.arange(3.0),
        "outer/momentum/a": torch.ones(3),
        "inbox/0": torch.arange(7, dtype=torch.uint8),
    }
    other = {"values/b": torch.eye(2).T, "values/c": torch.tensor(2.5), "values/empty": torch.zeros(0, 3)}
    meta = {"version": 4, "inbox": [{"source": 1}], "verdicts": [[0, 1, True, True, 0.1]], "text": 'with "quotes"'}
    return {ModuleKey("whole.0/0"): State(tensors=tensors, meta=meta), ModuleKey("whole.1/0"): State(tensors=other)}


def write(folder: CheckpointFolder, name: str, *, keep: int = 10, round_: int = 0) -> str:
    """A whole checkpoint of a store and a source."""
    folder.begin(name)
    files = write_modules(folder.temporary(name), states())
    files |= write_source(folder.temporary(name), SourceId(0), State(tensors={"local/a": torch.ones(3)}))
    return folder.complete(name, {"view": {"round": round_}}, files, keep)


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(str(tmp_path / "checkpoints"))


def files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def spoil_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def spoil_first_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit flipped at the end": spoil_last_byte,
    "a bit flipped at the start": spoil_first_byte,
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b"") and None,
    "missing": Path.unlink,
}


# --- round trips ---


def test_states_come_back_as_they_were(folder: CheckpointFolder) -> None:
    path = write(folder, "round-000001")
    assert Path(path).is_dir()
    found = read_modules(path, list(states()))
    for key, state in states().items():
        assert found[key].meta == state.meta
        assert set(found[key].tensors) == set(state.tensors)
        for name, value in state.tensors.items():
            assert found[key].tensors[name].dtype == value.dtype
            assert torch.equal(found[key].tensors[name], value)
            found[key].tensors[name].fill_(1)  # writable: training goes on in them


def test_a_source_without_state_is_none(folder: CheckpointFolder) -> None:
    path = write(folder, "round-000001")
    found = read_source(path, SourceId(0))
    assert found is not None
    assert found.tensors["local/a"].tolist() == [1.0] * 3
    assert read_source(path, SourceId(7)) is None


def test_the_values_of_all_modules_are_found_without_the_rest(folder: CheckpointFolder) -> None:
    values = read_values(write(folder, "round-000001"))
    assert set(values) == {"a", "b", "c", "empty"}
    assert values["a"].tolist() == [0.0, 1.0, 2.0]


def test_nothing_is_pickled(folder: CheckpointFolder) -> None:
    path = write(folder, "round-000001")
    names = [p.relative_to(path).as_posix() for p in files_of(Path(path))]
    assert names == [
        "manifest.json",
        "modules/whole.0.0.safetensors",
        "modules/whole.1.0.safetensors",
        "sources/0/state.safetensors",
    ]


def test_the_manifest_lists_every_file_with_its_checksum(folder: CheckpointFolder) -> None:
    import hashlib

    path = Path(write(folder, "round-000001"))
    listed = json.loads((path / MANIFEST).read_text())["files"]
    found = {p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files_of(path)}
    del found[MANIFEST]
    assert listed == found


# --- complete or absent ---


def test_without_a_manifest_it_is_absent(folder: CheckpointFolder, tmp_path: Path) -> None:
    folder.begin("round-000001")
    write_modules(folder.temporary("round-000001"), states())
    assert folder.names() == []
    with pytest.raises(ValueError, match="no complete checkpoint"):
        folder.newest()
    write(folder, "round-000001")  # leftovers of the earlier try are no hindrance
    assert folder.names() == ["round-000001"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["round-000001"]


def test_leftovers_of_an_earlier_try_do_not_get_in(folder: CheckpointFolder, tmp_path: Path) -> None:
    folder.begin("round-000001")
    stray = tmp_path / "checkpoints" / "round-000001.tmp" / "modules" / "stray.safetensors"
    stray.parent.mkdir()
    stray.write_text("x")
    path = write(folder, "round-000001")
    assert not (Path(path) / "modules" / "stray.safetensors").exists()


def test_an_incomplete_one_is_ignored_even_with_a_manifest(folder: CheckpointFolder, tmp_path: Path) -> None:
    """The driver died between the manifest and the renaming."""
    write(folder, "round-000001", round_=1)
    write(folder, "round-000002", round_=2)
    path = tmp_path / "checkpoints"
    (path / "round-000002").rename(path / "round-000002.tmp")
    name, manifest = folder.newest()
    assert (Path(name).name, manifest["view"]["round"]) == ("round-000001", 1)


def test_one_of_which_a_file_was_written_elsewhere_is_none(folder: CheckpointFolder, tmp_path: Path) -> None:
    """As where another node does not see the same folder."""
    folder.begin("round-000001")
    files = {**write_modules(folder.temporary("round-000001"), states()), "sources/1/state.safetensors": "0" * 64}
    said = folder.conclude("round-000001", {"view": {}}, files, keep=1, error="")
    assert "sources/1/state.safetensors" in said and "seen by all nodes" in said
    assert not folder.names() and not list((tmp_path / "checkpoints").iterdir())


def test_a_folder_is_probed_without_a_trace(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "checkpoints"
    with probe(str(folder)) as file:
        assert Path(file).parent == folder and sees(file)
    assert not sees(file) and not list(tmp_path.iterdir())
    folder.mkdir(parents=True)
    with probe(f"file://{folder}/") as file:
        assert sees(file)
    assert not list(folder.iterdir())


def test_an_abandoned_one_leaves_nothing(folder: CheckpointFolder, tmp_path: Path) -> None:
    folder.begin("round-000001")
    write_modules(folder.temporary("round-000001"), states())
    folder.abandon("round-000001")
    folder.abandon("round-000002")  # nothing there
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_killed_runs_left_is_cleaned_away(folder: CheckpointFolder, tmp_path: Path) -> None:
    write(folder, "round-000001")
    folder.begin("round-000002")
    write_modules(folder.temporary("round-000002"), states())
    folder.clean()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["round-000001"]
    CheckpointFolder(str(tmp_path / "nowhere")).clean()


def test_one_that_was_being_replaced_is_put_back(folder: CheckpointFolder, tmp_path: Path) -> None:
    """The driver died when the old one was out of the way and the new one not yet in its place."""
    write(folder, "round-000001", round_=1)
    write(folder, "round-000002", round_=2)
    path = tmp_path / "checkpoints"
    shutil.copytree(path / "round-000002", path / "round-000002.tmp")
    (path / "round-000002").rename(path / "round-000002.old.tmp")
    folder.clean()
    assert sorted(p.name for p in path.iterdir()) == ["round-000001", "round-000002"]
    assert folder.newest()[1]["view"]["round"] == 2


def test_one_of_the_same_name_is_replaced(folder: CheckpointFolder) -> None:
    write(folder, "round-000001", round_=1)
    write(folder, "round-000001", round_=7)
    assert folder.names() == ["round-000001"]
    assert folder.newest()[1]["view"]["round"] == 7


# --- soundness ---


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", range(4), ids=["manifest", "module 0", "module 1", "source"])
def test_a_damaged_one_is_passed_over_for_an_older_one(folder: CheckpointFolder, which: int, damage: str) -> None:
    write(folder, "round-000001", round_=1)
    newest = write(folder, "round-000002", round_=2)
    DAMAGE[damage](files_of(Path(newest))[which])
    path, manifest = folder.newest()
    assert (Path(path).name, manifest["view"]["round"]) == ("round-000001", 1)


def test_a_flipped_bit_in_a_number_of_the_manifest_is_noticed(folder: CheckpointFolder) -> None:
    """It is valid JSON and would resume somewhere else."""
    write(folder, "round-000001", round_=1)
    manifest = Path(write(folder, "round-000002", round_=2)) / MANIFEST
    text = manifest.read_text()
    assert '"round": 2' in text
    manifest.write_text(text.replace('"round": 2', '"round": 3'))
    assert Path(folder.newest()[0]).name == "round-000001"


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "missing"])
def test_when_none_is_sound_each_is_named_with_what_is_wrong(folder: CheckpointFolder, damage: str) -> None:
    for number in (1, 2):
        path = write(folder, f"round-00000{number}")
        DAMAGE[damage](files_of(Path(path))[number])
    with pytest.raises(ValueError, match="no complete checkpoint") as caught:
        folder.newest()
    for wrong in ("round-000001/modules/whole.0.0.safetensors", "round-000002/modules/whole.1.0.safetensors"):
        assert wrong in str(caught.value)


def test_no_folder_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere holds no complete checkpoint"):
        CheckpointFolder(str(tmp_path / "nowhere")).newest()


# --- how many stay ---


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(folder: CheckpointFolder, keep: int) -> None:
    for number in range(1, 6):
        write(folder, f"round-{number:06d}", keep=keep)
    assert folder.names() == [f"round-{number:06d}" for number in range(6 - keep, 6)]


def test_one_within_a_round_is_newer_than_that_of_the_round(folder: CheckpointFolder) -> None:
    for name in ("round-000002-steps-000010", "round-000002", "round-000003", "round-000002-steps-000004"):
        write(folder, name)
    assert folder.names() == [
        "round-000002",
        "round-000002-steps-000004",
        "round-000002-steps-000010",
        "round-000003",
    ]


def test_one_just_written_stays_beside_damaged_ones_of_later_rounds(folder: CheckpointFolder) -> None:
    """A run taken up before a damaged checkpoint writes older names; keeping that one alone would lose all."""
    damaged = write(folder, "round-000005", round_=5)
    spoil_last_byte(files_of(Path(damaged))[1])
    write(folder, "round-000003", round_=3, keep=1)
    assert folder.newest()[1]["view"]["round"] == 3
    write(folder, "round-000004", round_=4, keep=1)
    assert folder.newest()[1]["view"]["round"] == 4


def test_other_files_in_the_folder_are_left_alone(folder: CheckpointFolder, tmp_path: Path) -> None:
    write(folder, "round-000001")
    other = tmp_path / "checkpoints" / "notes.txt"
    other.write_text("mine")
    write(folder, "round-000002", keep=1)
    assert other.read_text() == "mine"
    assert folder.names() == ["round-000002"]


@pytest.mark.parametrize(("key", "value"), [("every", -1), ("keep", 0), ("keep", -2)])
def test_settings_out_of_range_are_refused(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"checkpoint\.{key}={value}"):
        Checkpoint(**{key: value})


# --- layout ---


def test_the_same_layout_fits() -> None:
    modules = Whole().build(SHAPES, 2)
    saved = json.loads(json.dumps(describe_modules(modules, SHAPES)))
    check_layout(saved, modules, SHAPES)


@pytest.mark.parametrize(
    ("shapes", "wrong"),
    [
        ({**SHAPES, "b": (2, 3)}, "b"),
        ({"a": (3,), "b": (2, 2)}, "c"),
        ({**SHAPES, "d": (1,)}, "d"),
        ({"a": (3,), "b": (2, 2), "x": ()}, "c"),
    ],
    ids=["shape", "missing", "added", "renamed"],
)
def test_another_model_is_refused_by_parameter(shapes: dict[str, Shape], wrong: str) -> None:
    everything = Whole(patterns=["."])
    saved = json.loads(json.dumps(describe_modules(everything.build(SHAPES, 1), SHAPES)))
    with pytest.raises(ValueError, match=rf"first {wrong}:"):
        check_layout(saved, everything.build(shapes, 1), shapes)


def test_another_cut_into_slots_is_refused_by_parameter() -> None:
    first = single_path({"s": ["a", "b"], "t": ["c"]}, SHAPES, 1)
    second = single_path({"s": ["a"], "t": ["b", "c"]}, SHAPES, 1)
    saved = json.loads(json.dumps(describe_modules(first, SHAPES)))
    with pytest.raises(ValueError, match=r"1 parameter\(s\), first b: .*'s'.*'t'"):
        check_layout(saved, second, SHAPES)


# --- a disk that fills up ---


def full_disk(monkeypatch: pytest.MonkeyPatch, *, when: Callable[[str], bool], at: str) -> list[str]:
    """Below `when`, opening files for writing fails, or the first write does. Returns the paths refused."""
    original = LocalFileSystem.open
    refused: list[str] = []

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(self: LocalFileSystem, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "w" in mode and when(str(path)):
            refused.append(str(path))
            if at == "open":
                raise OSError(errno.ENOSPC, "No space left on device", path)
            return Full() if "b" in mode else io.TextIOWrapper(Full(), write_through=True)
        return original(self, path, mode=mode, **kwargs)

    monkeypatch.setattr(LocalFileSystem, "open", opened)
    return refused


@pytest.mark.parametrize("at", ["open", "write"])
@pytest.mark.parametrize("file", ["modules/", "sources/1", MANIFEST])
def test_a_disk_that_fills_up_costs_that_checkpoint_only(
    runs: Path, monkeypatch: pytest.MonkeyPatch, file: str, at: str
) -> None:
    settings = {"workload": Line(), "checkpoint": Checkpoint(every=1, keep=5)}
    expected = launch(runs / "expected", **settings)
    refused = full_disk(monkeypatch, when=lambda path: "round-000002" in path and file in path, at=at)
    result = launch(runs / "full", **settings)
    assert refused
    assert result.summary["status"] == "finished"
    assert digests(result) == digests(expected)
    (warning,) = warned(runs / "full")
    assert "No space left on device" in warning
    assert "round-000002" in warning
    checkpoints = runs / "full" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["round-000001", "round-000003"]  # nothing half
    assert [Path(r["path"]).name for r in records(runs / "full", "checkpoint")] == ["round-000001", "round-000003"]
    CheckpointFolder(str(checkpoints)).newest()


def test_a_disk_that_stays_full_leaves_the_earlier_checkpoint(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"workload": Line(), "checkpoint": Checkpoint(every=1, keep=1)}
    full_disk(monkeypatch, when=lambda path: "round-000001" not in path, at="open")
    result = launch(runs / "full", **settings)
    assert result.summary["status"] == "finished"
    assert len(warned(runs / "full")) == 2
    path, manifest = CheckpointFolder(str(runs / "full" / "checkpoints")).newest()
    assert (Path(path).name, manifest["view"]["round"]) == ("round-000001", 1)
    assert result.summary["checkpoint"] == path
    monkeypatch.undo()
    monkeypatch.chdir(runs.parent)
    again = launch(runs / "full", resume=str(runs / "full"), **settings)
    assert digests(again) == digests(result)
