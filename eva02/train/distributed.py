"""Several processes: who they are, DDP and FSDP2 around a model, sums over ranks.

Started by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK; without it there is one process and nothing is
communicated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

State = dict[str, Any]
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class World:
    """This process among the run's."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over processes, in place, on the device."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def equalise(self, model: nn.Module) -> None:
        """Give the model the first process's parameters and buffers."""
        if self.size > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, 0)

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, on everyone."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """The first process's value, on everyone."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]


class AnyOf:
    """Whether any process said so: the same answer for all, one call later.

    The CPUs exchange what was said while the next step goes on: a call waits for no device, and hardly ever for another
    process.
    """

    def __init__(self, world: World) -> None:
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._said = torch.zeros((), dtype=torch.int32)
        self._pending: dist.Work | None = None

    def __call__(self, said: bool) -> bool:
        """Say so or not; returns whether any process did at the call before. A process alone has its answer at once."""
        if self._group is None:
            return said
        answer = self.wait()
        self._said = torch.tensor(said, dtype=torch.int32)
        self._pending = dist.all_reduce(self._said, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer

    def wait(self) -> bool:
        """The answer to the last call."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return bool(self._said)


def choose_device(name: str) -> torch.device:
    """ "auto" is this process's GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"run.device is {name!r}, but PyTorch sees no GPU here")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


@contextlib.contextmanager
def started(device: str) -> Iterator[World]:
    """The processes that torchrun started, joined: NCCL on GPUs, gloo on CPUs."""
    chosen = choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(device=chosen)
        return
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, chosen)
    finally:
        dist.destroy_process_group()


class Parallel:
    """A model's trained form: itself, replicated (DDP) or in shards (FSDP2).

    Args:
        model: on its device; its weights are the same everywhere (`World.equalise`).
        how: "ddp" or "fsdp"; one process needs neither.
        blocks: parts that FSDP gathers one at a time.
    """

    def __init__(self, model: nn.Module, world: World, how: str) -> None:
        self.model, self.world = model, world
        self.sharded = world.size > 1 and how == "fsdp"
        self.forward: nn.Module = model
        self.scalars: list[str] = []
        if self.sharded:
            self.scalars = shard(model)
        elif world.size > 1:
            ids = [world.device] if world.device.type == "cuda" else None
            self.forward = nn.parallel.DistributedDataParallel(model, device_ids=ids)

    @contextlib.contextmanager
    def gradients(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a part of a batch: ranks exchange gradients with the last part only."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(self.forward, nn.parallel.DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
            return
        yield

    def full_state(self, model: nn.Module) -> State:
        """All of a model's weights on the first process's CPU; others get nothing of a sharded one."""
        if not self.sharded:
            return {key: value.detach().cpu() for key, value in model.state_dict().items()}
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state: State = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {key: value.reshape(()) if key in self.scalars else value for key, value in state.items()}


def shard(model: nn.Module) -> list[str]:
    """FSDP2 over all processes, one unit for each block and one for the rest.

    It takes no parameters without dimensions: they become vectors of one element, and their names are returned.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    for name in scalars:
        module, _, attribute = name.rpartition(".")
        scalar = model.get_parameter(name)
        setattr(model.get_submodule(module), attribute, nn.Parameter(scalar.detach().reshape(1), scalar.requires_grad))
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block)
    fully_shard(model)
    for name in ("encode_image", "encode_text"):  # a two-tower model's other ways in
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return scalars


def save_sharded(path: Path, state: State) -> None:
    """Each process writes its shards of a state of models and optimisers' states.

    Raises:
        OSError: on all processes, where any of them could not write.
    """
    import torch.distributed.checkpoint as dcp

    try:
        dcp.save(state, checkpoint_id=path)
    except dcp.CheckpointException as error:  # which is no Exception
        causes = "; ".join(f"process {rank}: {failure[0]}" for rank, failure in error.failures.items())
        raise OSError(causes) from error


def load_sharded(path: Path, state: State) -> None:
    """Read into the tensors of `state`, in place."""
    import torch.distributed.checkpoint as dcp

    dcp.load(state, checkpoint_id=path)
