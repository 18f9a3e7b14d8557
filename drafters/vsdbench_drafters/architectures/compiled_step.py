"""A draft step as one graph of ``torch.compile``: embeddings, layer and head of a level, with no Python between them.

The target's compiled layers are the pattern (``models.compiled``): a graph for each number of rows, fewer are filled up
to the next; over views of the cache on a CPU, over all of it on CUDA, where it is replayed as a CUDA graph. The eager
layer stays the reference and runs where both do not say the same.

Shape legend: n rows of one forward, N rows of the graph, C cache rows, H width, Vd draft vocabulary, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsdbench.models.compiled import NOT_THE_SAME
from vsdbench.models.fused import median_row_error
from vsdbench.models.packed import tensors_among
from vsdbench_drafters.architectures.layer_rows import LayerRows, later

if TYPE_CHECKING:
    from vsdbench.models.compiled import Graphs
    from vsdbench_drafters.architectures.one_layer_drafter import CachedLayer

_PROBE_ROWS = 5


class CompiledStep:
    """Runs rows of a layer, and its head on them, as one graph.

    Args:
        layer: Its weights; its forks' caches are given with each call.
        graphs: Compiles.

    Attributes:
        sizes: Numbers of rows that there is a graph for.
    """

    def __init__(self, layer: CachedLayer, graphs: Graphs) -> None:
        self._layer = layer
        self.graphs = graphs
        self.sizes: set[int] = set()
        graphs.keep_in_place(tensors_among(vars(layer).values()))
        self._step = graphs.compiled(self._run)

    def size(self, rows: LayerRows, capacity: int) -> int | None:
        """Return the rows of the graph that runs these, if there is one whose rows fit into the cache."""
        fitting = (size for size in self.sizes if len(rows.tokens) <= size <= capacity - rows.row)
        return min(fitting, default=None)

    def __call__(self, cached: CachedLayer, rows: LayerRows, size: int) -> tuple[Tensor, Tensor]:
        """Return ``[n, H]`` un-normed outputs and ``[n, Vd]`` log-probabilities, n at most ``size``.

        Args:
            cached: The layer or a fork of it: its cache is read and written.
            rows: The rows.
            size: N.
        """
        count, graphs = len(rows.tokens), self.graphs
        turns = (table[rows.positions].expand(count, -1) for table in (cached.cos, cached.sin))
        arguments = [_filled(part, size) for part in (rows.hidden, rows.tokens, *turns)]
        graphs.keep_in_place((cached.keys, cached.values))
        places = torch.arange(rows.row, rows.row + size, device=rows.tokens.device) if graphs.static else None
        mask = self._mask(rows, size, cached.capacity if graphs.static else rows.row + size)
        graphs.let_vary((mask, cached.keys, cached.values), 1)
        output, log_probs = graphs.run(self._step, *arguments, mask, cached.keys, cached.values, places)
        if graphs.static:  # the next run writes over them
            return output[:count].clone(), log_probs[:count].clone()
        return output[:count], log_probs[:count]

    def _mask(self, rows: LayerRows, size: int, width: int) -> Tensor:
        """Return the additive mask ``[N, width]``; what fills up sees all, so that no row sees nothing."""
        count = len(rows.tokens)
        stop = rows.row + count
        mask = torch.zeros(size, width, dtype=self._layer.dtype, device=rows.tokens.device)
        mask[:count, stop:] = -torch.inf
        if rows.hide is not None:
            mask[:count, stop - rows.hide.shape[1] : stop].masked_fill_(rows.hide, -torch.inf)
        return mask

    def _run(  # noqa: PLR0917 - the compiler knows them by place
        self,
        hidden: Tensor,
        tokens: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        keys: Tensor,
        values: Tensor,
        places: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Attend to views of the cache that end with the new rows, or to all of it, whose rows ``places`` are written.

        How many keys there are the mask says, so where all rows are seen no shape depends on the context.
        """
        layer, count = self._layer, len(tokens)
        x, residual = layer.mix(layer.embed(tokens), hidden)
        queries, new_keys, new_values = layer.heads(x, cos, sin)
        if places is None:
            stop = mask.shape[-1]
            keys, values = keys[:, :stop], values[:, :stop]
            keys[:, stop - count :] = new_keys.transpose(0, 1)
            values[:, stop - count :] = new_values.transpose(0, 1)
        else:
            keys.index_copy_(1, places, new_keys.transpose(0, 1))
            values.index_copy_(1, places, new_values.transpose(0, 1))
        masks = mask.repeat(queries.shape[1] // len(keys), 1)  # of the query heads of a group
        output = layer.finish(layer.weighted(queries, keys, values, masks), residual)
        return output, layer.log_probs(output)


def _filled(rows: Tensor, size: int) -> Tensor:
    """Return a copy of ``[n, ...]`` rows with zeros behind, ``[N, ...]``: a graph is of one layout of its arguments."""
    filled = rows.new_zeros(size, *rows.shape[1:])
    filled[: len(rows)] = rows
    return filled


@torch.inference_mode()  # as steps run, or else they would be compiled again
def compile_step(layer: CachedLayer, sizes: Collection[int], graphs: Graphs) -> str | None:
    """Let steps of a layer run compiled, if they then say what it says; return why not, if not.

    Args:
        layer: The layer.
        sizes: Numbers of rows to compile for.
        graphs: Compiles.
    """
    compiled = CompiledStep(layer, graphs)
    generator = torch.Generator().manual_seed(0)
    for size in sorted(sizes):
        twin = layer.plain_fork()
        row = _PROBE_ROWS + (_PROBE_ROWS + size + 1) % 2  # the number of keys is odd, for sizes that seem equal stay so
        twin.reserve(graphs.capacity(row + 2 * size + 32 | 1))
        hidden = torch.randn(row + size, layer.config.hidden_size, generator=generator).to(layer.device, layer.dtype)
        tokens = torch.arange(row + size, device=layer.device) % layer.config.vocab_size
        twin.forward(hidden[:row], tokens[:row], slice(0, row), 0, later(row, layer.device))
        hide = later(size, layer.device) if size > 1 else None
        rows = LayerRows(hidden[row:], tokens[row:], slice(row, row + size), row, hide)
        expected = twin.step(rows)
        with graphs.learn():
            found = compiled(twin, rows, size)
        tolerance = 1e-3 if layer.dtype is torch.float32 else 0.1
        if not all(
            median_row_error(ours.float(), own.float()) <= tolerance for ours, own in zip(found, expected, strict=True)
        ):
            return NOT_THE_SAME
        compiled.sizes.add(size)
    layer.compiled = compiled
    return None


def sizes_for(most_rows: int) -> list[int]:
    """Return the numbers of rows to compile for, so that filling up at most doubles them.

    >>> sizes_for(10)
    [1, 2, 4, 8, 16]
    """
    return [2**power for power in range(1 + math.ceil(math.log2(most_rows)))]
