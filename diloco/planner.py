"""From a configuration to its plan, and the plan as text: what will be sent and waited for, before anything starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diloco import config as configuration
from diloco.codec import Int4, Int8
from diloco.config import RunConfig
from diloco.formats import format_bytes, format_count
from diloco.messages import Modules, Shape
from diloco.plan import Plan

UTILIZATIONS = (0.5, 0.8, 0.9, 0.95, 0.99)  # for which the bandwidth is told
FULL_BITS = 32.0  # of a parameter, sent down to those who cannot follow each version
LEAST_UTILIZATION = 0.8  # below it, what would mend it is told
USUAL_STEP_S = 0.1  # of the example in a run's first lines
NARROWER = (Int8(), Int4())  # codecs to propose
MOST_INNER_STEPS = 100_000  # to propose


def plan_of(
    config: RunConfig,
    modules: Modules,
    shapes: Mapping[str, Shape],
    *,
    step_s: float | None = None,
    link_gbits: float | None = None,
) -> Plan:
    """The plan of a run with these trainable parameters (name -> shape), its islands on nodes of their own."""
    sizes, follows = fragment_sizes(modules, shapes), config.schedule.by_fragment
    return Plan(
        fragments=sizes if follows else (sum(sizes),),
        bits_up=config.codec.parameter_bits(),
        bits_down=config.codec_down.parameter_bits() if follows else FULL_BITS,
        islands=config.islands,
        shards=config.store.resolved(config.islands),
        inner_steps=config.inner_steps,
        lag=config.schedule.overlap_steps(),
        follows=follows,
        step_s=step_s,
        link_gbits=link_gbits,
    )


def fragment_sizes(modules: Modules, shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    """The parameters of what is exchanged together, in order."""
    groups = [[name for slot in slots for name in modules.slots[slot]] for slots in modules.fragments]
    return tuple(sum(math.prod(shapes[name]) for name in names) for names in groups)


def lines(plan: Plan) -> tuple[str, str]:
    """What a run says of itself before it starts, when nobody knows how long a step takes."""
    sent = (
        f"plan: {_model(plan)}; an island and round of {_steps(plan)}:"
        f" {format_bytes(plan.bytes_up)} up ({plan.bits_up:g} bits),"
        f" {format_bytes(plan.bytes_down)} down ({plan.bits_down:g} bits)"
    )
    if plan.islands == 1:
        return sent, "plan: a single island has the store beside it, so that no link between nodes is needed"
    low, high = (format_rate(plan.required_gbits(u, step_s=USUAL_STEP_S)) for u in (0.8, 0.95))
    return sent, (
        f"plan: between nodes, at {USUAL_STEP_S:g} s a step, 80 % utilisation needs {low} each way,"
        f" 95 % {high}; at {2 * USUAL_STEP_S:g} s half"
    )


def rows(plan: Plan, *, rounds: int) -> list[tuple[str, str]]:
    """All that can be said of a plan: names and texts."""
    up, down = format_bytes(plan.bytes_up), format_bytes(plan.bytes_down)
    # What islands start with they built themselves; what came of the last turns they do not install.
    turn_steps = max(plan.inner_steps // len(plan.fragments), 1)
    last = min(plan.lag // turn_steps + 1, len(plan.fragments)) / len(plan.fragments)
    total = plan.islands * (rounds * plan.bytes_up + (rounds - last) * plan.bytes_down)
    found = [
        ("parameters", _model(plan)),
        ("on the wire as", f"{plan.bits_up:g} bits a parameter up, {plan.bits_down:g} down"),
        ("an island and round", f"{up} up, {down} down, for {_steps(plan)}"),
        ("all islands, rounds", f"{format_bytes(total)}: {plan.islands} x {rounds}"),
        ("step", "unknown: give --step-s, or --measure" if plan.step_s is None else f"{plan.step_s:.3g} s"),
    ]
    if not plan.follows:
        found.append(
            ("without a barrier", "counted as if all islands took whole rounds; shorter ones are sent more often")
        )
    if plan.islands == 1:
        return [*found, ("link", "none: a single island has the store beside it")]
    if plan.link_gbits is None:
        found.append(("link", "unknown: give --link"))
    else:
        found += [("link", f"{format_rate(plan.link_gbits)} each way for an island"), *_on_link(plan, plan.link_gbits)]
    at = "1 s a step, in proportion to steps a second" if plan.step_s is None else f"{plan.step_s:.3g} s a step"
    needed = {u: format_rate(plan.required_gbits(u, step_s=plan.step_s or 1.0)) for u in UTILIZATIONS}
    found.append(("needed each way", f"at {at}"))
    return found + [(f"  for {_percent(u)}", rate) for u, rate in needed.items()]


def warning(plan: Plan) -> str:
    """That the link is too slow, and what would mend it; empty where it is not, or where too little is known."""
    if plan.utilization is None or plan.utilization >= LEAST_UTILIZATION or plan.step_s is None:
        return ""
    needed = format_rate(plan.required_gbits(LEAST_UTILIZATION, step_s=plan.step_s))
    return (
        f"islands will train {_percent(plan.utilization)} of the time; for {_percent(LEAST_UTILIZATION)}, a link of"
        f" {needed} would do; instead: {', '.join(mends(plan))}"
    )


def mends(plan: Plan) -> list[str]:
    """Settings that let a plan with a known link wait less, with the utilisation that each reaches alone."""
    found = [f"{text} ({_percent(_utilization(changed))})" for text, changed in _changes(plan)]
    if not plan.follows:
        return [*found, "schedule=quorum layout=fragments, where nobody waits for what is under way"]
    if not plan.lag:
        found.append(
            "layout=fragments schedule.lag=5, which hides 5 steps of each fragment's exchange (with layout=paths: "
            "layout.fragments=2)"
        )
    return found


def as_json(plan: Plan, *, rounds: int) -> dict[str, Any]:
    """For machines: shares and Gbit/s, null for what is unknown."""
    gbits, step_s = plan.link_gbits, plan.step_s
    known = gbits is not None and plan.islands > 1
    return {
        "parameters": plan.parameters,
        "fragments": list(plan.fragments),
        "islands": plan.islands,
        "inner_steps": plan.inner_steps,
        "rounds": rounds,
        "lag": plan.lag,
        "bits_up": plan.bits_up,
        "bits_down": plan.bits_down,
        "bytes_up": plan.bytes_up,
        "bytes_down": plan.bytes_down,
        "step_s": step_s,
        "link_gbits": gbits,
        "fragment_wire_s": list(plan.fragment_wire_s(gbits)) if known and gbits else None,
        "wire_s": sum(plan.fragment_wire_s(gbits)) if known and gbits else None,
        "exposed_s": plan.exposed_s(gbits=gbits, step_s=step_s) if known and gbits and step_s else None,
        "utilization": plan.utilization,
        "required_gbits": None if step_s is None else _required(plan, step_s),
        "required_gbits_at_1_s": _required(plan, 1.0),
        "warning": warning(plan) or None,
    }


def format_rate(gbits: float) -> str:
    """Three digits and a decimal unit: 12.3 Mbit/s."""
    count = format_count(1e9 * gbits)
    return f"{count}bit/s" if " " in count else f"{count} bit/s"


def _model(plan: Plan) -> str:
    count = len(plan.fragments)
    return f"{format_count(plan.parameters)} parameters in {count} fragment{'s' if count > 1 else ''}"


def _steps(plan: Plan) -> str:
    return f"{plan.inner_steps} step{'s' if plan.inner_steps > 1 else ''}"


def _on_link(plan: Plan, gbits: float) -> list[tuple[str, str]]:
    each = plan.fragment_wire_s(gbits)
    several = f"; a fragment {min(each):.3g} to {max(each):.3g} s" if len(each) > 1 else ""
    found = [("on the wire", f"{sum(each):.3g} s a round{several}")]
    if plan.step_s is not None:
        exposed_s = plan.exposed_s(gbits=gbits, step_s=plan.step_s)
        work_s = plan.inner_steps * plan.step_s
        found += [
            ("waiting", f"{exposed_s:.3g} s beside {work_s:.3g} s of steps"),
            ("utilisation", _percent(_utilization(plan))),
        ]
    return found


def _changes(plan: Plan) -> list[tuple[str, Plan]]:
    """What may be changed alone, and the plan with it."""
    found = []
    more = next(
        (
            changed
            for steps in _round_numbers(plan.inner_steps)
            if _utilization(changed := replace(plan, inner_steps=steps)) >= LEAST_UTILIZATION
        ),
        None,
    )
    if more is not None:
        found.append((f"inner_steps={more.inner_steps}", more))
    for codec in NARROWER:
        bits, name = codec.parameter_bits(), configuration.choice_of("codec", codec)
        if bits < plan.bits_up:
            found.append((f"codec={name}", replace(plan, bits_up=bits)))
        if plan.follows and bits < min(plan.bits_up, plan.bits_down):
            both = replace(plan, bits_up=bits, bits_down=bits)
            found.append((f"codec={name} codec@codec_down={name}", both))
    return found


def _round_numbers(above: int) -> list[int]:
    """Numbers of one digit and zeros, in order."""
    numbers = [digit * 10**zeros for zeros in range(int(math.log10(MOST_INNER_STEPS))) for digit in range(1, 10)]
    return [number for number in numbers if number > above]


def _utilization(plan: Plan) -> float:
    assert plan.utilization is not None
    return plan.utilization


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _required(plan: Plan, step_s: float) -> dict[str, float]:
    return {f"{u:.0%}".rstrip("%"): plan.required_gbits(u, step_s=step_s) for u in UTILIZATIONS}
