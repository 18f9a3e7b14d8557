"""The decoder layers of Llama's family with the fewest operations that a CPU needs for a step.

A step of a small model on a CPU is short, and half of it is not matrix products: forty small operations a layer, each
with its own call. Here the same weights go through a third of them: queries, keys and values are one product, the
activation, the gating and both residual sums happen inside products, and rotary embeddings take three operations.

The model's own code stays what is right: ``fuse`` compares both over a small tree and keeps the model's own layers
where they do not agree, and so do devices, dtypes and architectures that this was not made for.

Shape legend: n rows of one forward, K keys (cached ones and the n new ones), H hidden size, A query heads, G key-value
heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsdbench.models import attention
from vsdbench.models.native_layers import Dimensions, LayerParts, NativeLayers, make_native
from vsdbench.models.packed import PackedLinear, Product, tensors_among

if TYPE_CHECKING:
    from vsdbench.models.kv_cache import PreallocatedCache

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Text models whose layers are: norm, rotary attention, sum, norm, gated SiLU network, sum."""
LARGEST_BYTES = 8 << 30
"""Weights up to which a second packed copy of queries, keys and values is afforded."""
_FIRST_POSITIONS = 1024

Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``(layer, queries [n, A, D], keys [n, G, D], values [n, G, D]) -> [n, A * D]``: the n rows' attention in a layer."""


class FusedLayers:
    """All layers of a decoder and its last norm.

    Args:
        decoder: The model's decoder, its linear layers packed.
        layers: Its layers.
        config: Its text config.

    Attributes:
        native: What runs few rows in one call; None where there is no such thing.
    """

    def __init__(self, decoder: Any, layers: Any, config: Any) -> None:  # noqa: ANN401 - of transformers
        self._rotary = decoder.rotary_emb
        self._last_norm = decoder.norm.weight
        self._eps: float = config.rms_norm_eps
        self._heads: int = config.num_attention_heads
        self._groups: int = config.num_key_value_heads
        self._width: int = layers[0].self_attn.head_dim
        self.scaling: float = layers[0].self_attn.scaling
        self._types: Sequence[str | None] = getattr(config, "layer_types", None) or [None] * len(layers)
        self._layers = [_read(layer) for layer in layers]
        self._kinds = sorted({name or "" for name in self._types})
        sizes = Dimensions(
            heads=self._heads,
            groups=self._groups,
            width=self._width,
            eps=self._eps,
            scaling=self.scaling,
            dtype=layers[0].self_attn.q_proj.weight.dtype,
        )
        masks = [self._kinds.index(name or "") for name in self._types]
        self.native: NativeLayers | None = make_native(self._layers, sizes, masks=masks, last_norm=self._last_norm)
        self._turns = torch.empty(2, 0, self._width)

    def __call__(
        self,
        embedded: Tensor,
        positions: Tensor,
        masks: Tensor | dict[str, Tensor],
        cache: PreallocatedCache,
        kept: dict[int, Tensor],
    ) -> Tensor:
        """Return the ``[n, H]`` last normed states; keys and values are written behind ``cache.length``.

        Args:
            embedded: ``[n, H]`` token embeddings.
            positions: ``[n]`` positions.
            masks: Additive, as ``attention.stack_mask`` makes them, one for all layers or one a layer type.
            cache: Where keys and values go.
            kept: Its keys are layers; the states ``[1, n, H]`` that enter them are put there.
        """
        if self.native is not None and self.native.takes(len(embedded)):
            cache.room_for(len(embedded))
            buffers = cache.whole(self.shape, embedded)
            return self.run_native(embedded, positions, masks, buffers, cache.length, kept=kept)

        def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            mask = self.mask_of(index, masks)
            all_keys, all_values = cache.layers[index].update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None])
            return self.attend(queries, all_keys, all_values, mask)

        return self.run(embedded, positions, attend, kept)

    def run_native(
        self,
        embedded: Tensor,
        positions: Tensor,
        masks: Tensor | dict[str, Tensor] | None,
        cache: tuple[Tensor, Tensor],
        sequences: int | Tensor,
        *,
        kept: dict[int, Tensor],
    ) -> Tensor:
        """Return what ``__call__`` does, by ``native``, for one sequence or several (see ``NativeLayers.run``)."""
        assert self.native is not None
        by_kind = [masks[kind] if isinstance(masks, dict) else masks for kind in self._kinds]
        return self.native.run(embedded, self._turn(positions), by_kind, cache, sequences, kept=kept)

    def weights(self) -> Iterator[Tensor]:
        """Yield all weights that a step reads."""
        for layer in self._layers:
            yield from tensors_among([layer.norm, layer.mlp_norm, *(layer.head_norms or ()), *layer.products.values()])
        yield self._last_norm

    @property
    def num_layers(self) -> int:
        """How many."""
        return len(self._layers)

    @property
    def shape(self) -> tuple[int, int]:
        """Key-value heads and width of a head, of every layer."""
        return self._groups, self._width

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``[n, D]`` float32 cosines and sines of the rotary embedding, from a table of all positions."""
        wanted = int(positions.max()) + 1
        if self._turns.shape[1] < wanted:
            every = torch.arange(max(_FIRST_POSITIONS, 2 * wanted))
            self._turns = torch.cat(self._rotary(torch.empty(0), every[None]))
        cos, sin = self._turns[:, positions]
        return cos, sin

    def run(self, embedded: Tensor, positions: Tensor, attend: Attend, kept: dict[int, Tensor]) -> Tensor:
        """Return the ``[n, H]`` last normed states, with any attention; see ``__call__``."""
        count, width = len(embedded), self._width
        cos, sin = self._rotary(embedded, positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None].clone()
        sin[..., : width // 2].neg_()  # the half that is rotated with a minus sign
        x = embedded
        for index, layer in enumerate(self._layers):
            if index in kept:
                kept[index] = x[None]
            assert layer.norm is not None
            normed = F.rms_norm(x, layer.norm.shape, layer.norm, self._eps)
            mixed = layer.qkv(normed).view(count, self._heads + 2 * self._groups, width)
            turned = mixed[:, : self._heads + self._groups]
            if layer.head_norms is not None:
                turned = self._norm_heads(turned, layer.head_norms)
            swapped = turned.view(count, self._heads + self._groups, 2, width // 2).flip(2).flatten(2)
            turned = torch.addcmul(turned * cos, swapped, sin)
            values = mixed[:, self._heads + self._groups :]
            attended = attend(index, turned[:, : self._heads], turned[:, self._heads :], values)
            x = layer.out.plus(attended, x)
            normed = F.rms_norm(x, layer.mlp_norm.shape, layer.mlp_norm, self._eps)
            x = layer.down.plus(layer.up.times(normed, layer.gate.silu(normed)), x)
        return F.rms_norm(x, self._last_norm.shape, self._last_norm, self._eps)

    def mask_of(self, index: int, masks: Tensor | dict[str, Tensor]) -> Tensor:
        """Return the mask of a layer, of one for all layers or one a layer type."""
        return masks if isinstance(masks, Tensor) else masks[self._types[index]]  # type: ignore[index]

    def _norm_heads(self, turned: Tensor, norms: tuple[Tensor, Tensor]) -> Tensor:
        queries, keys = turned[:, : self._heads], turned[:, self._heads :]
        parts = [
            F.rms_norm(part, norm.shape, norm, self._eps) for part, norm in zip((queries, keys), norms, strict=True)
        ]
        return torch.cat(parts, dim=1)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Return ``[n, A * D]``; the query heads of a group stand along the query axis, so keys are not repeated.

        Args:
            queries: ``[n, A, D]``.
            keys: ``[1, G, K, D]``.
            values: ``[1, G, K, D]``.
            mask: ``[1, 1, A / G * n or 1, K]``.
        """
        count, groups = len(queries), self._groups
        each, width = self._heads // groups, self._width  # said, not inferred: a compiler's sizes are symbols
        stacked = (
            queries.reshape(count, groups, each, width).permute(1, 2, 0, 3).reshape(1, groups, each * count, width)
        )
        attended = F.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=self.scaling)
        return attended.view(groups, each, count, width).permute(2, 0, 1, 3).reshape(count, groups * each * width)


def can_fuse(decoder: Any, config: Any, attention_name: str, *, plain: bool = False) -> bool:  # noqa: ANN401 - of transformers
    """Whether a decoder is of the kind, attends as ours does, and is small enough for one more copy.

    And packed, or else nothing is gained; ``plain`` weights are enough for a compiler to gain something.
    """
    size = sum(parameter.nbytes for parameter in decoder.parameters())
    return (
        config.model_type in MODEL_TYPES
        and getattr(config, "hidden_act", None) == "silu"
        and attention_name == attention.NAME
        and size <= LARGEST_BYTES
        and (plain or any(isinstance(module, PackedLinear) for module in decoder.modules()))
    )


def agree(ours: Tensor, own: Tensor) -> bool:
    """Whether two tensors of features ``[n, 4H]`` are the same but for rounding: the median row, relative to its norm.

    Not the worst row: that of the first token is huge in a few places, and moves by a sixth in bfloat16. The states
    that enter an early layer have seen little rounding, so they tell another computation from the same one best.
    """
    early, late = (1e-4, 1e-3) if own.dtype is torch.float32 else (0.02, 0.1)
    parts = zip(ours.float().chunk(4, -1), own.float().chunk(4, -1), (early, late, late, late), strict=True)
    return all(median_row_error(a, b) <= tolerance for a, b, tolerance in parts)


def median_row_error(ours: Tensor, own: Tensor) -> float:
    """Return how far the median row of ``[n, H]`` is from what it should be, relative to the norm of that."""
    return float(((ours - own).norm(dim=-1) / own.norm(dim=-1)).median())


def _read(layer: Any) -> LayerParts:  # noqa: ANN401 - of transformers
    attn, mlp = layer.self_attn, layer.mlp
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    joined = torch.cat([projection.weight.detach() for projection in projections])
    biases = [projection.bias.detach() for projection in projections if projection.bias is not None]
    norms = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    return LayerParts(
        norm=layer.input_layernorm.weight,
        mlp_norm=layer.post_attention_layernorm.weight,
        qkv=Product(joined, torch.cat(biases) if biases else None),
        head_norms=None if norms[0] is None or norms[1] is None else (norms[0].weight, norms[1].weight),
        out=_packed(attn.o_proj),
        gate=_packed(mlp.gate_proj),
        up=_packed(mlp.up_proj),
        down=_packed(mlp.down_proj),
    )


def _packed(linear: nn.Linear) -> Product:
    return Product(linear.weight, linear.bias, packed=getattr(linear, "packed", None))
