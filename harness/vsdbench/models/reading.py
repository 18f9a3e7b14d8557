"""Reading whole sequences, several at once: what the target says of every token, with images or without.

Where the target has fused layers the sequences stand one behind the other, without padding, and go through the linear
layers as one matrix; in attention each sees itself alone. A model that reads images first makes its embeddings by its
own code, all of the model but the language model, and where these are all that the language model would get, the
fused layers read them like those of text. Everything else is read by the model's own layers.

Shape legend: L tokens of a sequence, T of all of them, H hidden size, A query heads, G key-value heads, W head width,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vsdbench.models.branching import can_branch
from vsdbench.models.device import send, send_numbers
from vsdbench.models.image_prefill import Reading, embed_images, read_images
from vsdbench.models.image_prompt import ImagePrompt
from vsdbench.models.side_by_side import Rows

if TYPE_CHECKING:
    from vsdbench.models.kv_cache import PreallocatedCache
    from vsdbench.models.target import Target

PACK_TOKENS = 1024  # tokens that are read together, unless one sequence alone has more


@dataclass(frozen=True, slots=True)
class SequenceRead:
    """What the target says of a sequence.

    Attributes:
        features: ``[L, 4H]`` (``Target.features``).
        layers: ``[G, L, W]`` keys and values of every layer, rotary embedding applied; none: not wanted.
        image_mask: ``[L]`` bool, where an image stands; None: there is none.
        embeddings: ``[L, H]`` what entered the first layer of a sequence with images; None of one without.
        position_offset: What is added to the number of a token behind the sequence to get its position.
    """

    features: Tensor
    layers: Sequence[tuple[Tensor, Tensor]] = ()
    image_mask: Tensor | None = None
    embeddings: Tensor | None = None
    position_offset: int = 0

    @property
    def keys(self) -> Tensor:
        """``[layers, 2, G, L, W]`` keys and values, of a model whose layers are all alike."""
        return torch.stack([torch.stack(pair) for pair in self.layers])


@torch.inference_mode()
def read_sequences(target: Target, sequences: Sequence[Sequence[int]], *, keys: bool) -> list[SequenceRead]:
    """Return what the target says of each sequence: token ids, or an ``ImagePrompt``.

    Raises:
        ConfigError: The model cannot read the images.
    """
    found: dict[int, SequenceRead] = {}
    if reads_packed(target):
        for pack in packs([len(sequence) for sequence in sequences]):
            embedded = {i: part for i in pack if (part := _embed(target, sequences[i])) is not None}
            read = _read_packed(target, [sequences[i] for i in embedded], list(embedded.values()), keys=keys)
            found |= zip(embedded, read, strict=True)
    texts = [i for i, one in enumerate(sequences) if i not in found and not isinstance(one, ImagePrompt)]
    if texts:
        found |= zip(texts, _read_padded(target, [sequences[i] for i in texts], keys=keys), strict=True)
    for index, sequence in enumerate(sequences):
        if index not in found:
            found[index] = _read_alone(target, sequence, keys=keys)
    return [found[index] for index in range(len(sequences))]


@torch.inference_mode()
def prefill_images(target: Target, prompt: ImagePrompt, cache: PreallocatedCache) -> tuple[Reading, Tensor]:
    """Read the first R tokens of a prompt and its images into an empty cache, whose length stays 0.

    Returns:
        What became of them, and their ``[R, 4H]`` features.

    Raises:
        ConfigError: As ``image_prefill.read_images``.
    """
    embedded = embed_images(target, prompt) if reads_packed(target) else None
    if embedded is None:
        return read_images(target, prompt, cache), target.features()
    read = _read_packed(target, [prompt.tokens[: prompt.num_read]], [embedded], keys=True)[0]
    for layer, (layer_keys, layer_values) in zip(cache.layers, read.layers, strict=True):
        layer.update(layer_keys[None], layer_values[None])
    logits = target.model.get_output_embeddings()(read.features[-1:, -target.hidden_size :])
    return Reading(logits, embedded, 0), read.features


def reads_packed(target: Target) -> bool:
    """Whether a target reads several sequences as one matrix: by fused layers, over all tokens."""
    return target.fused_layers is not None and can_branch(target)


def packs(lengths: Sequence[int], most: int | None = None) -> Iterator[list[int]]:
    """Yield the indices of sequences that are not empty, in order, so many tokens together (or one longer sequence).

    Args:
        lengths: Of the sequences.
        most: Tokens of a pack; None: ``PACK_TOKENS``.

    >>> list(packs([600, 400, 0, 100, 2000]))
    [[0, 1], [3], [4]]
    """
    most = PACK_TOKENS if most is None else most
    pack, tokens = list[int](), 0
    for index, length in enumerate(lengths):
        if pack and tokens + length > most:
            yield pack
            pack, tokens = [], 0
        if length:
            pack.append(index)
        tokens += length
    if pack:
        yield pack


def _embed(target: Target, sequence: Sequence[int]) -> Tensor | None:
    """Return ``[L, H]``, what enters the first layer; None where the language model would be given more."""
    if not isinstance(sequence, ImagePrompt):
        words: Tensor = target.embed_tokens(send_numbers([int(token) for token in sequence], target.device))
        return words
    embedded = embed_images(target, sequence)
    if embedded is None or len(sequence) == len(embedded):
        return embedded
    behind = send_numbers(sequence.tokens[len(embedded) :], target.device)
    return torch.cat([embedded, target.embed_tokens(behind)])


def _read_packed(
    target: Target, sequences: Sequence[Sequence[int]], embedded: Sequence[Tensor], *, keys: bool
) -> list[SequenceRead]:
    """Return what the fused layers say of sequences, given their ``[L, H]`` embeddings."""
    fused = target.fused_layers
    if fused is None or not sequences:
        return []
    lengths = [len(part) for part in embedded]
    spans = [slice(*ends) for ends in pairwise(accumulate(lengths, initial=0))]
    rows = Rows.packed(lengths, target.device)
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sequences]

    def attend(_layer: int, *parts: Tensor) -> Tensor:
        asked, seen, values = (rows.spread(part).transpose(1, 2) for part in parts)
        for index, length in enumerate(lengths if keys else ()):
            kept[index].append((seen[index, :, :length], values[index, :, :length]))
        # What stands behind a shorter sequence's last row is seen by nothing before it.
        found = F.scaled_dot_product_attention(
            asked, seen, values, is_causal=True, scale=fused.scaling, enable_gqa=asked.shape[1] > seen.shape[1]
        )
        return rows.gather(found.transpose(1, 2)).flatten(1)

    entering: dict[int, Tensor] = dict.fromkeys(target.feature_layers, embedded[0])
    positions = torch.cat([torch.arange(length, device=target.device) for length in lengths])
    last = fused.run(torch.cat(list(embedded)), positions, attend, entering)
    features = torch.cat([*(entering[layer][0] for layer in target.feature_layers), last], dim=-1)
    found = []
    for sequence, span, own, part in zip(sequences, spans, kept, embedded, strict=True):
        images = sequence.image_mask.to(target.device) if isinstance(sequence, ImagePrompt) else None
        found.append(SequenceRead(features[span].clone(), own, images, None if images is None else part))
    return found


def _read_alone(target: Target, sequence: Sequence[int], *, keys: bool) -> SequenceRead:
    """Return what the model's own layers say of one sequence with images."""
    count = len(sequence)
    state = target.prefill(sequence, count)
    layers = [(layer.keys[0, :, :count].clone(), layer.values[0, :, :count].clone()) for layer in state.cache.layers]
    return SequenceRead(
        state.features, layers if keys else (), state.image_mask, state.embeddings, state.position_offset
    )


def _read_padded(target: Target, sequences: Sequence[Sequence[int]], *, keys: bool) -> list[SequenceRead]:
    """Return what the model says of texts, as it was shipped; padded, because every model can do that."""
    longest = max(len(ids) for ids in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)] = torch.tensor([int(token) for token in ids])
    # Padding stands on the right, where no real token can see it, so causal attention needs no mask.
    with target.as_shipped() as model:
        output: Any = model.get_decoder()(input_ids=send(tokens, target.device), use_cache=keys)
    states = torch.cat([*target.entered(), output.last_hidden_state], dim=-1)
    layers = [(layer.keys, layer.values) for layer in output.cache.layers] if keys else []
    found = []
    for row, ids in enumerate(sequences):
        own = [(seen[row, :, : len(ids)], values[row, :, : len(ids)]) for seen, values in layers]
        found.append(SequenceRead(states[row, : len(ids)].clone(), own))
    return found
