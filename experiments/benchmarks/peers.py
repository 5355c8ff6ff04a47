"""The peer of `outer_round`: torchft's DiLoCo over gloo, with inner steps that cost nothing.

`python -m experiments.benchmarks.peers OPTIONS` starts a lighthouse and the replicas, each a process.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from experiments.benchmarks import wan
from experiments.benchmarks.pace import Pace
from experiments.benchmarks.paced import Block

LIMIT_S = 600


def check() -> None:
    """Raise ValueError where torchft is not installed."""
    if find_spec("torchft") is None:
        raise ValueError("torchft, which is measured beside the project, is not installed: pip install torchft")


def main() -> None:
    """Start all, or be the replica that --replica says."""
    options = argparse.ArgumentParser()
    for name in ("--replicas", "--parameters", "--rounds", "--round-steps", "--block-steps"):
        options.add_argument(name, type=int, required=True)
    options.add_argument("--rest-s", type=float, required=True)
    options.add_argument("--folder", required=True)
    options.add_argument("--namespaces", nargs="*", help="one for each replica; start this in the first")
    options.add_argument("--addresses", nargs="*", help="those of the replicas there")
    options.add_argument("--replica", type=int)
    given = options.parse_args()
    if given.replica is None:
        sys.exit(_start(given))
    _replica(given)
    os._exit(0)  # threads of torchft would keep it


def _start(given: argparse.Namespace) -> int:
    addresses = given.addresses or ["127.0.0.1"] * given.replicas
    lighthouse_at = f"{addresses[0]}:{_free_port()}"
    lighthouse = subprocess.Popen(
        [str(Path(sys.executable).with_name("torchft_lighthouse")), "--min_replicas", str(given.replicas)]
        + ["--bind", lighthouse_at, "--join_timeout_ms", "1000"]
    )
    environment = {
        **os.environ,
        "TORCHFT_LIGHTHOUSE": f"http://{lighthouse_at}",
        "GLOO_SOCKET_IFNAME": wan.DEVICE if given.namespaces else "lo",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }
    command = [sys.executable, "-m", "experiments.benchmarks.peers", *sys.argv[1:], "--replica"]
    replicas = [
        subprocess.Popen(
            (["ip", "netns", "exec", given.namespaces[index]] if given.namespaces else []) + [*command, str(index)],
            env={**environment, "MASTER_ADDR": addresses[index]},
        )
        for index in range(given.replicas)
    ]
    failed = max(abs(replica.wait()) for replica in replicas)
    lighthouse.terminate()
    lighthouse.wait()
    return failed


def _replica(given: argparse.Namespace) -> None:
    from torchft import Manager, ProcessGroupGloo
    from torchft.checkpointing.http_transport import HTTPTransport
    from torchft.local_sgd import DiLoCo

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: nn.Module = Block(given.parameters)
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    # The manager looks for its store where the environment says.
    address, port = os.environ["MASTER_ADDR"], _free_port()
    os.environ["MASTER_PORT"] = str(port)
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=True, wait_for_workers=False
    )
    limit = timedelta(seconds=LIMIT_S)
    state: dict[str, Any] = {}
    manager = Manager(
        pg=ProcessGroupGloo(timeout=limit),
        use_async_quorum=False,
        min_replica_size=given.replicas,
        replica_id=f"replica{given.replica}",
        load_state_dict=lambda loaded: None,
        state_dict=lambda: state,
        timeout=limit,
        hostname=address,
        init_sync=False,
        checkpoint_transport=HTTPTransport(timeout=limit, num_chunks=0),
    )
    pace = Pace(folder=given.folder, side="torchft", block_steps=given.block_steps)
    with DiLoCo(
        manager,
        [model],
        inner,
        outer,
        sync_every=given.round_steps,
        backup_device=torch.device("cpu"),
        should_quantize=False,
        use_bucketization=False,
    ):
        for step in range(given.rounds * given.round_steps):
            pace.step(given.replica, step)
            if step % given.round_steps == 0:
                time.sleep(given.rest_s)
            inner.zero_grad()
            inner.step()  # the last of a round synchronises
    manager.shutdown()
    del store


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()
