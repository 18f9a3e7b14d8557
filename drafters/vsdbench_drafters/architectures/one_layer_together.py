"""Drafters of one layer that draft for several sequences at once.

What is small for one sequence is small for each of many: eight trees grown one after the other read the layer's weights
eight times. Here all trees grow level by level in step, the rows of a level go through the products as one matrix, and
only attention is computed sequence by sequence, each over its own cache.

Shape legend: B drafters, n rows of all of them, H width, Vd draft vocabulary, W width of the attention's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vsdbench.decoding.growing import Level, grow_together
from vsdbench.decoding.tree import growth
from vsdbench.models.image_prompt import ImagePrompt
from vsdbench_drafters.architectures.one_layer_drafter import Growth

if TYPE_CHECKING:
    from vsdbench.decoding.interfaces import Request, TokenTree
    from vsdbench_drafters.architectures.layer_rows import LayerRows
    from vsdbench_drafters.architectures.one_layer_drafter import CachedLayer, OneLayerDrafter


@torch.inference_mode()
def propose_together(drafters: Sequence[OneLayerDrafter], requests: Sequence[Request]) -> list[TokenTree]:
    """Return the tree that each drafter would propose by itself.

    Args:
        drafters: Forks of one drafter.
        requests: One each. Where one has images all draft by themselves: what a layer remembers of an image is its own.
    """
    if any(isinstance(request.state.prompt, ImagePrompt) or request.shape.budget < 1 for request in requests):
        return [
            drafter.propose(request.state, request.shape, temperature=request.temperature, generator=request.generator)
            for drafter, request in zip(drafters, requests, strict=True)
        ]
    layers = [drafter.layer for drafter in drafters]
    features, tokens = zip(*(drafter.take_pending() for drafter in drafters), strict=True)
    hidden = torch.split(layers[0].project(torch.cat(features)), [len(part) for part in tokens])
    committed = [drafter.committed_rows(*part) for drafter, *part in zip(drafters, hidden, tokens, strict=True)]
    newest = run_together(layers, committed)
    roots = torch.stack([output[-1] for output in newest])
    for drafter, root, log_probs in zip(drafters, roots, layers[0].log_probs(roots), strict=True):
        drafter.learn_root(root[None], log_probs)
    growths = []
    for drafter, request in zip(drafters, requests, strict=True):
        drafter.reserve(request.shape)
        growths.append(Growth(drafter))

    def score(levels: dict[int, Level]) -> Sequence[Tensor]:
        rows = [growths[index].rows(*level) for index, level in levels.items()]
        outputs = run_together([layers[index] for index in levels], rows)
        for index, output in zip(levels, outputs, strict=True):
            growths[index].learn(output)
        return torch.split(layers[0].log_probs(torch.cat(outputs)), [len(output) for output in outputs])

    growing = [
        growth(one, request.shape, state=request.state, temperature=request.temperature, generator=request.generator)
        for one, request in zip(growths, requests, strict=True)
    ]
    return grow_together(growing, score)


def run_together(layers: Sequence[CachedLayer], rows: Sequence[LayerRows]) -> tuple[Tensor, ...]:
    """Return the ``[n_i, H]`` un-normed outputs that ``forward`` of each layer gives for its rows.

    Args:
        layers: Forks of one layer.
        rows: One each.
    """
    first = layers[0]
    counts = [len(part.tokens) for part in rows]
    x, residual = first.mix(
        first.embed(torch.cat([part.tokens for part in rows])), torch.cat([part.hidden for part in rows])
    )
    turns = [
        torch.cat(
            [
                getattr(layer, name)[part.positions].expand(count, -1)
                for layer, part, count in zip(layers, rows, counts, strict=True)
            ]
        )
        for name in ("cos", "sin")
    ]
    heads = (torch.split(part, counts) for part in first.heads(x, *turns))
    attended = [
        layer.attend(*parts, part.row, part.hide) for layer, part, *parts in zip(layers, rows, *heads, strict=True)
    ]
    return torch.split(first.finish(torch.cat(attended), residual), counts)
