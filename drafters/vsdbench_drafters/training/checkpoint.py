"""Resumable training state: one safetensors file that appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.checkpoints import save_whole


def save_state(path: Path, groups: dict[str, dict[str, Tensor]], *, step: int, key: str) -> None:
    """Write named groups of tensors (model, optimiser, average) with the number of steps done.

    Args:
        path: The file; what was there before is replaced in one rename.
        groups: Tensors by group and name.
        step: Optimiser steps done.
        key: Hash of the training that this state belongs to.

    Raises:
        EnvironmentProblemError: The disk is full.
    """
    flat = {
        f"{group}:{name}": tensor.detach().cpu().clone().contiguous()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }
    save_whole(path, flat, {"step": str(step), "key": key})


def load_state(path: Path, *, key: str) -> tuple[dict[str, dict[str, Tensor]], int] | None:
    """Return ``(groups, step)``, or None if there is no such file or it belongs to another training.

    Raises:
        ConfigError: The file is damaged.
    """
    if not path.exists():
        return None
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            for name in file.keys():  # noqa: SIM118 - not a mapping
                group, _, inner = name.partition(":")
                groups.setdefault(group, {})[inner] = file.get_tensor(name)
            return groups, int(metadata["step"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the training checkpoint '{path}' is damaged; delete it to start again.") from error
