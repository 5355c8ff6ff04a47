"""The model of an earlier run: from its newest complete checkpoint, or from what it exported."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from diloco import checkpoint as ckpt
from diloco import config as configuration
from diloco import resume
from diloco.config import RunConfig
from diloco.messages import Tensors
from diloco.replica import Single
from diloco.starting import read_values
from diloco.workload import Corpus
from experiments.composition import look_here


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's global model, and the corpus that has its tokenizer."""

    config: RunConfig
    model: nn.Module
    corpus: Corpus


def run_config(run: Path) -> RunConfig:
    """The configuration of the run in `run`. Raises ValueError where there is none."""
    if (run / "sweep.csv").is_file():
        members = sorted(path.name for path in run.iterdir() if (path / "config.yaml").is_file())
        raise ValueError(f"{run} is a sweep: give one of its runs, such as {run / members[0] if members else 'none'}")
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not the directory of a run: it has no config.yaml")
    look_here()  # for parts of the user's own
    return configuration.load(run / "config.yaml")


def trained(run: Path) -> Trained:
    """Build a run's model and give it the newest values there are. Raises ValueError where there are none."""
    config = run_config(run)
    values, data_sha256 = _values(config, run.resolve())
    corpus = config.workload.corpus(config.data, seed=config.seed, shards=config.islands)
    if data_sha256 and corpus.sha256 != data_sha256:
        raise ValueError(
            f"{run}: the corpus is another one here than the run was trained on, and its tokenizer may be too;"
            " use the machine or the cache (data.cache) of the run"
        )
    model = config.workload.build_model(config.seed)
    replica = Single(model)
    shapes = replica.shapes()
    differing = [name for name, shape in shapes.items() if name not in values or tuple(values[name].shape) != shape]
    if differing:
        raise ValueError(
            f"{run}: {len(differing)} parameter(s) of the model are not what was saved, first {differing[0]}"
        )
    replica.install(list(shapes), values, keep=0.0)
    return Trained(config=config, model=model, corpus=corpus)


def export(run: Path, folder: Path) -> None:
    """Put the model of a run into `folder`, new or empty: a copy of its export, else made from a checkpoint.

    Raises ValueError where that cannot be.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--to {folder} is not empty: give a new folder")
    run_config(run)
    if (run / "export").is_dir() and any((run / "export").iterdir()):
        shutil.copytree(run / "export", folder, dirs_exist_ok=True)
        return
    found = trained(run)
    folder.mkdir(parents=True, exist_ok=True)
    found.config.workload.export(found.model, found.corpus, folder)


def _values(config: RunConfig, run: Path) -> tuple[Tensors, str]:
    """Values by parameter name, and the digest of the data that they were trained on, where it is known."""
    checkpoints = ckpt.CheckpointFolder(resume.checkpoint_root(config, run))
    if not checkpoints.names() and list(run.glob("export/*.safetensors")):
        return read_values(str(run / "export")), ""
    path, manifest = checkpoints.newest()
    return read_values(path), str(manifest["data_sha256"])
