"""Replica: a model as named tensors."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from diloco.fsdp2 import Fsdp2
from diloco.replica import Replica, Single
from diloco.workers import World
from tests.toy import Perceptron


def single(model: nn.Module) -> Replica:
    return Single(model)


def test_a_tied_tensor_is_one_parameter_under_its_first_name() -> None:
    model = Perceptron(0.0)
    replica = single(model)
    assert list(replica.parameters()) == ["first.weight", "first.bias", "last.bias", "norm.weight", "norm.bias"]
    assert replica.shapes()["first.weight"] == (4, 4)
    replica.install(["first.weight"], {"first.weight": torch.full((4, 4), 2.0)}, keep=0.0)
    assert model.last.weight is model.first.weight
    assert model.last.weight.unique().tolist() == [2.0]


def test_frozen_parameters_are_not_exchanged() -> None:
    model = Perceptron(0.0)
    model.norm.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    assert list(single(model).parameters()) == ["first.weight", "first.bias", "last.bias"]


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        single(model)


def test_buffers_are_not_exchanged() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("positions", torch.arange(4))
    assert list(single(model).parameters()) == ["weight", "bias"]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4)])
def test_batch_statistics_are_refused_by_name(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(norm))
    with pytest.raises(ValueError, match=r"1\.0 keeps batch statistics"):
        single(model)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4, track_running_stats=False)])
def test_norms_without_statistics_are_accepted(norm: nn.Module) -> None:
    assert "1.weight" in single(nn.Sequential(nn.Linear(4, 4), norm)).parameters()


def test_weights_that_are_not_float32_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"parameter 1\.weight is not float32"):
        single(model)


def test_read_gives_what_is_there_without_a_graph() -> None:
    model = nn.Linear(3, 2)
    found = single(model).read(["bias", "weight"])
    assert list(found) == ["bias", "weight"]
    assert torch.equal(found["weight"], model.weight.detach())
    assert not found["weight"].requires_grad


@pytest.mark.parametrize(("keep", "expected"), [(0.0, 9.0), (1.0, 1.0), (0.75, 3.0)])
def test_install_mixes_in_place(keep: float, expected: float) -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    storage = model.weight.data_ptr()
    single(model).install(["weight"], {"weight": torch.full((2, 3), 9.0)}, keep=keep)
    assert model.weight.unique().tolist() == [expected]
    assert model.bias.unique().tolist() == [1.0]
    assert model.weight.data_ptr() == storage
    assert model.weight.requires_grad


def test_the_model_does_not_keep_the_values_it_was_given() -> None:
    model = nn.Linear(3, 2)
    given = torch.full((2, 3), 9.0)
    single(model).install(["weight"], {"weight": given}, keep=0.0)
    given.zero_()
    assert model.weight.unique().tolist() == [9.0]


def test_workers_that_share_a_gpu_cannot_have_parts_of_a_model() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="use gpus_per_worker=1, or replica=ddp"):
            Fsdp2(Perceptron(0.0), World(size=2, device=torch.device("cuda")))
    finally:
        dist.destroy_process_group()
