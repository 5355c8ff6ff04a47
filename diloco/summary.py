"""summary.json: what came out of a run, from what the coordinator counted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from diloco.beside import dense_val_loss
from diloco.counters import Counters
from diloco.messages import ModuleKey, Reason, SlotName
from diloco.redaction import redacted_values
from diloco.runtime.base import Final


def bytes_data_parallel(parameters: int, counters: Counters, islands: int) -> int:
    """What synchronous data parallel would have sent in all for the same inner steps, at 4 bytes a parameter.

    islands x 2N(1 - 1/R) x steps, R = islands: a ring all-reduce of the gradients on every step.
    """
    return round(4 * 2 * parameters * (1 - 1 / islands) * counters.inner_steps)


def outer_state_sha256(digests: dict[str, str]) -> str:
    """One digest of all outer state tensors, whatever shards hold them: over `name digest` lines in order of name.

    A line that several modules have, such as that of a counter, counts once.
    """
    by_parameter = sorted({(name.partition(":")[2], digest) for name, digest in digests.items()})
    return hashlib.sha256("\n".join(f"{name} {digest}" for name, digest in by_parameter).encode()).hexdigest()


def outcome(counters: Counters, *, islands: int, parameters: int, wall_s: float) -> dict[str, object]:
    """The figures of a run, over all its parts where it was resumed."""
    busy_s = counters.inner_s / islands
    return {
        "outer_steps": counters.outer_steps,
        "tokens": counters.tokens,
        "wall_s": round(wall_s, 3),
        "train_s": round(counters.train_s, 3),
        "tokens_per_s": round(counters.tokens / counters.train_s, 1) if counters.train_s > 0 else None,
        "initial_val_loss": counters.initial_val_loss,
        "val_loss": counters.val_loss,
        "best_val_loss": counters.best_val_loss,
        "bytes_up": counters.bytes_up,
        "bytes_down": counters.bytes_down,
        "bytes_inside": counters.bytes_inside,
        "bytes_sent": counters.bytes_sent,
        "bytes_data_parallel": bytes_data_parallel(parameters, counters, islands),
        "contributions": {name: vars(counters)[name] for name in ("accepted", "rejected", "late", "stale")},
        "rejected_by_reason": {reason.value: counters.rejected_by_reason.get(reason.value, 0) for reason in Reason},
        "islands_lost": counters.islands_lost,
        "islands_joined": counters.islands_joined,
        "recoveries": counters.recoveries,
        "rounds_again": counters.rounds_again,
        "waiting_s": round(counters.waiting_s, 3),
        "compute_utilization": round(busy_s / counters.clock_s, 4) if counters.clock_s > 0 else None,
    }


def measured(counters: Counters, *, has_perplexity: bool) -> dict[str, object]:
    """Perplexity, where the loss has one, and before and after training what else a workload measures."""
    loss = counters.val_loss if has_perplexity else None
    first, newest = counters.initial_measures, counters.measures
    found: dict[str, object] = {"perplexity": None if loss is None else math.exp(min(loss, 700.0))}
    if "reward" in newest:
        found |= {"reward_before": first.get("reward"), "reward_after": newest["reward"], "kl": newest["kl"]}
    return found


def routed(counters: Counters, *, paths: int, beside: Sequence[str]) -> dict[str, object]:
    """Of a run of several paths: how many, the loss of the whole, and that of a dense run among those `beside` it."""
    if paths == 1:
        return {}
    return {"paths": paths, "routed_val_loss": counters.val_loss, "dense_val_loss": dense_val_loss(beside)}


def told_at_start(paths: Sequence[Mapping[SlotName, ModuleKey]], data: Mapping[str, object]) -> dict[str, object]:
    """Of a run of several paths: the module of each slot of each, and what is sent to it, where the data tells that."""
    if len(paths) == 1:
        return {}
    return {"paths": [dict(path) for path in paths], **{key: data[key] for key in data if key == "routing"}}


def of_paths(digests: list[str]) -> str:
    """One digest of the weights of all paths: the same as theirs where they are alike, else of theirs in order."""
    return digests[0] if len(set(digests)) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def digests(final: Final | None) -> dict[str, object]:
    """The digests of the result; None where the run broke off."""
    return {
        "weights_sha256": None if final is None else final.weights_sha256,
        "outer_state_sha256": None if final is None else outer_state_sha256(final.outer_digests),
    }


def write(path: Path, summary: dict[str, object]) -> None:
    """Write as JSON, whole or not at all, without secrets; what is not a number, which JSON has not, as null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
    write_text(path, json.dumps(redacted_values(finite), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name and rename, so that the file is whole or absent."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(path)
