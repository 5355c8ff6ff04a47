"""Between the islands of runtime `spmd`: each gives each other one an object.

Large buffers in it are sent from where they lie, without a copy.
gloo on the CPU, whatever the islands compute on. Rank 0's orders do not come this way.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo

from diloco.runtime.spmd_start import Meeting

Buffer = np.ndarray[Any, np.dtype[np.uint8]]
_Gloo: Any = ProcessGroupGloo  # whose types lack how it is made for a given address


class Exchange:
    """Every island takes part in each exchange, in the same order. ConnectionError where one of them is gone."""

    def __init__(self, meeting: Meeting, *, island: int, islands: int, timeout_s: float) -> None:
        """Meets the other islands. `timeout_s`: of one exchange."""
        self._island, self._islands = island, islands
        self._group: Any = None
        if islands > 1:
            options = _Gloo._Options()
            options._devices = [_Gloo.create_device(hostname=meeting.host)]
            options._timeout = timedelta(seconds=timeout_s)
            with _told_apart():
                self._group = _Gloo(PrefixStore("islands", meeting.store), island, islands, options)

    def begin(self, outgoing: Sequence[Any]) -> Transfer:
        """Give `outgoing[i]` to island i. Its buffers go out while this process does other things."""
        mine = outgoing[self._island]
        if self._group is None:
            return Transfer(own=mine, island=self._island)
        letters, buffers = zip(*[_packed(given) for given in outgoing], strict=True)
        with _told_apart():
            received = self._letters([b"" if i == self._island else letter for i, letter in enumerate(letters)])
            transfer = Transfer(own=mine, island=self._island)
            # Ring order: each begins with another one, so that no link carries all at once.
            for shift in range(1, self._islands):
                to, source = (self._island + shift) % self._islands, (self._island - shift) % self._islands
                for tag, buffer in enumerate(buffers[to]):
                    if buffer.size:
                        transfer.work.append(self._group.send([_tensor(buffer)], to, tag))
                letter, sizes = pickle.loads(received[source])
                arriving = [np.empty(size, dtype=np.uint8) for size in sizes]
                for tag, buffer in enumerate(arriving):
                    if buffer.size:
                        transfer.work.append(self._group.recv([_tensor(buffer)], source, tag))
                transfer.received[source] = (letter, arriving)
                transfer.sent += buffers[to]
        return transfer

    def _letters(self, letters: list[bytes]) -> list[bytes]:
        """Small ones, each to its island; returns those from each island."""
        sizes = torch.tensor([len(letter) for letter in letters])  # int64[islands]
        theirs = torch.empty_like(sizes)
        self._group.alltoall_base(theirs, sizes, [], []).wait()
        given = _tensor(np.frombuffer(bytearray(b"".join(letters)), dtype=np.uint8))
        taken = torch.empty(int(theirs.sum()), dtype=torch.uint8)
        self._group.alltoall_base(taken, given, theirs.tolist(), sizes.tolist()).wait()
        return [part.numpy().tobytes() for part in torch.split(taken, theirs.tolist())]

    def close(self) -> None:
        """Leave the others."""
        self._group = None


class Transfer:
    """What is under way from and to this island."""

    def __init__(self, *, own: Any, island: int) -> None:
        self._own, self._island = own, island
        self.work: list[Any] = []
        self.sent: list[Buffer] = []  # kept while they are being read
        self.received: dict[int, tuple[bytes, list[Buffer]]] = {}

    def wait(self) -> list[Any]:
        """What each island gave to this one."""
        with _told_apart():
            for work in self.work:
                work.wait()
        found = {source: pickle.loads(letter, buffers=buffers) for source, (letter, buffers) in self.received.items()}
        found[self._island] = self._own
        return [found[source] for source in sorted(found)]


@contextmanager
def _told_apart() -> Iterator[None]:
    """gloo's errors, which are RuntimeErrors like any other, as ConnectionErrors."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"another island was lost: {str(error).splitlines()[0]}") from error


def _packed(given: Any) -> tuple[bytes, list[Buffer]]:
    """A letter that says all but the large buffers, and these; one that is in several places is sent once."""
    found: list[pickle.PickleBuffer] = []
    text = pickle.dumps(given, protocol=5, buffer_callback=found.append)
    buffers = [np.asarray(buffer.raw()) for buffer in found]
    return pickle.dumps((text, [buffer.nbytes for buffer in buffers])), buffers


def _tensor(buffer: Buffer) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        return torch.from_numpy(buffer)
