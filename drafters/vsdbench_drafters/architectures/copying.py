"""A start from which an EAGLE-3 drafter copies: it finds where the last token stood before, and repeats what followed.

A slot pairs the target's state at token t with the embedding of token t + 1, so one layer can copy: its query is the
embedding of the last token, a slot's key is the token that the target's state there *was* at, and its value is the
embedding of the token that followed. A random layer has to find this out by chance, which takes longer than most small
budgets last; but the map from state to token is linear to a good part, so least squares finds it at once.

One query head of every group starts like this, in the slow half of the rotary pairs, where content outlasts distance.
All else stays random, and everything is trained.

Shape legend: n slots, H drafter width, A heads, G key-value heads, D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vsdbench_drafters.architectures.eagle3 import Eagle3Model

SLOTS_PER_WIDTH = 32
"""Slots to fit the map from, as a multiple of H."""
_MATCH = 24.0  # attention score of a token and itself; of two others it has a deviation of _MATCH / sqrt(D / 2)
_STRENGTH = 20.0  # root mean square of what one copied token adds
_RIDGE = 0.02  # of least squares, as a share of the inputs' mean square
_AT_ONCE = 4096  # slots that are widened to float32 together
_SMALLEST = 1e-3  # variance that whitening still stretches, as a share of the largest


@torch.no_grad()
def start_copying(model: Eagle3Model, features: Tensor, tokens: Tensor, *, seed: int) -> None:
    """Set weights of a fresh drafter so that it copies, in place.

    Args:
        model: The drafter, as ``from_target`` made it.
        features: ``[n, >= 3H_target]`` the target's features at some slots.
        tokens: ``[n]`` int64, the tokens that they are at.
        seed: Of the random projections that tokens are compared in.
    """
    config, layer = model.config, model.midlayer
    width, groups = config.head_dim, config.num_key_value_heads
    per_group = config.num_attention_heads // groups
    states = torch.cat([layer.hidden_norm(model.project(part.float())) for part in torch.split(features, _AT_ONCE)])
    embedded = layer.input_layernorm(model.embeddings[tokens].float())
    variances, axes = torch.linalg.eigh(torch.cov(embedded.T))  # rising
    whiten = axes @ torch.diag(variances.clamp_min(_SMALLEST * float(variances[-1])).rsqrt()) @ axes.T
    read = _least_squares(states, (embedded - embedded.mean(0)) @ whiten)
    # The largest axes of the embeddings are shared out among the groups, and come out as what raises the token's logit.
    carried = axes.flip(1)[:, : groups * width]
    drafted = layer.input_layernorm(model.embeddings[model.draft_ids].float())
    raising = model.norm.weight * (model.lm_head.weight - model.lm_head.weight.mean(0))
    raising = raising / raising.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    write = _STRENGTH * _least_squares(drafted @ carried, raising)
    slow = torch.arange(width).view(2, -1)[:, width // 4 :].flatten()  # rotary pairs are (i, i + D / 2)
    generator = torch.Generator().manual_seed(seed)
    attention = layer.self_attn
    for group in range(groups):
        projection = (
            torch.randn(config.hidden_size, len(slow), generator=generator).to(states) / config.hidden_size**0.5
        )
        scale = (_MATCH * width**0.5 / len(slow)) ** 0.5
        key = attention.k_proj.weight[group * width :][:width]
        query = attention.q_proj.weight[group * per_group * width :][:width]
        query.zero_()
        key[slow] = 0.0
        query[slow, : config.hidden_size] = scale * (whiten @ projection).T
        key[slow, config.hidden_size :] = scale * (read @ projection).T
        own = carried[:, group * width :][:, :width]
        value = attention.v_proj.weight[group * width :][: own.shape[1]]
        value.zero_()
        value[:, : config.hidden_size] = own.T
        out = attention.o_proj.weight[:, group * per_group * width :][:, : own.shape[1]]
        out.copy_(write[group * width :][: own.shape[1]].T)


def _least_squares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the ``[in, out]`` map from centred inputs to outputs, with a ridge."""
    centred = inputs - inputs.mean(0)
    gram = centred.T @ centred
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    solution: Tensor = torch.linalg.solve(gram + ridge, centred.T @ outputs)
    return solution
