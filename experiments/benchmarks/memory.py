"""Private memory of an island's process at its peak, beside a bare PyTorch loop of the same training in a Ray worker.

Private is what is shared with nobody (USS): Private_Clean + Private_Dirty of /proc/PID/smaps_rollup, so neither the
object store nor the libraries' code. An island may take an anchor and a copy of its largest slot more than the bare
loop, and a tenth on top: `allowed_bytes`. The reference is a task in a worker of Ray with the same imports.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from diloco.layout import Whole
from diloco.workloads.causal_lm import CausalLM
from diloco.workloads.presets import PRESETS
from experiments.benchmarks import bare, common
from experiments.benchmarks.pace import Side, Steps, alternate

SAMPLE_S = 0.02
BYTES = 4  # of a float32
TOLERANCE = 1.1
Sample = tuple[float, int]  # monotonic seconds, bytes


class Sampler:
    """Reads the memory of processes again and again, in a thread."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.samples: dict[int, list[Sample]] = {pid: [] for pid in pids}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        """Returns once the last sample is taken."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            for pid, samples in self.samples.items():
                with suppress(OSError):  # it has ended
                    samples.append((time.monotonic(), common.uss_bytes(pid)))


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for bad options."""
    options = common.parser("memory", __doc__.partition("\n")[0])
    options.add_argument("--model", choices=sorted(PRESETS), default="60m", help="preset (60m)")
    options.add_argument("--batch", type=common.positive, default=1, help="sequences a step (1)")
    options.add_argument("--sequence-length", type=common.positive, default=16, help="tokens (16)")
    options.add_argument("--shards", type=common.positive, default=4, help="shards of the store, each with a slot (4)")
    options.add_argument("--steps", type=common.positive, default=4, help="inner steps a turn (4)")
    options.add_argument("--blocks", type=common.positive, default=3, help="turns of each side (3)")
    given = options.parse_args(argv)
    if given.quick:
        given.model, given.shards, given.steps, given.blocks = "tiny", 1, 2, 1
    return common.run(lambda: _measure(given))


def _measure(given: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="memory") as folder:
        settings = bare.Settings(
            folder=folder,
            model=given.model,
            batch=given.batch,
            accumulation=1,
            sequence_length=given.sequence_length,
            block_steps=given.steps,
            blocks=given.blocks + 1,
            threads=1,
            in_ray=True,
        )
        sides = [bare.island(settings, shards=given.shards)]
        try:
            sides.append(bare.side(settings))
            found = _watched(sides, settings)
            for side in sides:
                side.join()
        finally:
            for side in sides:
                side.close()
    return _figures(given, found["ours"], found["bare_in_ray"])


def _watched(sides: Sequence[Side], settings: bare.Settings) -> dict[str, dict[str, int]]:
    """The most memory of each side by what it was doing."""
    sampler = Sampler([side.steps()[0].pid for side in sides])
    try:
        alternate(sides, blocks=settings.blocks, block_steps=settings.block_steps)
    finally:
        sampler.stop()
    found = {}
    for side in sides:
        steps = side.steps()[0]
        found[side.side] = _by_phase(sampler.samples[steps.pid], steps, settings)
    return found


def _by_phase(samples: Sequence[Sample], steps: Steps, settings: bare.Settings) -> dict[str, int]:
    """Peaks while it trained, in outer rounds, and while it waited with all installed; first block left out."""
    most = {"training": 0, "outer": 0, "waiting": 0}
    for block in range(1, settings.blocks):
        first = block * settings.block_steps
        begun_s, asked_s = steps.began[first].monotonic_s, steps.asked[first].monotonic_s
        last_s, next_s = steps.asked[first + settings.block_steps - 1], steps.asked[first + settings.block_steps]
        for at_s, size in samples:
            if asked_s <= at_s < begun_s:
                most["waiting"] = max(most["waiting"], size)
            elif begun_s <= at_s < last_s.monotonic_s:
                most["training"] = max(most["training"], size)
            elif last_s.monotonic_s <= at_s < next_s.monotonic_s:  # with the last step
                most["outer"] = max(most["outer"], size)
    return most


def _figures(given: Any, ours: dict[str, int], plain: dict[str, int]) -> dict[str, Any]:
    model = CausalLM(model=given.model).build_model(0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    slots = Whole().build(shapes, given.shards).slots
    largest = max(sum(sizes[name] for name in names) for names in slots.values())
    parameters = sum(sizes.values())
    allowed = round((BYTES * parameters + BYTES * largest) * TOLERANCE)
    extra = max(ours.values()) - max(plain.values())
    for phase in ours:
        common.show(f"{phase}: island {ours[phase] >> 20} MiB, bare {plain[phase] >> 20} MiB")
    return {
        "benchmark": "memory",
        "model": given.model,
        "parameters": parameters,
        "largest_slot": largest,
        "island_uss_bytes": max(ours.values()),
        "bare_uss_bytes": max(plain.values()),
        "extra_bytes": extra,
        "allowed_bytes": allowed,
        "ratio": common.rounded(extra / allowed),
        "island_by_phase": ours,
        "bare_by_phase": plain,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
