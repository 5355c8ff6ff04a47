"""Draft."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from diloco.async_.quorum import Quorum
from diloco.coordinator import Coordinator
from diloco.events import Command, CommitAll, Committed, Event, Finished, Joined, Lost, Measure, Push, Received, Respawn, Run, Started, Tick
from diloco.messages import EVALUATOR, IslandId, Task
from diloco.views import RunView
from experiments.benchmarks import coordinator as played
from experiments.benchmarks.outages import Span, Unit, World

FRAGMENTS = 24
DETECT_S, PUSH_S = 5.0, 0.2


class Islands:
    def __init__(self, world, units, *, keep: bool, schedule=None):
        self._world, self._units, self._keep = world, units, keep
        schedule = schedule or Quorum()
        modules = played._modules(FRAGMENTS, FRAGMENTS)
        self.view = RunView(seed=0, rounds=10**9, inner_steps=FRAGMENTS, segment_steps=0, eval_every=0, save_every=0,
            paths=modules.paths, shard_examples=[1] * len(units), fragments=tuple((s,) for s in modules.slots))
        self.view.pool = self.view.new_pool(schedule.drawn)
        self.view.begin(modules, len(units))
        self._coordinator = Coordinator(schedule=schedule, run=self.view)
        self._free_s = [0.0] * len(units)
        self._events: list[tuple[float, int, Event]] = []
        self._count = 0
        self.now_s = 0.0
        self.steps = Counter()
        self.merged = 0.0
        for i, unit in enumerate(units):
            if not keep:
                for halt in unit.halts:
                    if halt.to_s > 0:
                        self._later(Lost(now_s=max(halt.from_s + DETECT_S, 0.), island=IslandId(i), reason="simulated"))

    def play(self):
        self._later(Started(now_s=0.0)) if not self.now_s else None
        handled = 0
        while True:
            wake = self._coordinator.wake_s()
            at = self._events[0][0] if self._events else math.inf
            if wake is not None and wake < at:
                event = Tick(now_s=max(wake, self.now_s))
            else:
                event = heapq.heappop(self._events)[2]
            if event.now_s >= self._world.end_s:
                return handled
            self.now_s = event.now_s
            if isinstance(event, Finished) and event.report.task.island != EVALUATOR:
                self.steps[event.report.task.island] += event.report.task.steps
            handled += 1
            for command in self._coordinator.handle(event):
                self._do(command)

    def _later(self, event):
        self._count += 1
        rank = 0 if isinstance(event, Started) else 1
        heapq.heappush(self._events, (event.now_s, rank, self._count, event)[0::1] if False else (event.now_s, self._count, event))

    def _do(self, command):
        match command:
            case Run(task=task) if task.island == EVALUATOR:
                self._later(Finished(now_s=self.now_s, report=played._report(task)))
            case Run(task=task):
                self._train(task)
            case Push(task=task):
                self._later(Received(now_s=self.now_s + PUSH_S, turn=task.turn, verdicts=played._verdicts(task), attempt=task.attempt))
            case CommitAll(commits=commits):
                for c in commits:
                    for w in c.weights:
                        self.merged += w
            case Measure():
                self._later(Committed(now_s=self.now_s, stats=()))
            case Respawn(island=island):
                halt = self._units[island].halt(self.now_s)
                back = halt.to_s
                self._free_s[island] = back
                if back < math.inf:
                    self._later(Joined(now_s=back, island=island))

    def _train(self, task: Task):
        unit = self._units[task.island]
        start = now = max(self.now_s, self._free_s[task.island])
        work = 0
        for _ in range(task.steps):
            if now == math.inf: return
            there = unit.there(now)
            end = unit.step(now)
            while isinstance(end, Span):
                if not self._keep:
                    self._free_s[task.island] = math.inf
                    return
                now = end.to_s
                there = unit.there(now)
                end = unit.step(now)
            work += there
            now = end
        if now == math.inf: return
        self._free_s[task.island] = now
        self._later(Finished(now_s=now, report=replace(played._report(task), tokens=work, clock_s=now - start)))
