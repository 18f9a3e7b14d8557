"""An independent draft model: any smaller model with the target's tokenizer. Nothing is trained.

Source: speculative decoding with a draft model (arXiv 2211.17192, 2302.01318), here with every tree shape. With
``num_layers`` the model is cut after that many layers, so a target can draft for itself (early exit). One that reads
images is shown those of the prompt; to one of text they are placeholders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vsdbench.decoding.interfaces import TargetState, TokenTree, TreeShape
from vsdbench.decoding.structure import Ancestry
from vsdbench.decoding.tree import grow
from vsdbench.errors import ConfigError
from vsdbench.models.device import send_numbers
from vsdbench.models.draft_model import load_draft_model
from vsdbench.models.image_prompt import ImagePrompt
from vsdbench.models.kv_cache import PreallocatedCache
from vsdbench.models.target import Target

_MAX_SCRATCH = 1024
"""Nodes that may be scored while one tree grows."""


class DraftModelDrafter:
    """Drafts with a language model of its own.

    Args:
        model: The draft model, wrapped like a target.
        vocab_size: V of the target; the draft model's extra (padding) logits are dropped.
    """

    name = "draft_model"

    def __init__(self, model: Target, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self._cache: PreallocatedCache | None = None
        self._position_offset = 0

    def fork(self) -> DraftModelDrafter:
        """Return another one with the same model and a cache of its own."""
        return DraftModelDrafter(self.model, self.vocab_size)

    @torch.inference_mode()
    def begin(self, state: TargetState, max_length: int) -> None:
        """Run the draft model over the prompt; the root is left for the first proposal."""
        # Scratch keys of a growing tree stand behind the committed ones: scored levels are at most top_k wide.
        capacity = max_length + _MAX_SCRATCH
        if self._cache is None or self._cache.capacity < capacity:
            self._cache = PreallocatedCache(self.model.num_layers, capacity)
        if isinstance(state.prompt, ImagePrompt) and self.model.reads_images:
            self._position_offset = self.model.prefill(state.prompt, capacity, self._cache).position_offset
            return
        self._position_offset = 0
        self._cache.reset()
        self._read(state.tokens[:-1])

    def commit(self, state: TargetState, num_accepted: int, features: Tensor) -> None:
        """Nothing yet: what was committed is read together with the next root."""

    @torch.inference_mode()
    def propose(
        self, state: TargetState, shape: TreeShape, *, temperature: float, generator: torch.Generator
    ) -> TokenTree:
        """Read what was committed since the last proposal, then grow a tree under the root."""
        assert self._cache is not None
        self._root_logits = self._read(state.tokens[self._cache.length :])
        self._base = self._cache.length
        self._ancestry = Ancestry(self.model.device)
        self._positions = torch.arange(self._base, device=self.model.device)  # of all keys
        tree = grow(self, shape, state=state, temperature=temperature, generator=generator)
        self._cache.length = self._base
        return tree

    def _read(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens to the draft cache and return ``[V]`` logits of what follows them."""
        cache = self._cache
        assert cache is not None
        device = self.model.device
        stop = cache.length + len(tokens)
        positions = torch.arange(cache.length, stop, device=device)
        keys = torch.arange(stop, device=device)
        visible = positions[:, None] >= keys[None, :]
        ids = send_numbers(tokens, device)
        logits = self.model.forward(
            ids, positions, visible, keys, cache, logits_to_keep=1, position_offset=self._position_offset
        )
        cache.length = stop
        return logits[-1].float()

    # ---- LevelScorer ----

    def root(self) -> Tensor:
        """Return ``[V]`` log-probabilities of the root's children."""
        return self._log_probs(self._root_logits)

    def level(self, tokens: Tensor, parent_slots: Tensor, depth: int) -> Tensor:
        """Return ``[M, V]`` log-probabilities of the children of M nodes, whose keys become scratch rows."""
        cache = self._cache
        assert cache is not None
        count, cache.length = len(tokens), len(self._positions)
        # The root stands at base - 1, a node of depth d at base - 1 + d.
        positions = self._positions.new_full((count,), self._base - 1 + depth)
        keys = self._positions = torch.cat([self._positions, positions])
        visible = torch.ones(count, len(keys), dtype=torch.bool, device=keys.device)
        seen = self._ancestry.add(parent_slots)
        if seen is not None:
            visible[:, self._base :] = seen
        logits = self.model.forward(tokens, positions, visible, keys, cache, position_offset=self._position_offset)
        return self._log_probs(logits.float())

    def to_target(self, ids: Tensor) -> Tensor:
        """Draft and target ids are the same."""
        return ids

    def _log_probs(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits[..., : self.vocab_size], dim=-1)


def build(target: Target, *, checkpoint: Path | None, options: dict[str, Any]) -> DraftModelDrafter:
    """Return the drafter for a suite entry.

    Args:
        target: The model to draft for.
        checkpoint: A model folder, or None when ``options`` names the model.
        options: ``model`` (hub id, path or wheel name) and optionally ``num_layers``.

    Raises:
        ConfigError: No model is named, an option is unknown or impossible, or its vocabulary is not the target's.
    """
    unknown = set(options) - {"model", "num_layers"}
    if unknown:
        raise ConfigError(f"draft_model has no option '{min(unknown)}': it takes model and num_layers.")
    layers = options.get("num_layers")
    if layers is not None and type(layers) is not int:
        raise ConfigError(f"draft_model's num_layers is {layers!r}: it must be a whole number of layers.")
    name = str(checkpoint) if checkpoint is not None else options.get("model")
    if not name:
        raise ConfigError("draft_model needs the option 'model': a hub id, a model folder or an embedded model.")
    model = load_draft_model(target, name, num_layers=layers)
    return DraftModelDrafter(model, target.vocab_size)
