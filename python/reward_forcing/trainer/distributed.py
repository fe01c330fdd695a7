"""Ranks and shards: FSDP2 over all ranks of the run, one block a unit."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .._check import expect
from ..models.blocks import WanTransformer


@contextmanager
def process_group(alone: bool = False):
    """The process group of a ``torchrun`` launch, for the length of a run. Where there was no such launch:
    nothing, or with ``alone`` a group of this process (mixed precision is FSDP2's, which wants one).
    """
    if dist.is_initialized() or ("RANK" not in os.environ and not alone):
        yield
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # Verdicts and the index of a checkpoint travel between hosts: gloo beside NCCL.
    ranks = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", **ranks)
    yield
    dist.destroy_process_group()  # after an error the other ranks may be gone, and this would wait for them


def on_gpus() -> bool:
    """Whether the run's process group is one of GPUs: models are then moved there when they are sharded."""
    return dist.is_initialized() and torch.cuda.is_available()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def agreed(verdict: bool, device: torch.device | str) -> bool:
    """Whether every rank says so: all of them act on it, or none does."""
    if not dist.is_initialized():
        return verdict
    together = torch.tensor(float(verdict), device=device)
    dist.all_reduce(together, op=dist.ReduceOp.MIN)
    return bool(together.item())


class ElsewhereError(Exception):
    """Another rank failed; its own message says of what."""

    def __init__(self):
        super().__init__("another rank failed")


def together(action: Callable[[], None]) -> BaseException | None:
    """Run on every rank; the error of this rank, or that there was one on another. Any failure must reach
    the verdict, or the others would wait for ever."""
    try:
        action()
        error = None
    except (Exception, CheckpointException) as caught:  # the latter is a BaseException alone
        error = caught
    return None if agreed(error is None, "cpu") else error or ElsewhereError()


def lost_a_rank(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    of_backend = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
    return dist.is_initialized() and of_backend


def mean(value: Tensor) -> Tensor:
    """The mean of a scalar over the ranks."""
    if dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= world_size()
    return value


def shard(model: WanTransformer, compute_dtype: torch.dtype | None = None) -> WanTransformer:
    """Shard parameters, gradients and optimizer state over all ranks; as it is in a run of one process.

    Args:
        compute_dtype: what the blocks compute in; parameters and reductions stay float32. Inputs are not cast
            by FSDP: a chunk is not a tensor, and timesteps must not become bfloat16.
    """
    if not dist.is_initialized():
        return model
    mesh = init_device_mesh("cuda" if on_gpus() else "cpu", (world_size(),))
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def fill(model: WanTransformer, state: dict[str, Tensor]) -> None:
    """Give a model that was made on "meta" its weights, cast to its own dtypes. Rank 0 has them, and the
    others receive their shards."""
    model.to_empty(device="cuda" if on_gpus() else "cpu")
    if not dist.is_initialized():
        model.load_state_dict(state)
        return
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)


def heads_mesh(size: int) -> DeviceMesh:
    """The ranks that share a sample with this one: ``size`` neighbours."""
    fits = world_size() % size == 0 and dist.is_initialized()
    expect(fits, "TrainConfig", "head_parallel", f"a divisor of {world_size()} ranks", size)
    kind = "cuda" if on_gpus() else "cpu"
    return init_device_mesh(kind, (world_size() // size, size), mesh_dim_names=("data", "heads"))["heads"]


def settle(model: nn.Module) -> None:
    """After a forward without gradient FSDP2 leaves the root unsharded (pytorch#155319): whatever then reads
    parameters or gradients of the root would miss them."""
    if isinstance(model, FSDPModule):
        model.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (all ranks must call); a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
