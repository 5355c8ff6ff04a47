"""What do fewer bits cost? Each codec's bytes and validation loss on equal tokens, up, and both ways.

    python -m experiments.benchmarks.compression [--seeds 0,1,2] [--quick] [--to DIR]

Four islands, 8 rounds; for one seed all start from the same weights and see the same shards in the same order. Then
eight islands in 2 rounds of 500 steps, to count bytes against data parallel's. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from diloco.codec import BFloat16, Int4, Int8, TopK
from experiments.benchmarks.lab import FULL, QUICK, Lab, Method, arguments, conclude

AVERAGES, FAR_INT4 = "float32, averages", "int4 both ways, H=500"

NEAR = replace(FULL, steps=160, batch=4, eval_sequences=512)  # small, so that all of it takes minutes
FAR = replace(NEAR, steps=1000, batch=1, sequence_length=64)
QUICK_NEAR, QUICK_FAR = replace(QUICK, steps=16), replace(QUICK, steps=10, shorter=100)

MOMENTUM = Method(islands=4, inner_steps=20, outer_lr=1.0, momentum=0.5)
PLAIN = replace(MOMENTUM, momentum=0.0)  # SparseLoCo's outer step: plain averages (outer=sgd outer.lr=1)
LONG = replace(MOMENTUM, islands=8, inner_steps=500)
KEPT = Int4(error_feedback=True)
METHODS = {
    "float32": MOMENTUM,
    "bfloat16 up": replace(MOMENTUM, codec=BFloat16()),
    "int8 up": replace(MOMENTUM, codec=Int8()),
    "int4 up": replace(MOMENTUM, codec=Int4()),
    "int4 up, feedback": replace(MOMENTUM, codec=KEPT),
    "topk up": replace(MOMENTUM, codec=TopK()),
    "int8 both ways": replace(MOMENTUM, codec=Int8(), codec_down=Int8()),
    "int4 both ways": replace(MOMENTUM, codec=Int4(), codec_down=Int4()),
    "int4 both ways, feedback": replace(MOMENTUM, codec=KEPT, codec_down=KEPT),
    AVERAGES: PLAIN,
    "topk up, averages": replace(PLAIN, codec=TopK()),
}
FAR_METHODS = {"float32, H=500": LONG, FAR_INT4: replace(LONG, codec=Int4(), codec_down=Int4())}
AGAINST = {AVERAGES: AVERAGES, "topk up, averages": AVERAGES}  # all others: the first of their table


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out of a method: losses by seed, and the bytes of one run of it, of all islands together."""

    losses: list[float]
    against: str
    base: list[float]  # the losses of `against`, the method with the same outer step and float32
    up: int
    down: int
    first: int  # the part of `down` that is each island's first download: full values in float32, whatever the codec
    data_parallel: int  # what data parallel would have sent for the same steps

    @property
    def differences(self) -> list[float]:
        """Nats a byte above `against`, by seed."""
        return [loss - other for loss, other in zip(self.losses, self.base, strict=True)]

    @property
    def relative(self) -> list[float]:
        """The differences as shares of the losses of `against`."""
        return [difference / other for difference, other in zip(self.differences, self.base, strict=True)]

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than data parallel."""
        return self.data_parallel / (self.up + self.down)

    @property
    def ratio_without_first(self) -> float:
        """The same without the first download."""
        return self.data_parallel / (self.up + self.down - self.first)

    def figures(self) -> dict[str, object]:
        """For the last line."""
        return {
            "loss": [round(loss, 5) for loss in self.losses],
            "mean": round(fmean(self.losses), 5),
            "against": self.against,
            "difference": [round(difference, 5) for difference in self.differences],
            "mean_difference": round(fmean(self.differences), 5),
            "relative": [round(share, 6) for share in self.relative],
            "bytes_up": self.up,
            "bytes_down": self.down,
            "bytes_first": self.first,
            "bytes_data_parallel": self.data_parallel,
            "bytes_ratio": round(self.ratio, 2),
            "bytes_ratio_without_first": round(self.ratio_without_first, 2),
        }


def trained(lab: Lab, methods: Mapping[str, Method], seeds: Sequence[int]) -> dict[str, Outcome]:
    """All methods, after the first of which, that sends float32 down, the others' first downloads are counted."""
    found: dict[str, Outcome] = {}
    base = next(iter(methods))
    for name, method in methods.items():
        losses = [lab.loss(name, method, seed) for seed in seeds]
        row = lab.rows[-1]
        against = AGAINST.get(name, base)
        found[name] = Outcome(
            losses=losses,
            against=against,
            base=found[against].losses if against in found else losses,
            up=row["bytes_up"],
            down=row["bytes_down"],
            first=found[base].first if found else row["bytes_down"] // row["rounds"],
            data_parallel=row["bytes_data_parallel"],
        )
    return found


def wanted(found: Mapping[str, Outcome]) -> dict[str, bool]:
    """What was hoped for, and whether it came out in every seed. Within: neither above nor below by more."""
    ratio, ratio_without_first = found[FAR_INT4].ratio, found[FAR_INT4].ratio_without_first
    return {
        "int8 up within .003 nats of float32": max(map(abs, found["int8 up"].differences)) <= 0.003,
        "int4 up within .003 nats of float32": max(map(abs, found["int4 up"].differences)) <= 0.003,
        "int4 both ways within .5 % of float32": max(map(abs, found["int4 both ways"].relative)) <= 0.005,
        "H=500, int4 both ways: 500 times fewer bytes than data parallel": ratio >= 500,
        "... 4,000 times": ratio >= 4000,
        "... 4,000 times without the first download": ratio_without_first >= 4000,
    }


def table(found: Mapping[str, Outcome]) -> str:
    """Markdown: bytes, losses, and differences from float32 with the same outer step, by seed."""
    head = "| method | MB up | MB down | x fewer than data parallel | ... without first download | loss | difference |"
    lines = [f"{head} ... by seed |", "|---|---|---|---|---|---|---|---|"]
    for name, own in found.items():
        sent = f"{own.up / 1e6:.2f} | {own.down / 1e6:.2f} | {own.ratio:.1f} | {own.ratio_without_first:.1f}"
        by_seed = " ".join(f"{difference:+.4f}" for difference in own.differences)
        shown = "|" if name == own.against else f"{fmean(own.differences):+.4f} | {by_seed}"
        lines.append(f"| {name} | {sent} | {fmean(own.losses):.4f} | {shown} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return the exit status."""
    asked, seeds = arguments("Codecs: bytes sent and loss on equal tokens.", argv)
    near_scale, far_scale = (QUICK_NEAR, QUICK_FAR) if asked.scale == QUICK else (NEAR, FAR)
    lab, far = Lab(asked.folder, near_scale), Lab(asked.folder, far_scale)
    found = trained(lab, METHODS, seeds) | trained(far, FAR_METHODS, seeds)
    lab.rows += far.rows
    judged = wanted(found)
    figures = {name: outcome.figures() for name, outcome in found.items()}
    said = [f"- {'holds' if held else 'FAILS'}: {name}" for name, held in judged.items()]
    conclude(
        lab,
        benchmark="compression",
        seeds=seeds,
        losses={name: outcome.losses for name, outcome in found.items()},
        text="\n".join([table(found), "", *said]),
        orders={},
        more={"far_scale": vars(far_scale), "methods": figures, "wanted": judged},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
