"""Reaching a Ray cluster within seconds, or saying in one line why it cannot be."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

ANSWER_S = 5.0
TRIES = "3"  # of a second each, to be let in by a cluster that answers
TRIES_VARIABLE = "RAY_gcs_server_port_wait_time_s"  # Ray's own 20 each leave a line


def listens(address: str) -> bool:
    """Whether anyone answers at host:port; True for addresses of another form. Ray itself would ask for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return True
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except OSError:
        return False
    return True


def connect_to(address: str, runtime_env: Mapping[str, Any] | None = None) -> None:
    """`ray.init` with the cluster there. Raises ValueError where none answers, or it refuses this process."""
    import ray
    from ray.exceptions import AuthenticationError

    if not listens(address):
        raise ValueError(f"no Ray cluster answers at {address}; start it, or unset RAY_ADDRESS")
    ours = TRIES_VARIABLE not in os.environ
    os.environ.setdefault(TRIES_VARIABLE, TRIES)
    try:
        ray.init(
            address=address,
            runtime_env=dict(runtime_env) if runtime_env else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, AuthenticationError) as error:
        raise ValueError(
            f"the Ray cluster at {address} does not let this process in ({str(error).splitlines()[0]}): with token"
            " authentication, set RAY_AUTH_MODE=token and give all the same ~/.ray/auth_token; the port is that of"
            " `ray start --port`, not the dashboard's"
        ) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        said = " ".join(str(error).split())
        raise ValueError(f"the Ray cluster at {address} is of another version: {said}") from error
    finally:
        if ours:
            del os.environ[TRIES_VARIABLE]
