"""`diloco soup`: several trained models as one, measured as their own runs measure them, or the way between them."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diloco import config as configuration
from diloco import resume, soup
from diloco.config import RunConfig
from diloco.formats import format_loss
from diloco.merge import RDA, Mean, MeanBy, Merge, Slerp
from diloco.messages import Tensors
from diloco.replica import Replica, Single
from diloco.report.drawing import INK, SERIES, Key, Panel, png
from diloco.starting import read_values
from diloco.workload import Corpus
from experiments.entry import FINISHED
from experiments.trained import Trained, run_config, trained

MERGES: dict[str, Merge] = {"mean": Mean(by=MeanBy.examples), "slerp": Slerp(by=MeanBy.examples), "rda": RDA()}
Figures = dict[str, float]  # what is measured of a model: by metric, or by run/metric where runs measure differently


def cook(arguments: argparse.Namespace) -> int:
    """Carry out the command; returns the exit status. Raises ValueError for what cannot be done."""
    weights = _weights(arguments)
    folder: Path = arguments.to
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--to {folder} is not empty: give a new folder")
    kitchen = Kitchen(arguments.runs, MERGES[arguments.merge], arguments.start)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--to {folder} cannot be made ({error.strerror}): give another folder") from error
    if arguments.points:
        front(kitchen, weights, arguments.points, folder)
        return FINISHED
    alone = {label: kitchen.measure(one) for label, one in kitchen.ingredients.items()}
    if arguments.greedy:
        losses = [figures[kitchen.loss] for figures in alone.values()]
        weights, _ = soup.greedy(losses, lambda tried: kitchen.measure(kitchen.soup(tried))[kitchen.loss])
    found = kitchen.measure(kitchen.soup(weights, eta=arguments.eta))
    kitchen.export(folder)
    share = [weight / sum(weights) for weight in weights]
    told = {"merge": arguments.merge, "eta": arguments.eta, "weights": dict(zip(alone, share, strict=True))}
    _write(folder, told | {"runs": alone, "soup": found})
    _print_table({**alone, "soup": found})
    print(folder)
    return FINISHED


class Kitchen:
    """The values of runs that began alike, and one model that any mixture of them can be put into."""

    def __init__(self, runs: Sequence[Path], merge: Merge, start: Path | None = None) -> None:
        """`start`: a run or an export that ways begin at, if not where the runs did.

        Raises ValueError where a run cannot be read, or has another start than the first.
        """
        labels = [run.resolve().name for run in runs]
        if len(set(labels)) < len(labels):
            labels = [str(run) for run in runs]
        if len(set(labels)) < len(labels):
            raise ValueError(f"a run is named twice among {', '.join(labels)}: give --weights instead")
        self._merge = merge
        first = trained(runs[0])
        self._model: Trained = first
        self._replica: Replica = Single(first.model)
        self.ingredients: dict[str, Tensors] = {labels[0]: self._values(self._replica)}
        begun = _begun(first.config)
        self._measures: dict[str, tuple[RunConfig, Corpus]] = {labels[0]: (first.config, first.corpus)}
        for label, run in zip(labels[1:], runs[1:], strict=True):
            soup.check_same_start({labels[0]: begun, label: _begun(run_config(run))})
            other = trained(run)
            self.ingredients[label] = self._values(Single(other.model))
            if _measured_by(other.config) not in [_measured_by(known) for known, _ in self._measures.values()]:
                self._measures[label] = (other.config, other.corpus)
        self.start = {name: begun[name] for name in self._replica.shapes()}
        if start is not None:
            if not start.is_dir():
                raise ValueError(f"--start {start}: there is no such folder; give a run or an export")
            values = read_values(resume.starting_folder(str(start)))
            missing = [name for name in self.start if name not in values]
            if missing:
                raise ValueError(f"--start {start} has no {missing[0]}, and {len(missing)} such: is it another model?")
            self.start = {name: values[name] for name in self.start}

    @property
    def loss(self) -> str:
        """Name of the metric that is to be low: the first run's own."""
        return self._named(next(iter(self._measures)), "loss")

    def soup(self, weights: Sequence[float], *, eta: float = 1.0) -> Tensors:
        """The values of a mixture."""
        return soup.soup(self.start, list(self.ingredients.values()), weights, self._merge, eta=eta)

    def measure(self, values: Tensors) -> Figures:
        """On the held-out data of each run that measures differently; afterwards the model has these values."""
        self._replica.install(list(values), values, keep=0.0)
        return {
            self._named(label, name): value
            for label, (config, corpus) in self._measures.items()
            for name, value in config.workload.evaluate(self._model.model, corpus, "validation").items()
        }

    def export(self, folder: Path) -> None:
        """The model as it was measured last."""
        self._model.config.workload.export(self._model.model, self._model.corpus, folder)

    def _named(self, label: str, metric: str) -> str:
        return metric if len(self._measures) == 1 else f"{label}/{metric}"

    def _values(self, replica: Replica) -> Tensors:
        return {name: value.detach().clone() for name, value in replica.parameters().items()}


def front(kitchen: Kitchen, weights: Sequence[float], points: int, folder: Path) -> list[dict[str, float]]:
    """Measure `points` mixtures at even distances; front.csv, front.png and soup.json.

    Of two runs from the first to the second, else from the start to the soup with these weights.
    """
    rows = []
    two = len(kitchen.ingredients) == 2
    for number in range(points):
        share = number / (points - 1)
        values = kitchen.soup([1 - share, share]) if two else kitchen.soup(weights, eta=share)
        rows.append({"share": share, **kitchen.measure(values)})
        print("  ".join(f"{name} {value:.4f}" for name, value in rows[-1].items()), flush=True)
    alone = {label: kitchen.measure(one) for label, one in kitchen.ingredients.items()}
    with (folder / "front.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _write(folder, {"between": list(kitchen.ingredients) if two else ["start", "soup"], "front": rows, "runs": alone})
    _draw(rows, alone, folder / "front.png")
    print(folder / "front.png")
    return rows


def _begun(config: RunConfig) -> Tensors:
    """What the parameters of a run were before it, those that adapters leave as they are too."""
    model = config.workload.build_model(config.seed)
    replica = Single(model)
    if config.init_from:
        values = read_values(resume.starting_folder(config.init_from))
        replica.install(list(replica.shapes()), values, keep=0.0)
    return {name: value.detach() for name, value in model.named_parameters()}


def _measured_by(config: RunConfig) -> object:
    plain, without = configuration.plain(config), config.workload.learning()
    measured = {name: value for name, value in plain["workload"].items() if name not in without}
    return [plain["choices"]["workload"], measured, {**plain["data"], "batch": 0, "accumulation": 0}]


def _weights(arguments: argparse.Namespace) -> list[float]:
    given: list[float] | None = arguments.weights
    count = len(arguments.runs)
    if arguments.points < 0 or arguments.points == 1:
        raise ValueError(f"--points {arguments.points}: a way has at least 2")
    if arguments.greedy and (given or arguments.points):
        raise ValueError("--greedy finds the weights itself: leave out --weights and --points")
    if given and arguments.points and count == 2:
        raise ValueError("--points goes from one of two runs to the other: leave out --weights")
    if not 0 <= arguments.eta < math.inf:
        raise ValueError(f"--eta {arguments.eta}: it must be a number, 0 = the start, 1 = the soup, or more")
    if arguments.points and arguments.eta != 1.0:
        raise ValueError("--points measures all of the way: leave out --eta")
    if given is None:
        return [1.0] * count
    if len(given) != count:
        raise ValueError(f"--weights has {len(given)} numbers for {count} runs: give one each")
    if not all(0 <= weight < math.inf for weight in given) or not any(given):
        raise ValueError(f"--weights {given}: they must be 0 or positive, and not all 0")
    return given


def _write(folder: Path, told: Mapping[str, object]) -> None:
    (folder / "soup.json").write_text(json.dumps(told, indent=1) + "\n")


def _print_table(columns: Mapping[str, Figures]) -> None:
    """A line a metric, a column a model."""
    names = list(next(iter(columns.values())))
    width = max(map(len, names))
    print(" " * width, *(f"{label:>12}" for label in columns))
    for name in names:
        print(
            f"{name:{width}}", *(f"{format_loss(one[name]):>{max(12, len(label))}}" for label, one in columns.items())
        )


def _draw(rows: Sequence[Figures], alone: Mapping[str, Figures], path: Path) -> None:
    """Reward over divergence, or one reward over another where there are two, or the loss along the way."""
    rewards = [name for name in rows[0] if name.rpartition("/")[2] == "reward"]
    divergences = [name for name in rows[0] if name.rpartition("/")[2] == "kl"]
    x, y = ("share", next(name for name in rows[0] if name.endswith("loss")))
    if len(rewards) >= 2:
        x, y = rewards[:2]
    elif rewards and divergences:
        x, y = divergences[0], rewards[0]

    def draw(axes: Any) -> None:
        axes.plot([row[x] for row in rows], [row[y] for row in rows], marker="o", color=SERIES[0])
        if x != "share":
            axes.plot([one[x] for one in alone.values()], [one[y] for one in alone.values()], "s", color=INK)
            for label, one in alone.items():
                axes.annotate(label, (one[x], one[y]), textcoords="offset points", xytext=(6, -10), fontsize=8)
        axes.set_xlabel(x)
        axes.set_ylabel(y)

    png([Panel(title="", description=f"{y} over {x}", draw=draw)], [Key(label="", colour=SERIES[0])], path)
