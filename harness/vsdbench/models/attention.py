"""Attention over a preallocated cache with an explicit mask, without copying grouped keys and values.

With grouped-query attention the stock SDPA path repeats keys and values once a query head as soon as a mask is given
and more than one token is queried, which is every tree forward. Here the query heads of a group are stacked along the
query axis instead: same product, no copy of the cache. Registered with transformers under ``vsdbench``, so any model
of its attention interface can use it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "vsdbench"


def grouped_attention(  # noqa: PLR0917 - the order is transformers'
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Return ``[B, n, heads, head_dim]`` attention outputs (and no weights).

    Args:
        module: The attention layer.
        query: ``[B, heads, n, head_dim]``.
        key: ``[B, kv_heads, K, head_dim]``.
        value: ``[B, kv_heads, K, value_dim]``.
        attention_mask: ``[B or 1, 1, n, K]`` additive, or already once a query head of a group, ``[…, heads / kv_heads
            * n, K]`` (``stack_mask``); None for full attention, causal unless the layer says that it is not.
        dropout: Dropout probability.
        scaling: Factor of the scores; None means 1 / sqrt(head_dim).
        **kwargs: ``softcap`` and ``s_aux`` (attention sinks) are refused: such models use their eager attention.
            ``is_causal`` goes before the layer's own word; vision towers are not causal. ``together`` is there where
            the rows are those of several sequences (``models.together``), and attends in their place.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        msg = "this attention supports neither soft-capping nor sinks; load the target with attention='eager'"
        raise ValueError(msg)
    batch, heads, num_queries, width = query.shape
    if (together := kwargs.get("together")) is not None:
        parts = tuple(part[0].transpose(0, 1) for part in (query, key, value))
        return together.attend(module.layer_idx, parts, attention_mask, scaling).view(1, num_queries, heads, -1), None  # type: ignore[attr-defined]
    groups = heads // key.shape[1]
    if attention_mask is None or groups == 1:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=dropout,
            scale=scaling,
            is_causal=attention_mask is None and num_queries > 1 and bool(causal),
            enable_gqa=groups > 1,
        )
        return output.transpose(1, 2).contiguous(), None
    stacked = query.reshape(batch, key.shape[1], groups * num_queries, width)
    mask = stack_mask(attention_mask, groups) if attention_mask.shape[-2] == num_queries else attention_mask
    output = scaled_dot_product_attention(stacked, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return output.reshape(batch, heads, num_queries, -1).transpose(1, 2).contiguous(), None


def stack_mask(mask: Tensor, groups: int) -> Tensor:
    """Return the mask once for each query head of a group, along the query axis; one query's mask serves them all."""
    return mask if groups == 1 or mask.shape[-2] == 1 else mask.repeat(1, 1, groups, 1)


def groups(decoder: nn.Module) -> int:
    """Return the query heads that share a key-value head, 1 where a decoder's layers differ or do not say."""
    found = {int(getattr(module, "num_key_value_groups", 0)) for module in decoder.modules()} - {0}
    return found.pop() if len(found) == 1 else 1


def register() -> str:
    """Make the attention known to transformers and return its name."""
    AttentionInterface.register(NAME, grouped_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
