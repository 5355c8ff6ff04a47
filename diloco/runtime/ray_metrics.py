"""A run's figures as metrics of Ray, which every node offers to Prometheus: for Ray's dashboard and for Grafana.

`docker/grafana.json` is a dashboard of them. Each has the tag `run`; those of islands also `island`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ray.util.metrics import Counter, Gauge

Record = Mapping[str, object]  # of metrics.jsonl: see diloco/metrics.py

# Name of the metric -> event and key of the record whose number it is.
OF_THE_RUN = {
    "diloco_round": ("commit", "total/rounds"),
    "diloco_version": ("commit", "outer/version"),
    "diloco_tokens": ("commit", "total/tokens"),
    "diloco_bytes_up": ("commit", "total/bytes_up"),
    "diloco_bytes_down": ("commit", "total/bytes_down"),
    "diloco_seconds_waiting": ("commit", "total/seconds_waiting"),
    "diloco_update_norm": ("commit", "outer/update_norm"),
    "diloco_staleness": ("commit", "outer/staleness"),
    "diloco_islands_alive": ("commit", "outer/alive"),
    "diloco_islands_participating": ("commit", "outer/participating"),
    "diloco_contributing_weight": ("commit", "outer/weight"),
    "diloco_validation_loss": ("evaluation", "eval/loss"),
    "diloco_checkpoint_round": ("checkpoint", "round"),
    "diloco_checkpoint_seconds": ("checkpoint", "seconds"),
}
OF_ISLANDS = {
    "diloco_island_round": ("segment", "round"),
    "diloco_island_loss": ("segment", "inner/loss"),
    "diloco_island_tokens_per_s": ("segment", "inner/tokens_per_s"),
    "diloco_island_gradient_norm": ("segment", "inner/grad_norm"),
    "diloco_island_task_seconds": ("segment", "seconds"),
    "diloco_island_waiting_seconds": ("segment", "comm/seconds_waiting"),
}
COUNTED = {  # events that are counted, each by its own name
    "diloco_islands_lost": "lost",
    "diloco_islands_joined": "joined",
    "diloco_rounds_late": "late",
    "diloco_contributions_stale": "stale",
    "diloco_warnings": "warning",
}


class RayMetrics:
    """A sink of metrics.jsonl's records."""

    def __init__(self, run: str) -> None:
        """`run`: the tag by which it is told from others."""
        self._tags = {"run": run}
        self._set: dict[str, list[Callable[[Record], None]]] = {}
        for name, (event, key) in OF_THE_RUN.items():
            self._add(event, self._setter(Gauge(name, f"{key} of {event} records", ("run",)), key))
        for name, (event, key) in OF_ISLANDS.items():
            self._add(event, self._setter(Gauge(name, f"{key} of {event} records", ("run", "island")), key, "island"))
        for name, event in COUNTED.items():
            self._add(event, self._counter(Counter(name, f"{event} records", ("run",))))

    def write(self, record: Record) -> None:
        """Take over the numbers of one record."""
        for take in self._set.get(str(record["event"]), []):
            take(record)

    def close(self) -> None:
        """Nothing is held."""

    def _add(self, event: str, take: Callable[[Record], None]) -> None:
        self._set.setdefault(event, []).append(take)

    def _setter(self, gauge: Gauge, key: str, *tags: str) -> Callable[[Record], None]:
        def take(record: Record) -> None:
            value = record.get(key)
            if isinstance(value, int | float):
                gauge.set(value, {**self._tags, **{tag: str(record[tag]) for tag in tags}})

        return take

    def _counter(self, counter: Counter) -> Callable[[Record], None]:
        return lambda record: counter.inc(1, self._tags)
