"""Averages of DDP, fully sharded and compiled models, in real process groups on the CPU."""

import contextlib
import copy
import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastreg import EMA, SWA, AveragedModel, WeightAverager, average_

RULES = {"ema": EMA(0.5), "swa": SWA()}


def model():
    """Rows of 5, 3 and 1: shards are uneven, and with four processes some are empty."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), nn.Linear(3, 1))


def batches(rank, steps=4):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(6, 3, generator=generator) for _ in range(steps)]


def train(net, update, rank, steps=4):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for x in batches(rank, steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        update()


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def ddp(rank, world):
    net = nn.parallel.DistributedDataParallel(model())
    averaged, averager = AveragedModel(net, EMA(0.5)), WeightAverager(net, RULES)

    def update():
        averaged.update_parameters(net)
        averager.update()

    train(net, update, rank)
    mine = [p.detach().clone() for p in net.parameters()]
    for p in averaged.module.parameters():  # every process holds the same average
        gathered = [torch.empty_like(p) for _ in range(world)]
        dist.all_gather(gathered, p.detach())
        assert all(torch.equal(g, p) for g in gathered)
    with averager.swapped("ema"):
        for p, a in zip(net.parameters(), averaged.module.parameters()):
            assert torch.equal(p, a)
    assert all(torch.equal(p, m) for p, m in zip(net.parameters(), mine))
    train(net, update, rank, 1)  # the buckets still work
    assert "0.weight" in averager.state_dict()["averages"]["swa"]


def sharded(rank, world):
    """Shard by shard, equal to the average of the whole parameters."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    net = model()
    fully_shard(net[0])
    fully_shard(net)
    averager, wider = WeightAverager(net, RULES), WeightAverager(net, {"ema": EMA(0.5)}, dtype=torch.float64)
    exact, count = None, 0

    def update():
        nonlocal exact, count
        with contextlib.nullcontext() if count == 0 else _NoDTensors():  # at first it looks at them
            averager.update()
            wider.update()
        now = [full(p).detach().clone() for p in net.parameters()]
        exact = now if count == 0 else [torch.lerp(e, p, 0.5) for e, p in zip(exact, now)]
        count += 1

    train(net, update, rank)
    state = averager.state_dict()
    saved = state["averages"]["ema"]
    for (name, p), e in zip(net.named_parameters(), exact):
        assert isinstance(saved[name], DTensor) and saved[name].shape == p.shape
        torch.testing.assert_close(full(saved[name]), e)
    before = [full(p).detach().clone() for p in net.parameters()]
    with wider.swapped("ema"):
        for p, e in zip(net.parameters(), exact):
            torch.testing.assert_close(full(p).detach(), e)
    assert all(torch.equal(full(p), b) for p, b in zip(net.parameters(), before))
    with averager.swapped("ema"):
        for p, e in zip(net.parameters(), exact):
            torch.testing.assert_close(full(p).detach(), e)
        assert torch.isfinite(net.eval()(batches(rank)[0])).all()
    net.train()
    assert all(torch.equal(full(p), b) for p, b in zip(net.parameters(), before))
    again = WeightAverager(net, RULES)
    again.load_state_dict(copy.deepcopy(state))
    for name, value in again.state_dict()["averages"]["swa"].items():
        assert torch.equal(full(value), full(state["averages"]["swa"][name]))
    train(net, update, rank, 1)
    with pytest.raises(ValueError, match="fully_shard"):
        AveragedModel(net)


class _NoDTensors(TorchDispatchMode):
    """What goes through a DTensor's dispatch costs more than all the rest."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(hasattr(arg, "to_local") for arg in tree_leaves((args, kwargs))), function
        return function(*args, **(kwargs or {}))


def placed(rank, world):
    """DTensor parameters as tensor parallelism leaves them: split along either dimension, and replicated."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, net = init_device_mesh("cpu", (world,)), model()
    for module, placement in ((net[0], Shard(0)), (net[2], Replicate())):
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])))
    net[3].weight = nn.Parameter(distribute_tensor(net[3].weight.detach(), mesh, [Shard(1)]))
    averaged, averager = AveragedModel(net, EMA(0.5), dtype=torch.float64), WeightAverager(net, RULES)
    shadow = [p.detach().clone() for p in net.parameters()]
    exact = [full(p).detach().clone() for p in net.parameters()]
    for n in range(3):
        with torch.no_grad():
            for p in net.parameters():
                p += n
        averaged.update_parameters(net)
        averager.update()
        average_(shadow, [p.detach() for p in net.parameters()], 0.5 if n else 1.0)
        exact = [torch.lerp(e, full(p).detach(), 0.5 if n else 1.0) for e, p in zip(exact, net.parameters())]
    for p, a, s, e in zip(net.parameters(), averaged.module.parameters(), shadow, exact, strict=True):
        assert type(a) is type(p) and a.dtype == torch.float64
        torch.testing.assert_close(full(a).detach().float(), e)
        torch.testing.assert_close(full(s), e)
    with averager.swapped("ema"):
        for p, e in zip(net.parameters(), exact):
            torch.testing.assert_close(full(p).detach(), e)
    again = AveragedModel(net, EMA(0.5), dtype=torch.float64)
    again.load_state_dict(copy.deepcopy(averaged.state_dict()))
    assert all(torch.equal(full(a), full(b)) for a, b in zip(again.parameters(), averaged.parameters()))


def _enter(rank, world, port, job):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        job(rank, world)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # threads of the process group may outlive it, and abort a process that winds down


@pytest.mark.skipif(not dist.is_available() or sys.platform != "linux", reason="needs gloo")
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("job", [ddp, sharded, placed])
def test_averages_of_distributed_models(job, world):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(_enter, (world, port, job), nprocs=world)
