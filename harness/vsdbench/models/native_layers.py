"""Decoder layers in one call of the kernels that were compiled for this machine (``models.native``).

Between the products of a layer are forty small operations. Here they, the products and the attention are one loop in C,
so that a step takes no longer than its products do one by one. The target's fused layers and the drafters' layer are
made of the same parts and stay the reference; they also do what this does not: many rows, other dtypes and widths.

Shape legend: n rows of one forward, K keys (cached ones and the n new ones), H hidden size, A query heads, G key-value
heads, D head width, C capacity of a cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsdbench.models import native

if TYPE_CHECKING:
    from vsdbench.models.packed import Product

_POINTER, _NUMBER, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_LARGEST_VECTOR = 16
"""Floats of the widest registers: head widths are multiples of it."""
_MOST_KEPT = 4
_MOST_MASKS = 2


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("norm", "mlp_norm", "query_norm", "key_norm")),
        *((name, native.Weight) for name in ("qkv", "out", "gate", "up", "down")),
        ("mask", _NUMBER),
        ("keep", _NUMBER),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("last_norm", _POINTER),
        *((name, _NUMBER) for name in ("num_layers", "num_masks", "hidden", "heads", "groups", "width", "inner")),
        ("eps", ctypes.c_float),
        ("scaling", ctypes.c_float),
        ("is_bf16", _NUMBER),
    )


class SequenceRows(ctypes.Structure):
    """Some rows of a call that are of one sequence, and where its keys and values are.

    ``first`` row and ``count`` of rows; ``length``, keys so far; in elements, ``place``, the first head's first key
    from the start of a layer, and ``head_stride``, from one head's to the next; ``mask_row``, the first row's in the
    masks.
    """

    _fields_ = tuple((name, _LONG) for name in ("first", "count", "length", "place", "head_stride", "mask_row"))


def sequence_rows(counts: Tensor, lengths: Tensor, places: Tensor, head_strides: Tensor, mask_rows: Tensor) -> Tensor:
    """Return ``SequenceRows`` ``[B, 6]`` of sequences whose rows follow one another; arguments are ``[B]`` int64."""
    return torch.stack([counts.cumsum(0) - counts, counts, lengths, places, head_strides, mask_rows], dim=1)


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("embedded", "entered", "cos", "sin")),
        ("masks", _POINTER * _MOST_MASKS),
        ("mask_strides", _LONG * _MOST_MASKS),
        *((name, _POINTER) for name in ("keys", "values")),
        ("layer_stride", _LONG),
        ("sequences", _POINTER),
        ("kept", _POINTER * _MOST_KEPT),
        *((name, _POINTER) for name in ("out", "last", "work")),
        *((name, _NUMBER) for name in ("rows", "num_sequences", "threads")),
    )


@dataclass(frozen=True, slots=True)
class LayerParts:
    """Products and norms of one layer.

    Attributes:
        norm: ``[H]``, before attention; None: what enters the attention is given.
        mlp_norm: ``[H]``.
        qkv: Queries, keys and values, joined.
        head_norms: ``[D]`` weights of the norms of queries and of keys, where there are such.
        out, gate, up, down: The other four.
    """

    norm: Tensor | None
    mlp_norm: Tensor
    qkv: Product
    head_norms: tuple[Tensor, Tensor] | None
    out: Product
    gate: Product
    up: Product
    down: Product

    @property
    def products(self) -> dict[str, Product]:
        """The five by name."""
        return {"qkv": self.qkv, "out": self.out, "gate": self.gate, "up": self.up, "down": self.down}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """Of layers: heads (A), groups (G), width (D), the norms' epsilon, the factor of scores, and the states' dtype."""

    heads: int
    groups: int
    width: int
    eps: float
    scaling: float
    dtype: torch.dtype


class NativeLayers:
    """Layers whose products are laid out for the kernels; everything between weights and states is float32.

    Args:
        library: The kernels.
        layers: Their parts.
        dimensions: Their sizes.
        masks: Which of a call's masks each attends by.
        last_norm: ``[H]`` of what follows the last layer, if it is wanted.

    Attributes:
        most_rows: Of one call.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        layers: Sequence[LayerParts],
        dimensions: Dimensions,
        *,
        masks: Sequence[int],
        last_norm: Tensor | None = None,
    ) -> None:
        self._library = library
        self.most_rows = native.most_rows(dimensions.dtype)
        self._alive: list[Tensor] = []  # what the structures point to
        self._structs = (_Layer * len(layers))()
        for struct, layer, mask in zip(self._structs, layers, masks, strict=True):
            struct.norm, struct.mlp_norm = self._pointer(layer.norm), self._pointer(layer.mlp_norm)
            if layer.head_norms is not None:
                struct.query_norm, struct.key_norm = (self._pointer(norm) for norm in layer.head_norms)
            for name, product in layer.products.items():
                assert product.packed is not None
                assert product.packed.panels is not None
                setattr(struct, name, product.packed.panels.struct)
            struct.mask, struct.keep = mask, -1
        self._model = _Model(
            layers=self._structs,
            last_norm=self._pointer(last_norm),
            num_layers=len(layers),
            num_masks=max(masks) + 1,
            hidden=self._structs[0].gate.inputs,
            heads=dimensions.heads,
            groups=dimensions.groups,
            width=dimensions.width,
            inner=self._structs[0].gate.outputs,
            eps=dimensions.eps,
            scaling=dimensions.scaling,
            is_bf16=int(dimensions.dtype is torch.bfloat16),
        )
        self._call = _Call()
        self._alone = SequenceRows()
        self._addresses = ctypes.addressof(self._model), ctypes.addressof(self._call)
        self._kept: tuple[int, ...] = ()
        self._work = torch.empty(0)

    def takes(self, count: int) -> bool:
        """Whether so many rows are run here."""
        return 0 < count <= self.most_rows

    def run(
        self,
        residual: Tensor,
        turns: tuple[Tensor, Tensor],
        masks: Sequence[Tensor | None],
        cache: tuple[Tensor, Tensor],
        sequences: int | Tensor,
        *,
        kept: dict[int, Tensor] | None = None,
        entered: Tensor | None = None,
    ) -> Tensor:
        """Return the ``[n, H]`` last states, normed if there is a last norm; keys and values are written.

        Args:
            residual: ``[n, H]`` what enters the first layer.
            turns: ``[n, D]`` float32 cosines and sines of the rotary embedding.
            masks: Additive ``[..., n or more, K]`` of the states' dtype, 0 where a key is seen; None: each row sees all
                keys before its own, and that.
            cache: Keys and values ``[..., G, C, D]``, of all layers where there are several.
            sequences: Rows of the cache that are in use, new ones come behind them; or of several sequences, whose
                keys lie in the same tensors, what ``sequence_rows`` returns, on the host.
            kept: Its keys are layers; the states ``[1, n, H]`` that enter them are put there.
            entered: ``[n, W]`` what enters the attention of a layer that has no norm.
        """
        call, count = self._call, len(residual)
        residual = residual.contiguous()
        cos, sin = turns[0].contiguous(), turns[1].contiguous()
        for index, mask in enumerate(masks):
            call.masks[index] = None if mask is None else mask.data_ptr()
            call.mask_strides[index] = 0 if mask is None else mask.stride(-2)
        self._keep(kept or {})
        outputs = residual.new_empty(len(self._kept) + 1, *residual.shape)
        for place, layer in enumerate(self._kept):
            assert kept is not None
            kept[layer] = outputs[place : place + 1]
            call.kept[place] = outputs[place].data_ptr()
        entered = None if entered is None else entered.contiguous()
        call.embedded, call.entered = residual.data_ptr(), None if entered is None else entered.data_ptr()
        last = outputs[-1].data_ptr()
        call.out, call.last = (None, last) if self._model.last_norm else (last, None)
        call.cos, call.sin = cos.data_ptr(), sin.data_ptr()
        call.keys, call.values = (part.data_ptr() for part in cache)
        call.layer_stride = cache[0].stride(0)
        if isinstance(sequences, int):
            alone = self._alone
            alone.count, alone.length, alone.head_stride = count, sequences, cache[0].stride(-3)
            call.sequences, call.num_sequences = ctypes.addressof(alone), 1
        else:
            sequences = sequences.contiguous()
            call.sequences, call.num_sequences = sequences.data_ptr(), len(sequences)
        call.rows, call.threads = count, torch.get_num_threads()
        size = self._library.workspace(*self._addresses)
        if len(self._work) < size:
            self._work = torch.empty(2 * size)
        call.work = self._work.data_ptr()
        self._library.step(*self._addresses)
        return outputs[-1]

    def _keep(self, wanted: dict[int, Tensor]) -> None:
        """Let what enters these layers be written out from now on."""
        layers = tuple(sorted(wanted))
        if layers != self._kept:
            for struct in self._structs:
                struct.keep = -1
            for place, layer in enumerate(layers):
                self._structs[layer].keep = place
            self._kept = layers

    def _pointer(self, norm: Tensor | None) -> int | None:
        if norm is None:
            return None
        self._alive.append(norm.detach().float().contiguous())
        return self._alive[-1].data_ptr()


def make_native(
    layers: Sequence[LayerParts],
    dimensions: Dimensions,
    *,
    masks: Sequence[int] | None = None,
    last_norm: Tensor | None = None,
) -> NativeLayers | None:
    """Return ``NativeLayers`` of these arguments; None where kernels, dtype or widths rule them out."""
    masks = [0] * len(layers) if masks is None else masks
    packed = [product.packed for layer in layers for product in layer.products.values()]
    fits = dimensions.width % _LARGEST_VECTOR == 0 and max(masks) < _MOST_MASKS
    library = native.library() if native.most_rows(dimensions.dtype) else None
    if library is None or not fits or any(one is None or one.panels is None for one in packed):
        return None
    return NativeLayers(library, layers, dimensions, masks=masks, last_norm=last_norm)
