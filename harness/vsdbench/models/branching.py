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

from collections.abc import Sequence
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

_BLOCK = 96  # tokens that attend together: fewer see less that is hidden, more are fewer products


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
class _Block:
    """Tokens that attend together: neighbours of the sequence, or whole branches whose roots are neighbours.

    Attributes:
        rows: Which of the T tokens.
        length: They see none of the sequence's tokens from here on.
        own: Which branch tokens they see: themselves, or none where they are the sequence's.
        mask: ``[rows, length + own]`` additive.
    """

    rows: slice
    length: int
    own: slice
    mask: Tensor


@dataclass(frozen=True, slots=True)
class _Plan:
    """What every layer needs to know.

    Attributes:
        blocks: All tokens, in order.
        num_queries: Tokens of the sequence that run through the model: P, or 0 where their keys are known.
        known: ``[layers, 2, G, P or more, W]`` keys and values of the sequence, if they are known.
    """

    blocks: tuple[_Block, ...]
    num_queries: int
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
    if not can_branch(target):
        visible = torch.zeros(length + count, length + count, dtype=torch.bool, device=prefix.device)
        visible[:length, :length] = every[:, None] >= every
        visible[length:, :length] = branches.roots[:, None] >= every
        visible[length:, length:] = _among(branches)
        ids, positions = torch.cat([prefix, branches.tokens]), torch.cat([every, branches.positions])
        return target.branch_states(ids, positions, visible)[length:]
    order = branches.roots.argsort(stable=True)  # what leaves from one place stands together
    ids, positions = branches.tokens[order], branches.positions[order]
    if known is None:
        ids, positions = torch.cat([prefix, ids]), torch.cat([every, positions])
    plan = _plan(branches, order, length, known, target.dtype)
    states = torch.empty(count, target.hidden_size, dtype=target.dtype, device=ids.device)
    states[order] = _run(target, ids, positions, plan)[-count:]
    return states


def _run(target: Target, ids: Tensor, positions: Tensor, plan: _Plan) -> Tensor:
    """Return ``[T, H]``, the last normed hidden states of the tokens, by the fused layers where the target has them."""
    with torch.autocast(ids.device.type, enabled=False):
        fused = target.fused_layers
        if fused is not None:

            def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
                heads_first = (part.transpose(0, 1) for part in (queries, keys, values))
                return _mix(plan, layer, fused.scaling, *heads_first).flatten(1)

            return fused.run(target.embed_tokens(ids), positions, attend, {})
        target.model.set_attn_implementation(NAME)
        try:
            output = target.model.get_decoder()(
                input_ids=ids[None],
                attention_mask=torch.zeros(1, 1, 1, 1),  # four axes: taken as it is; the layers go by the plan
                position_ids=positions[None],
                use_cache=False,
                branches=plan,
            )
        finally:
            target.model.set_attn_implementation(target.attention)
    states: Tensor = output.last_hidden_state[0]
    return states


@torch.inference_mode()
def branch_states_behind(target: Target, prefix: Sequence[int], branches: Branches) -> Tensor:
    """Return what ``branch_states`` does, after the target has read a prefix by itself: one with images, say.

    Args:
        target: The target.
        prefix: The sequence up to the last root, as ``Target.prefill`` takes it.
        branches: The branches.
    """
    count, length = len(branches), len(prefix)
    state = target.prefill(prefix, length + count)
    every = torch.arange(length, device=branches.tokens.device)
    visible = torch.cat([branches.roots[:, None] >= every, _among(branches)], dim=1)
    positions = branches.positions
    target.forward(
        branches.tokens,
        positions,
        visible,
        torch.cat([every, positions]),
        state.cache,
        logits_to_keep=1,
        position_offset=state.position_offset,
    )
    return target.features()[:, -target.hidden_size :]


def counts_tokens(target: Target) -> bool:
    """Whether a token's position is its number even behind an image: not with M-RoPE."""
    rope = getattr(target.config, "rope_parameters", None) or getattr(target.config, "rope_scaling", None) or {}
    return "mrope_section" not in rope


def _among(branches: Branches) -> Tensor:
    """Return ``[n, n]`` bool: which branch tokens each one descends from, itself included."""
    count = len(branches)
    among = torch.zeros(count, count + 1, dtype=torch.bool, device=branches.tokens.device)
    return among.scatter_(1, branches.lineage.where(branches.lineage >= 0, count), value=True)[:, :count]


def _plan(branches: Branches, order: Tensor, length: int, known: Tensor | None, dtype: torch.dtype) -> _Plan:
    """Return the plan of a forward over a sequence of this length, if it is not known, and branches in this order."""

    def additive(keep: Tensor) -> Tensor:
        return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill_(~keep, -torch.inf)

    every = torch.arange(length, device=order.device)
    blocks = []
    first = 0 if known is not None else length
    for start in range(0, first, _BLOCK):
        stop = min(start + _BLOCK, length)
        blocks.append(_Block(slice(start, stop), stop, slice(0), additive(every[start:stop, None] >= every[:stop])))
    roots, among = branches.roots[order], _among(branches)[order][:, order]
    start = 0
    for stop in _cuts(roots):
        own, seen = slice(start, stop), int(roots[stop - 1]) + 1
        keep = torch.cat([roots[own, None] >= every[:seen], among[own, own]], dim=1)
        blocks.append(_Block(slice(first + start, first + stop), seen, own, additive(keep)))
        start = stop
    return _Plan(tuple(blocks), first, known)


def _cuts(roots: Tensor) -> list[int]:
    """Return the ends of blocks of ``[n]`` increasing roots: whole branches, about ``_BLOCK`` tokens each."""
    ends = torch.unique_consecutive(roots, return_counts=True)[1].cumsum(0).tolist()
    cuts, start = [], 0
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or following - start > _BLOCK:
            cuts.append(end)
            start = end
    return cuts


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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _mix(branches, int(module.layer_idx), scale, query[0], key[0], value[0])[None], None  # type: ignore[arg-type]


def _mix(plan: _Plan, layer: int, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: PLR0917
    """Return ``[T, heads, W]``, the attention of ``[heads, T, W]`` queries to ``[G, T, W]`` keys and known ones."""
    num_heads, num_tokens, width = query.shape
    num_groups, first = len(key), plan.num_queries
    own_keys, own_values = key[:, first:], value[:, first:]
    keys, values = (key, value) if plan.known is None else plan.known[layer].to(key.dtype)
    queries = (query * scale).view(num_groups, -1, num_tokens, width)
    mixed = torch.empty(num_tokens, num_groups, num_heads // num_groups, width, dtype=query.dtype, device=query.device)
    for block in plan.blocks:
        asking = queries[:, :, block.rows]
        seen = torch.cat([keys[:, : block.length], own_keys[:, block.own]], dim=1)
        scores = asking.flatten(1, 2) @ seen.transpose(1, 2)
        scores.view(*asking.shape[:3], -1).add_(block.mask)
        weights = torch.softmax(scores, dim=-1)
        found = weights @ torch.cat([values[:, : block.length], own_values[:, block.own]], dim=1)
        mixed[block.rows] = found.view(asking.shape).permute(2, 0, 1, 3)
    return mixed.view(num_tokens, num_heads, width)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
