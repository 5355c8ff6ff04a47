"""Workers of Ray that are forked from a process with torch loaded: each starts in a third of the time.

    python tests/warm.py --serve SOCKET      the process that forks, one for a process of pytest
    python tests/warm.py ARGUMENTS           what a raylet runs in place of Ray's own setup_worker.py

Libraries are loaded beforehand, nothing of this project, so that a test's worker still finds it by itself. Where a test
starts Ray by a command, and where it is about the start of processes, they start as they do for users.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VARIABLE = "DILOCO_TESTS_WARM"  # of the environment: where the socket is
# Not Ray, which takes its settings from the environment as it is loaded.
LIBRARIES = ("torch", "torch.distributed", "hydra.utils", "google.protobuf.descriptor_pb2", "jsonschema", "requests")
LIBRARIES += ("msgpack", "safetensors.torch", "tokenizers")
LOOK_EVERY_S = 1.0  # whether the parent is still there
LENGTH_BYTES = 8


# --- in pytest ---


@contextmanager
def forker() -> Iterator[None]:
    """The process that forks, as long as this is open."""
    with tempfile.TemporaryDirectory(prefix="warm", dir="/tmp") as folder:  # a socket's path must be short
        path = Path(folder, "socket")
        command = [sys.executable, __file__, "--serve", str(path)]
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        try:
            while not path.exists():
                assert process.poll() is None, "the process that forks workers has ended"
                time.sleep(0.02)
            os.environ[VARIABLE] = str(path)
            yield
        finally:
            os.environ.pop(VARIABLE, None)
            process.kill()
            process.wait()


@contextmanager
def forked_workers() -> Iterator[None]:
    """Around the start of a Ray by this process: its workers are forked."""
    from ray._private import ray_constants

    before = ray_constants.SETUP_WORKER_FILENAME
    ray_constants.SETUP_WORKER_FILENAME = __file__
    try:
        yield
    finally:
        ray_constants.SETUP_WORKER_FILENAME = before


# --- as a child of a raylet ---


def ask(given: list[str]) -> None:
    """Have a worker forked, and end as it does; where this process is killed, so is the worker."""
    environment, arguments = dict(os.environ), []
    for each in given:
        name, _, value = each.partition("=")
        if name == "--serialized-runtime-env-context":
            context = json.loads(value)
            assert not context.get("command_prefix"), context
            environment |= {key: os.path.expandvars(text) for key, text in context.get("env_vars", {}).items()}
        elif name != "--language":
            arguments.append(each)
    told = {"arguments": arguments, "environment": environment, "folder": os.getcwd()}
    message = json.dumps(told).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[VARIABLE])
        socket.send_fds(connection, [len(message).to_bytes(LENGTH_BYTES, "big")], [0, 1, 2])
        connection.sendall(message)
        status = connection.recv(1)
    os._exit(status[0] if status else 1)


# --- the process that forks ---


@dataclass
class Forker:
    """Forks a worker for whoever asks; one thread, since a fork has no other."""

    path: str
    asked_by: dict[int, socket.socket] = field(default_factory=dict)  # process number of a worker -> connection

    def serve(self) -> None:
        """Until this process's parent is gone."""
        for library in LIBRARIES:
            importlib.import_module(library)
        gc.freeze()
        parent = os.getppid()
        self.woken, self.wakes = os.pipe()  # by a worker's end
        os.set_blocking(self.wakes, False)
        signal.set_wakeup_fd(self.wakes)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(self.path)
        self.server.listen(64)
        while os.getppid() == parent:
            ready, _, _ = select.select([self.server, self.woken, *self.asked_by.values()], [], [], LOOK_EVERY_S)
            for one in ready:
                if one is self.woken:
                    os.read(self.woken, 1000)
                elif one is self.server:
                    self.fork(self.server.accept()[0])
                else:
                    self.kill(one)
            self.reap()

    def fork(self, connection: socket.socket) -> None:
        """A worker with the streams, arguments and environment of whoever asks."""
        length, streams, _, _ = socket.recv_fds(connection, LENGTH_BYTES, 3)
        message = b""
        while len(message) < int.from_bytes(length, "big"):
            message += connection.recv(1 << 16)
        worker = os.fork()
        if worker == 0:
            self.become(json.loads(message), streams, connection)
        self.asked_by[worker] = connection
        for stream in streams:
            os.close(stream)

    def become(self, told: dict[str, Any], streams: list[int], connection: socket.socket) -> None:
        """In the child: what `python default_worker.py ARGUMENTS` would be. Does not return."""
        os.setpgid(0, 0)  # Ray may kill the group of a worker
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (connection, self.server, *self.asked_by.values()):
            each.close()
        os.close(self.woken)
        os.close(self.wakes)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(told["folder"])
        os.environ.clear()
        os.environ.update(told["environment"])
        sys.argv = told["arguments"]
        own = [os.path.dirname(sys.argv[0]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        sys.path[:1] = [each for each in own if each]  # in place of this file's folder
        runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(0)

    def kill(self, connection: socket.socket) -> None:
        """Whoever asked is gone."""
        for worker, kept in self.asked_by.items():
            if kept is connection:
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)

    def reap(self) -> None:
        """Tell whoever asked how a worker has ended."""
        for worker in list(self.asked_by):
            found, status = os.waitpid(worker, os.WNOHANG)
            if found:
                connection = self.asked_by.pop(worker)
                code = os.waitstatus_to_exitcode(status)
                with suppress(OSError):
                    connection.sendall(bytes([code if code >= 0 else 128 - code]))
                connection.close()


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        Forker(sys.argv[2]).serve()
    else:
        ask(sys.argv[1:])
