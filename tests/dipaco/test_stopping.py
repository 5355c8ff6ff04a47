"""Early stopping: of each path the weights of its best round are exported and told of, also by a resumed run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from diloco import stopping
from diloco.checkpoint import Checkpoint
from diloco.config import register
from diloco.inner import Sgd
from diloco.outer import Sgd as OuterSgd
from diloco.progress import BestRound
from diloco.report import write_report
from diloco.report.paths import paths_of
from diloco.report.runs import read_runs
from dipaco.paths import Paths
from dipaco.schedule import PathRounds
from tests.dipaco.test_path_rounds import Pull
from tests.dipaco.test_workload import corpus_of, folder, lm  # noqa: F401
from tests.toy import Line, launch, logged, records

BEST = (1, 4, 2)  # of each path: after this round its weights are nearest to what it is to reach
MOVED = 0.2  # by a path's weights in a round, times the path's number from 1


@dataclass(kw_only=True)
class Overfitting(Pull):
    """Path p's parameters fall by .2 (p + 1) a round; `stop_loss` is how far they are from those of round BEST[p]."""

    def splits(self) -> list[str]:
        return [f"validation/{path}" for path in range(len(BEST))]

    def stops_early(self) -> bool:
        return True

    def evaluate(self, model: Any, corpus: Any, split: str) -> dict[str, float]:
        path = int(split[-1])
        rounds = (start() - next(model.parameters())).mean().item() / MOVED / (path + 1)
        return {"loss": 10 * path + rounds, "tokens": path + 1.0, "stop_loss": abs(rounds - BEST[path])}


register(group="workload", name="overfitting", node=Overfitting)


def start() -> torch.Tensor:
    return next(Line(blocks=2).build_model(0).parameters()).detach()


SETTINGS: dict[str, Any] = {
    "workload": Overfitting(blocks=2),
    "inner": Sgd(lr=0.1),
    "inner_steps": 2,
    "rounds": 5,
    "islands": 3,
    "eval_every": 1,
    "layout": Paths(levels=[3], private=["."]),
    "schedule": PathRounds(),
    "outer": OuterSgd(lr=1.0),
    "checkpoint": Checkpoint(every=0),  # one at the end
}


def exported(directory: Path, path: int) -> torch.Tensor:
    """How many rounds the parameters of an export are from the start."""
    values: dict[str, torch.Tensor] = torch.load(directory / f"export/path{path}/model.pt")
    return (start() - next(iter(values.values()))) / MOVED / (path + 1)


def test_each_path_counts_as_it_was_after_its_best_round(tmp_path: Path) -> None:
    run = launch(tmp_path, **SETTINGS)
    assert run.summary["best_rounds"] == dict(enumerate(BEST))
    for path, best in enumerate(BEST):
        torch.testing.assert_close(exported(run.directory, path), torch.full_like(start(), best), atol=1e-4, rtol=0)
    told = records(run.directory, "evaluation")
    for record in told:
        upto = [min(record["round"], best) for best in BEST]
        losses = [10 * path + rounds for path, rounds in enumerate(upto)]
        assert record["eval/loss"] == pytest.approx((losses[0] + 2 * losses[1] + 3 * losses[2]) / 6, abs=1e-4)
        assert record["eval/latest_loss"] == pytest.approx((0 + 2 * 10 + 3 * 20) / 6 + record["round"], abs=1e-4)
        assert [record[f"eval/best_round/{path}"] for path in range(3)] == upto
    assert run.summary["val_loss"] == told[-1]["eval/loss"]


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_resumed_run_knows_the_best_rounds_before_it(tmp_path: Path, rounds: int) -> None:
    """Its exports are those of rounds that were over when it was taken up."""
    first = launch(tmp_path / "first", **{**SETTINGS, "rounds": rounds})
    assert first.summary["best_rounds"] == {path: min(rounds, best) for path, best in enumerate(BEST)}
    again = launch(tmp_path / "again", **SETTINGS, resume=str(first.directory))
    assert again.summary["best_rounds"] == dict(enumerate(BEST))
    for path, best in enumerate(BEST):
        torch.testing.assert_close(exported(again.directory, path), torch.full_like(start(), best), atol=1e-4, rtol=0)


def test_what_no_checkpoint_can_need_is_removed(tmp_path: Path) -> None:
    """The best of path 0 is that of round 6, of path 1 of round 2; there are checkpoints of rounds 4 and 7."""
    for path, round_ in ((0, 1), (0, 3), (0, 5), (0, 6), (0, 8), (1, 1), (1, 2), (1, 5)):
        stopping.folder_of(tmp_path, path, round_).mkdir()
    (tmp_path / "path0-round9.tmp").mkdir()
    best = {0: BestRound(round=6, stop_loss=1.0, loss=1.0), 1: BestRound(round=2, stop_loss=1.0, loss=1.0)}
    newer = {"path0-round8", "path1-round5", "path0-round9.tmp"}
    stopping.prune(tmp_path, best, [4, 7])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"path0-round3", "path0-round6", "path1-round2", *newer}
    stopping.prune(tmp_path, best, [])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"path0-round6", "path1-round2", *newer}


def test_a_model_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken(made: Path) -> None:
        made.mkdir()
        (made / "half").touch()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        stopping.write(tmp_path / "path0-round1", broken)
    assert not (tmp_path / "path0-round1").exists()
    stopping.write(tmp_path / "path0-round1", Path.mkdir)
    assert (tmp_path / "path0-round1").is_dir() and len(list(tmp_path.iterdir())) == 1


def test_the_slice_is_of_each_paths_own_documents_and_nobody_trains_on_it(folder: Path) -> None:  # noqa: F811
    corpus = corpus_of(folder, lm(stop_fraction=0.2, router_fraction=0.1))
    table = corpus.table
    assert table is not None
    training = ~corpus.tokens.folder.held_out
    assert table.for_stop.sum() == round(0.2 * training.sum()) and table.for_router.sum() == round(0.1 * training.sum())
    assert not (table.for_stop & table.for_router).any() and not (table.for_stop & ~training).any()
    trained = set().union(*(documents.tolist() for documents in corpus.tokens.assignment))
    assert trained.isdisjoint(table.for_stop.nonzero()[0].tolist())
    for path, pieces in enumerate(corpus.stop_pieces):
        assert len(pieces) and (table.path[pieces.documents] == path).all() and table.for_stop[pieces.documents].all()
    model = lm().build_model(0)
    found = lm(stop_fraction=0.2, router_fraction=0.1).evaluate(model, corpus, "validation/1")
    assert found["stop_loss"] != found["loss"] and found["stop_loss"] > 0
    assert "stop_loss" not in lm().evaluate(model, corpus_of(folder, lm()), "validation/1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_fraction": 1.0}, "workload.stop_fraction=1.0: it must be at least 0 and below 1"),
        ({"stop_fraction": 0.6, "router_fraction": 0.4}, "leave no documents to train on"),
        ({"stop_fraction": 0.001}, "leaves path 0 no document to stop early by: raise it"),
    ],
)
def test_slices_that_cannot_be(folder: Path, settings: dict[str, float], message: str) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=message):
        corpus_of(folder, lm(**settings))


def test_what_a_run_says_of_paths_that_stopped_early(tmp_path: Path) -> None:
    run = launch(tmp_path / "run", **SETTINGS)
    early = ", ".join(f"path {path} after round {best}" for path, best in enumerate(BEST) if best != 5)
    lines = logged(run.directory)
    assert [line.partition("  ")[2].strip() for line in lines if line.startswith("stopped early")] == [early]
    assert "best round" in write_report([run.directory], tmp_path / "report").read_text(encoding="utf-8")
    (read,) = read_runs([run.directory])
    told = paths_of(read)
    assert told is not None and [path.best_round for path in told.paths] == list(BEST)
