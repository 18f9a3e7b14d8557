"""One forward of a target over a sequence and over branches that leave it in many places.

A mask over all tokens says what each one sees, and costs what it hides: the sequence would be compared with every
branch, and every branch with all the others. Here attention is computed where there is something to see: all tokens
against the sequence, and each branch token against its own ancestors. Where the sequence's keys and values are known
already, only the branches run through the model. ``Target.branch_states`` is the same with one mask, for targets and
devices that this has not been made for; the tests hold one against the other.

Shape legend: P tokens of the sequence, n branch tokens, T tokens that run through the model (P + n, or n), D depth of
the branches, G key-value heads, g query heads a key-value head, W head width, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from vsdbench.models import attention

if TYPE_CHECKING:
    from vsdbench.models.target import Target

NAME = "vsdbench-branches"


@dataclass(frozen=True, slots=True)
class Branches:
    """Tokens that continue a sequence in several places.

    Attributes:
        tokens: ``[n]`` int64, ancestors before descendants.
        roots: ``[n]`` int64, the position of the sequence's token that each one's branch leaves from.
        lineage: ``[n, D]`` int64, from the first token of its branch down to itself, as indices of ``tokens``; -1
            behind itself.
    """

    tokens: Tensor
    roots: Tensor
    lineage: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def positions(self) -> Tensor:
        """``[n]`` int64: how many tokens stand before each one."""
        return self.roots + (self.lineage >= 0).sum(-1)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What every layer needs to know.

    Attributes:
        num_queries: Tokens of the sequence that run through the model: P, or 0 where their keys are known.
        mask: ``[g T, P]`` additive: what the tokens see of the sequence, once a query head of a group.
        lineage: ``[g n, D]`` int64, 0 where there is none. ``hidden``: ``[g n, D]`` bool, where that is so.
        known: ``[layers, 2, G, P or more, W]`` keys and values of the sequence, if they are known.
    """

    num_queries: int
    mask: Tensor
    lineage: Tensor
    hidden: Tensor
    known: Tensor | None


@torch.inference_mode()
def branch_states(target: Target, prefix: Tensor, branches: Branches, known: Tensor | None = None) -> Tensor:
    """Return ``[n, H]``, the last normed hidden states of the branch tokens, by one forward.

    Args:
        target: The target.
        prefix: ``[P]`` int64, the sequence up to the last root.
        branches: The branches.
        known: ``[layers, 2, G, P or more, W]`` keys and values of the sequence's tokens, rotary embedding applied; then
            the sequence does not run through the model again.
    """
    length, count = len(prefix), len(branches)
    every = torch.arange(length, device=prefix.device)
    seen = branches.roots[:, None] >= every
    if not can_branch(target):
        among = torch.zeros(count, count + 1, dtype=torch.bool, device=prefix.device)
        among.scatter_(1, branches.lineage.where(branches.lineage >= 0, count), value=True)
        top = torch.cat([every[:, None] >= every, among.new_zeros(length, count)], dim=1)
        visible = torch.cat([top, torch.cat([seen, among[:, :count]], dim=1)])
        ids, positions = torch.cat([prefix, branches.tokens]), torch.cat([every, branches.positions])
        return target.branch_states(ids, positions, visible)[length:]
    ids, positions = branches.tokens, branches.positions
    if known is None:
        seen = torch.cat([every[:, None] >= every, seen])
        ids, positions = torch.cat([prefix, ids]), torch.cat([every, positions])
    groups = attention.groups(target.model)
    mask = torch.zeros(seen.shape, dtype=target.dtype, device=prefix.device).masked_fill_(~seen, -torch.inf)
    hidden = branches.lineage < 0
    plan = _Plan(
        len(ids) - count,
        mask.repeat(groups, 1),
        branches.lineage.clamp(min=0).repeat(groups, 1),
        hidden.repeat(groups, 1),
        known,
    )
    target.model.set_attn_implementation(NAME)
    try:
        output = target.model.get_decoder()(
            input_ids=ids[None],
            attention_mask=mask[None, None],  # four axes: taken as it is; the layers go by the plan
            position_ids=positions[None],
            use_cache=False,
            branches=plan,
        )
    finally:
        target.model.set_attn_implementation(target.attention)
    states: Tensor = output.last_hidden_state[0, -count:]
    return states


def can_branch(target: Target) -> bool:
    """Whether a target's attention can be replaced by this one: ours in every layer, over all tokens, on a CPU.

    On a GPU one masked kernel is faster than these many small ones.
    """
    return (
        target.device.type == "cpu"
        and target.attention == attention.NAME
        and target.window is None
        and "sliding_attention" not in (getattr(target.config, "layer_types", None) or [])
    )


def key_shape(target: Target) -> tuple[int, int, int, int]:
    """Return ``(layers, 2, G, W)``: the shape of one token's keys and values."""
    config = target.config
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or target.hidden_size // heads)
    return target.num_layers, 2, int(getattr(config, "num_key_value_heads", None) or heads), width


def _attend(  # noqa: PLR0917 - the order is transformers'
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    branches: _Plan,
    **_: object,
) -> tuple[Tensor, None]:
    """Return ``[1, T, heads, W]``; arguments as those of ``attention.grouped_attention``, and the plan."""
    del attention_mask, dropout
    plan = branches
    num_heads, num_tokens, width = query.shape[1:]
    num_groups, first = key.shape[1], plan.num_queries
    heads, count = num_heads // num_groups, num_tokens - first
    length, depth = plan.mask.shape[1], plan.lineage.shape[1]
    queries = (query[0] * (width**-0.5 if scaling is None else scaling)).reshape(num_groups, -1, width)
    own_keys, own_values = key[0, :, first:], value[0, :, first:]
    if plan.known is None:
        keys, values = key[0, :, :length], value[0, :, :length]
    else:
        keys, values = plan.known[module.layer_idx, :, :, :length].to(query.dtype)  # type: ignore[index]
    below = queries.view(num_groups, heads, num_tokens, width)[:, :, first:].reshape(num_groups, -1, width)
    lineage = plan.lineage.expand(num_groups, -1, -1)
    own = (below @ own_keys.transpose(1, 2)).gather(-1, lineage).masked_fill_(plan.hidden, -torch.inf)
    mixed = torch.empty_like(queries)
    # The last columns are a branch token's lineage; tokens of the sequence have none. One group fits the CPU's cache.
    scores = torch.full((heads, num_tokens, length + depth), -torch.inf, dtype=query.dtype, device=query.device)
    flat = scores.view(-1, length + depth)
    for group in range(num_groups):
        torch.add(queries[group] @ keys[group].T, plan.mask, out=flat[:, :length])
        scores[:, first:, length:] = own[group].view(heads, count, depth)
        weights = torch.softmax(flat, dim=-1)
        torch.mm(weights[:, :length], values[group], out=mixed[group])
        spread = torch.zeros(heads * count, count, dtype=query.dtype, device=query.device)
        shares = weights.view(heads, num_tokens, -1)[:, first:, length:].reshape(-1, depth)
        spread.scatter_add_(1, plan.lineage, shares)  # what is hidden has a share of 0
        below_out = mixed[group].view(heads, num_tokens, width)[:, first:]
        below_out += (spread @ own_values[group]).view(heads, count, width)
    return mixed.view(num_heads, num_tokens, width).transpose(0, 1).contiguous()[None], None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
