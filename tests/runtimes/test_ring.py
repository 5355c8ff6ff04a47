"""The order in which contributions go over links: none idle, none shared, whoever is ready first."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict

import pytest

from diloco.runtime.ray_ring import Ring, Transfer


class Line:
    """Hosts whose transfers all take one turn; a host works on what it was given in order."""

    def __init__(self, hosts: int) -> None:
        self.nodes = [f"node{host}" for host in range(hosts)]
        self.ring = Ring(self.nodes)
        self.given: dict[str, list[Transfer]] = defaultdict(list)  # by receiver
        self.turns: list[list[Transfer]] = []

    def offer(self, sender: str) -> None:
        """What a host contributes to all others is ready."""
        for receiver in self.nodes:
            if receiver != sender:
                self.ring.add(Transfer(sender=sender, receiver=receiver, begin=lambda: None))
        self._take()

    def turn(self) -> None:
        """All that is under way comes to its end, in any order."""
        over = [given.pop(0) for given in self.given.values() if given]
        self.turns.append(list(over))
        random.Random(len(self.turns)).shuffle(over)
        for transfer in over:
            self.ring.end(transfer)
            self._take()

    def _take(self) -> None:
        for transfer in self.ring.take():
            self.given[transfer.receiver].append(transfer)


@pytest.mark.parametrize("hosts", (2, 3, 4, 5, 8))
def test_no_link_is_idle_or_shared_when_all_are_ready(hosts: int) -> None:
    for seed in range(10):
        line = Line(hosts)
        for sender in random.Random(seed).sample(line.nodes, hosts):
            line.offer(sender)
        while any(line.given.values()):
            line.turn()
        assert len(line.turns) == hosts - 1
        for transfers in line.turns:
            assert sorted(t.sender for t in transfers) == sorted(t.receiver for t in transfers) == line.nodes


def test_who_is_ready_first_does_not_wait_for_the_others() -> None:
    """Its link carries one after the other; what another offers meanwhile goes where a link is free."""
    line = Line(3)
    line.offer("node0")
    line.turn()
    assert [(t.sender, t.receiver) for t in line.turns[0]] == [("node0", "node2")]
    line.offer("node1")
    line.turn()
    assert {(t.sender, t.receiver) for t in line.turns[1]} == {("node0", "node1"), ("node1", "node0")}
    line.turn()
    assert [(t.sender, t.receiver) for t in line.turns[2]] == [("node1", "node2")]


def test_each_is_begun_once_whatever_the_order_of_offers_and_ends() -> None:
    for seed in range(50):
        chance, line, offers = random.Random(seed), Line(4), 0
        while offers < 12 or any(line.given.values()):
            if offers < 12 and chance.random() < 0.5:
                line.offer(chance.choice([*line.nodes, "elsewhere"]))
                offers += 1
            else:
                line.turn()
        begun = list(itertools.chain.from_iterable(line.turns))
        assert len(begun) == len({id(transfer) for transfer in begun})
        assert not line.ring.take()
        assert len(begun) >= 12 * 3
