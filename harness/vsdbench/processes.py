"""The processes that run one command together: one alone, or several that torchrun started, one a GPU.

They talk by ``gather``: every process gives a small Python value and gets everybody's. It runs over a channel of its
own on the CPU, which may wait for hours (one process makes the data) and never meets what goes on on the GPUs. A
process that ends closes the channel, so the others end too, with one sentence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench.models.device import DTYPES, choose_device, choose_dtype

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # while the first process makes data; one that dies is noticed at once


class Processes:
    """What one process knows of all of them; ``Processes()`` is one alone, and costs nothing.

    All of them make the same calls in the same order. Any other collective call comes straight after a ``gather``.

    Args:
        rank: Which one this is, 0 … ``count`` - 1.
        count: How many there are.
        device: Where this one computes.
        channel: A group of them on the CPU; None: the default one.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, *, device: str = "auto", channel: dist.ProcessGroup | None = None
    ) -> None:
        self.rank = rank
        self.count = count
        self.device = device
        self._channel = channel
        self._helper: Callable[[], None] | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return everybody's value in order of rank; waits for all, and helps those that need it meanwhile."""
        if self.count == 1:
            return [value]
        found = self._exchange((False, value))
        while any(calling for calling, _ in found):
            if self._helper is not None:
                self._helper()
            found = self._exchange((False, value))
        return [value for _, value in found]

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what the first process makes, for which the others wait."""
        found = self.gather([make()] if self.is_first else [])
        return found[0][0]

    @contextmanager
    def first_goes(self) -> Iterator[None]:
        """Let the first process through a block before the others enter it, who then find what it made."""
        if not self.is_first:
            self.gather(None)
        yield
        if self.is_first:
            self.gather(None)

    def agree(self, value: object, what: str) -> None:
        """Refuse to go on unless every process has the same value.

        Raises:
            EnvironmentProblemError: They have not.
        """
        values = self.gather(value)
        if different := [other for other in values if other != values[0]]:
            raise EnvironmentProblemError(
                f"the processes do not agree on {what} ({values[0]} and {different[0]}): they must read the same files "
                "and share one cache folder (VSDBENCH_CACHE)."
            )

    # ---- work that no process can do alone ----

    def lend(self, helper: Callable[[], None] | None) -> None:
        """Set what a waiting process runs whenever another one calls for help; None: there is no such work."""
        self._helper = helper

    def call(self) -> None:
        """Call for help: those that wait now run the helper, while this process runs its own part."""
        if self.count > 1:
            self._exchange((True, None))

    def _exchange(self, item: tuple[bool, Any]) -> list[tuple[bool, Any]]:
        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, item, group=self._channel)
        except RuntimeError:
            closed = True  # raised below: an error that held this one would hold the channel, see ``leave``
        else:
            closed = False
        if closed:
            raise EnvironmentProblemError(
                "another process of this command stopped, and this one with it; its own message says why."
            )
        return found

    def leave(self) -> None:
        """Give up the channel, which nobody else may hold: its threads end with it, before the interpreter does."""
        channel, self._channel = self._channel, None
        dist.destroy_process_group(channel)


def own_device(name: str) -> torch.device:
    """Return the device of this process under torchrun: for ``cuda`` or ``auto``, the GPU of its local rank.

    Raises:
        ConfigError: One GPU was named for all processes.
        EnvironmentProblemError: There are fewer GPUs than processes on this machine.
    """
    device = choose_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ConfigError(f"--device {name} would put all processes of torchrun on one GPU: use --device cuda.")
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= gpus:
        raise EnvironmentProblemError(
            f"torchrun started process {local + 1} on this machine, where torch sees {gpus} GPU(s): "
            f"use --nproc-per-node={gpus}."
        )
    return torch.device("cuda", local)


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that torchrun started; alone where it did not.

    NCCL carries what is large between GPUs, gloo between CPUs. Where the block fails, NCCL is left as it is: its calls
    may hang then, and the end of the process closes it.

    Args:
        device: As in ``choose_device``; with several processes, ``cuda`` is each one's own GPU.

    Raises:
        ConfigError: See ``own_device``. EnvironmentProblemError: Likewise, or the group cannot be formed.
    """
    count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if count == 1:
        yield Processes(device=device)
        return
    own = own_device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    try:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
        processes = Processes(
            dist.get_rank(), count, device=str(own), channel=dist.new_group(backend="gloo", timeout=_PATIENCE)
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EnvironmentProblemError(f"the processes cannot find each other: {reason}") from error
    clean = own.type == "cpu"
    try:
        yield processes
        processes.gather(None)
        clean = True
    finally:
        processes.leave()
        if clean:
            dist.destroy_process_group()


def common_dtype(name: str, processes: Processes) -> str:
    """Return the name of a dtype; where it is measured, the first process's measurement counts for all."""
    if processes.count == 1 or name != "auto":
        return name
    chosen = processes.from_first(lambda: choose_dtype(name, torch.device(processes.device)))
    return next(known for known, dtype in DTYPES.items() if dtype == chosen)
