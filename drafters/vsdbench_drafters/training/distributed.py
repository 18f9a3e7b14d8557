"""Training on several GPUs: batches are divided, gradients are summed, a target that does not fit is sharded.

Data parallelism here is plain: the batches of an optimiser step are dealt out to the processes, each sums the gradients
of its own, weighted as in one process, and one all-reduce sums those. So W processes make the steps of one, up to the
order of float sums. ``DistributedDataParallel`` is not used: it synchronises gradients around a module's ``forward``,
and objectives call a drafter's ``start``, ``advance`` and ``head``, some of them several times for a loss. Nor would
overlapping communication with the backward pass buy much for a drafter of one layer.

A sharded target (FSDP2) keeps a share of every decoder layer in each process and gathers a layer when it runs. All
processes must run it at the same time, but they have different numbers of forwards to make. So each forward is called
out (``Processes.call``), and who waits in ``Processes.gather`` runs one on a single token beside it. This also lets the
first process run it alone, for data, features and evaluations. Embeddings, the last norm and the LM head stay whole in
each process: drafters, losses and held-out scores read them as plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vsdbench.errors import ConfigError

if TYPE_CHECKING:
    from vsdbench.models.target import Target
    from vsdbench.processes import Processes

T = TypeVar("T")

_BUCKET = 1 << 25  # gradients summed by one call: 128 MiB in float32


def check_division(accumulate: int, processes: Processes) -> None:
    """Refuse a number of batches a step that does not divide.

    Raises:
        ConfigError: It does not.
    """
    if accumulate % processes.count:
        raise ConfigError(
            f"training.accumulate is {accumulate}, but the batches of an optimiser step are divided over "
            f"{processes.count} processes: make it a multiple of {processes.count}."
        )


def own_share(items: Sequence[T], processes: Processes) -> list[tuple[int, T]]:
    """Return this process's items, each with its number among all of them.

    >>> from vsdbench.processes import Processes
    >>> own_share("abcde", Processes(1, 2))
    [(1, 'b'), (3, 'd')]
    """
    return list(enumerate(items))[processes.rank :: processes.count]


def same_start(model: nn.Module, processes: Processes) -> None:
    """Give every process the first one's parameters."""
    if processes.count == 1:
        return
    processes.gather(None)
    for parameter in model.parameters():
        dist.broadcast(parameter.data, src=0)


def sum_gradients(parameters: Iterable[Tensor], processes: Processes) -> None:
    """Put the sum of all processes' gradients in the place of each one's own; what nobody has stays None.

    Sums are float32, or float64 where parameters are. They are the same bits in every process.
    """
    if processes.count == 1:
        return
    parameters = list(parameters)
    given = processes.gather([parameter.grad is not None for parameter in parameters])
    used = [parameter for parameter, *has in zip(parameters, *given, strict=True) if any(has)]
    for bucket in _buckets(used):
        flat = torch.cat([_wide(p.grad if p.grad is not None else torch.zeros_like(p)) for p in bucket])
        dist.all_reduce(flat)
        pieces = torch.split(flat, [parameter.numel() for parameter in bucket])
        for parameter, piece in zip(bucket, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)


def _wide(gradient: Tensor) -> Tensor:
    flat = gradient.detach().reshape(-1)
    return flat if flat.dtype == torch.float64 else flat.float()


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(member.numel() for member in bucket) >= _BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def shard_target(target: Target, processes: Processes) -> None:
    """Shard the decoder layers of a target over all processes, each on its own device; the rest is moved there whole.

    From now on every forward of the target needs all processes: they run one, or wait in ``gather``.

    Args:
        target: Loaded in the same way by every process; on the CPU, where one GPU cannot hold it. One that is sharded
            already stays as it is.
        processes: At least two.
    """
    if any(_is_sharded(parameter) for parameter in target.model.parameters()):
        return
    device = torch.device(processes.device)
    decoder, layers = target.model.get_decoder(), target.prepare_sharding(device)
    mesh = init_device_mesh(device.type, (processes.count,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    rest = [tensor for tensor in chain(target.model.parameters(), target.model.buffers()) if not _is_sharded(tensor)]
    for tensor in rest:
        tensor.data = tensor.data.to(device)
    fully_shard(decoder, mesh=mesh, ignored_params={tensor for tensor in rest if isinstance(tensor, nn.Parameter)})
    one = torch.zeros(1, 1, dtype=torch.int64, device=device)
    helping = False

    def call(_decoder: nn.Module, _args: Any) -> None:  # noqa: ANN401 - whatever the model is called with
        if not helping:
            processes.call()

    @torch.inference_mode()  # as every forward of a target: gathered layers are inference tensors
    def run_beside() -> None:
        nonlocal helping
        helping = True
        decoder(input_ids=one, use_cache=False)
        helping = False

    decoder.register_forward_pre_hook(call, prepend=True)
    processes.lend(run_beside)


def _is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)
