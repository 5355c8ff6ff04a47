"""The link between the nodes of a Ray cluster, here two on one machine."""

from __future__ import annotations

import pytest
import ray
from ray.cluster_utils import Cluster

from diloco.runtime.ray_address import connect_to
from diloco.runtime.ray_link import measured_gbits


def test_the_link_between_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 200 << 20, "include_dashboard": False},
    )
    try:
        assert measured_gbits(cluster.address) is None
        cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        cluster.wait_for_nodes()
        gbits = measured_gbits(cluster.address)
        assert gbits is not None and 0.01 < gbits < 1000
        assert not ray.is_initialized()
    finally:
        cluster.shutdown()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nobody.invalid:6379", "http://127.0.0.1:1"])
def test_where_nobody_answers_is_said_at_once(address: str) -> None:
    with pytest.raises(ValueError, match=f"no Ray cluster answers at {address}; start it, or unset RAY_ADDRESS"):
        connect_to(address)
    assert not ray.is_initialized()
