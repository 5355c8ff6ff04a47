"""A run's figures where Prometheus would fetch them: from the agent of Ray's node."""

from __future__ import annotations

import re
import time
import urllib.request
from typing import Any

import ray

from tests.conftest import Start

WITHIN_S = 60.0  # Ray reports every ten seconds


def scraped() -> str:
    """What the node offers now."""
    list_nodes: Any = ray.nodes
    (node,) = list_nodes()
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as answer:
        return str(answer.read().decode())


def value(text: str, name: str, run: str, island: int | None = None) -> float | None:
    """Of a metric with these tags."""
    for line in text.splitlines():
        tagged = f'run="{run}"' in line and (island is None or f'island="{island}"' in line)
        if tagged and re.match(rf"ray_{name}\{{", line):
            return float(line.rpartition(" ")[2])
    return None


def test_the_figures_of_a_run_are_metrics_of_ray(start: Start) -> None:
    result = start("told", rounds=3)
    end_s = time.monotonic() + WITHIN_S
    while time.monotonic() < end_s and not (
        value(text := scraped(), "diloco_round", "told") == 3.0
        and value(text, "diloco_validation_loss", "told") == result.summary["val_loss"]
    ):
        time.sleep(1.0)
    assert value(text, "diloco_round", "told") == 3.0
    assert value(text, "diloco_tokens", "told") == result.summary["tokens"]
    assert value(text, "diloco_validation_loss", "told") == result.summary["val_loss"]
    assert value(text, "diloco_islands_alive", "told") == 2.0
    losses = [value(text, "diloco_island_loss", "told", island) for island in (0, 1)]
    assert None not in losses and losses[0] != losses[1]
