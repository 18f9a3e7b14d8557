"""Optimisers and learning rates: which tensors get which, and how rates fall to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vsdbench_drafters.training.recipe import TrainingConfig


@dataclass(slots=True)
class Optimisers:
    """One or two optimisers that act as one.

    Attributes:
        members: AdamW, or Muon and AdamW.
        names: Parameter names, for checkpoints.
    """

    members: list[torch.optim.Optimizer]
    names: dict[Tensor, str]

    def step(self, scale: float) -> None:
        """Update every parameter at ``scale`` times its peak learning rate, and forget the gradients."""
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = group["peak_lr"] * scale
            member.step()
            member.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """Return all state tensors under ``parameter name/state name``."""
        return {
            f"{self.names[parameter]}/{key}": torch.as_tensor(value)
            for member in self.members
            for parameter, state in member.state.items()
            for key, value in state.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        by_name = {name: parameter for parameter, name in self.names.items()}
        for member in self.members:
            mine = {id(parameter) for group in member.param_groups for parameter in group["params"]}
            for key, value in state.items():
                name, _, field = key.rpartition("/")
                if id(by_name[name]) in mine:
                    member.state[by_name[name]][field] = value.to(by_name[name].device, copy=True)


def make_optimisers(model: nn.Module, config: TrainingConfig) -> Optimisers:
    """Return the optimisers of a drafter; a head with rate 0 is frozen here."""
    named = dict(model.named_parameters())
    head = [p for name, p in named.items() if name.startswith("lm_head.")]
    for parameter in head:
        parameter.requires_grad_(config.head_lr > 0)
    matrices = [p for name, p in named.items() if p.dim() == 2 and not name.startswith("lm_head.")]
    vectors = [p for p in named.values() if p.dim() != 2]  # and queries of an attention to an image
    groups = [{"params": vectors, "lr": config.vector_lr, "peak_lr": config.vector_lr, "weight_decay": 0.0}]
    if config.head_lr > 0:
        groups.append({"params": head, "lr": config.head_lr, "peak_lr": config.head_lr})
    members: list[torch.optim.Optimizer] = []
    if config.optimiser == "muon":
        muon = [{"params": matrices, "lr": config.lr, "peak_lr": config.lr}]
        members.append(torch.optim.Muon(muon, lr=config.lr, weight_decay=config.weight_decay))
    else:
        groups.append({"params": matrices, "lr": config.lr, "peak_lr": config.lr})
    members.append(torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay, fused=True))
    return Optimisers(members, {parameter: name for name, parameter in named.items()})


def lr_scale(step: int, num_steps: int, *, warmup: float, schedule: str) -> float:
    """Return the share of the peak rate at a step (0 … ``num_steps`` - 1): up linearly, then down towards 0.

    >>> [round(lr_scale(s, 4, warmup=0.25, schedule="linear"), 2) for s in range(4)]
    [1.0, 1.0, 0.67, 0.33]
    """
    rising = max(1, round(warmup * num_steps))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, num_steps - rising)
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
