"""How fast each codec packs and unpacks the tensors of a model, and how small it makes them.

One thread; GB/s of float32 values, as medians of turns in which the codecs alternate with each other and with a plain
copy of as many bytes: `memcpy_gbs`. Of each codec: `encode_gbs`, `decode_gbs`, `difference_gbs` (anchor minus local,
encoded at once as an island does it; it reads twice as much), `bits` a parameter with the header apart. `ratio` is the
slower way of the slower of int8 and int4, to the .5 GB/s that are wanted; `cpu_ratio` is the same by the thread's CPU
time, the steadier one where other processes are busy. With --device cuda, `same_bytes` names the codecs that give the
same bytes there as on the CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from diloco import buffers
from diloco.codec import BFloat16, Codec, Float32, Int4, Int8, TopK
from diloco.messages import Tensors
from experiments.benchmarks import common

CODECS: dict[str, Codec] = {
    "float32": Float32(),
    "bfloat16": BFloat16(),
    "int8": Int8(),
    "int4": Int4(),
    "topk": TopK(),
}
WAYS = ("encode", "decode", "difference")
WANTED_GBS, WANTED_OF = 0.5, ("int8", "int4")


@dataclass(kw_only=True)
class Times:
    """Seconds of each turn, by the clock and of the thread's CPU."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def measure(self, call: Callable[[], Any], device: str) -> Any:
        """What `call` gives; its time is added."""
        wall_s, cpu_s = time.perf_counter(), time.thread_time()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        self.wall_s.append(time.perf_counter() - wall_s)
        self.cpu_s.append(time.thread_time() - cpu_s)
        return result


def main(argv: Sequence[str]) -> int:
    """Exit status 0, or 2 for bad options."""
    options = common.parser("codec", __doc__.partition("\n")[0])
    options.add_argument("--parameters", type=common.positive, default=25_000_000, help="float32 values (25000000)")
    options.add_argument("--blocks", type=common.positive, default=7, help="measured turns of each codec (7)")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors are (cpu)")
    given = options.parse_args(argv)
    if given.quick:
        given.parameters, given.blocks = 100_000, 1
    return common.run(lambda: _measure(given))


def model(parameters: int, device: str) -> Tensors:
    """At least so many values in a decoder's shapes, small ones too: an embedding, and as many layers as it takes."""
    width = max(16, round((parameters / 100) ** 0.5) // 16 * 16)
    layer = {"attention": (4 * width, width), "feed_forward": (8 * width, width), "norm": (width,), "bias": (1,)}
    shapes: dict[str, tuple[int, ...]] = {"embedding": (16 * width + 1, width)}
    layers = -(-(parameters - (16 * width + 1) * width) // (12 * width**2 + width + 1))
    shapes |= {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=generator) * 1e-3).to(device) for name, shape in shapes.items()}


def _measure(given: Any) -> dict[str, Any]:
    if given.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees none here; use --device cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _figures(given)
    finally:
        torch.set_num_threads(threads)


def _figures(given: Any) -> dict[str, Any]:
    tensors = model(given.parameters, given.device)
    anchor = buffers.like(tensors)
    for name, value in tensors.items():
        anchor[name].copy_(value).mul_(1.01)
    size = sum(value.numel() for value in tensors.values())
    source, copy = buffers.flat(size).zero_(), Times()
    times = {name: {way: Times() for way in WAYS} for name in CODECS}
    bytes_ = {}
    for _ in range(given.blocks + 1):  # the first turn warms up
        copy.measure(lambda: buffers.flat(size).copy_(source), "cpu")
        for name, codec in CODECS.items():
            bytes_[name] = _turn(codec, tensors, anchor, times[name], given.device)
    gigabytes = 4e-9 * size
    found: dict[str, dict[str, float]] = {
        name: {f"{way}_gbs": common.rounded(gigabytes / common.median(times[name][way].wall_s[1:])) for way in WAYS}
        | {"bits": common.rounded(8 * bytes_[name] / size)}
        for name in CODECS
    }
    for name, figures in found.items():
        common.show(f"{name}: " + " ".join(f"{key}={value:.3g}" for key, value in figures.items()))
    wanted = [times[name][way] for name in WANTED_OF for way in ("encode", "decode")]
    return {
        "benchmark": "codec",
        "device": given.device,
        "parameters": size,
        "tensors": len(tensors),
        "memcpy_gbs": common.rounded(gigabytes / common.median(copy.wall_s[1:])),
        "codecs": found,
        **({"same_bytes": _same_bytes(tensors, anchor)} if given.device == "cuda" else {}),
        "ratio": _ratio(gigabytes, [way.wall_s[1:] for way in wanted]),
        "cpu_ratio": _ratio(gigabytes, [way.cpu_s[1:] for way in wanted]),
    }


def _turn(codec: Codec, tensors: Tensors, anchor: Tensors, times: dict[str, Times], device: str) -> int:
    """All ways once; gives the bytes of the body."""
    payload = times["encode"].measure(lambda: codec.encode(tensors), device)
    times["decode"].measure(lambda: codec.decode(payload), "cpu")
    times["difference"].measure(lambda: codec.encode_difference(anchor, tensors), device)
    return int(payload.body.nbytes)


def _same_bytes(tensors: Tensors, anchor: Tensors) -> list[str]:
    """The codecs that give the same bytes on the GPU, where `tensors` are, as on the CPU."""
    fetched = {name: value.cpu() for name, value in tensors.items()}
    return [
        name
        for name, codec in CODECS.items()
        if codec.encode(tensors).sha256() == codec.encode(fetched).sha256()
        and codec.encode_difference(anchor, tensors).sha256() == codec.encode_difference(anchor, fetched).sha256()
    ]


def _ratio(gigabytes: float, ways: Sequence[Sequence[float]]) -> float:
    return common.rounded(min(gigabytes / common.median(way) for way in ways) / WANTED_GBS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
