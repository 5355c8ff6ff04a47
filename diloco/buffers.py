"""Memory for many float32 values at once, made so that touching it for the first time is cheap.

numpy asks the kernel for huge pages, torch's allocator does not: filling 50 MB of new memory takes 8 ms of CPU with
them and 25 ms without, which is more than most of what is computed in an outer step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from diloco.messages import Shape, Tensors


def flat(size: int) -> torch.Tensor:
    """float32[size] on the CPU, not initialised."""
    return torch.from_numpy(np.empty(size, dtype=np.float32))


def views(buffer: torch.Tensor, shapes: Mapping[str, Shape]) -> Tensors:
    """Consecutive parts of `buffer`, which they fill, by name."""
    parts = torch.split(buffer, [math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def like(tensors: Tensors) -> Tensors:
    """Not initialised float32 tensors with these names and shapes, in one new buffer."""
    return views(flat(sum(value.numel() for value in tensors.values())), {n: v.shape for n, v in tensors.items()})
