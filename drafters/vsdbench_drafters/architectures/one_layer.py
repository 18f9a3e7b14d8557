"""What the drafters of one transformer layer share: dimensions, the layer, and how it is unrolled in training.

Slot t has the target's features of token t, projected to H, and the embedding of token t + 1. EAGLE-3 and EAGLE-1/2
differ in the projection and in how both are mixed into the layer's input; attention, recurrence and checkpoints are
the same. The decode-time counterpart is ``one_layer_drafter``.

Shapes: N packed tokens, R loss rows, H width, V target, Vd draft vocabulary, A heads, G key-value heads, D head width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsdbench.config import Config, parse
from vsdbench.errors import ConfigError
from vsdbench.models.device import send_numbers
from vsdbench.models.side_by_side import Keys, Rows
from vsdbench_drafters.architectures.checkpoints import write_tensors
from vsdbench_drafters.architectures.layers import RMSNorm, apply_rotary, rotary
from vsdbench_drafters.architectures.one_layer_drafter import CachedLayer, OneLayerDrafter
from vsdbench_drafters.objectives.base import DraftBatch, DraftModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vsdbench.models.target import Target

FIRST_SHARE = 0.3
"""Share of what the target last thought that a fresh drafter starts with: the guess is confident and one token late."""


class LayerConfig(Config):
    """Dimensions of one drafter, named as in a Llama ``config.json``.

    Attributes:
        vocab_size: V. ``draft_vocab_size``: Vd.
        rope_theta: Base of the rotary embedding, of the drafter's own (10000 where a checkpoint does not say).
    """

    label: ClassVar[str]
    """What a checkpoint is called in messages."""
    described_as: ClassVar[dict[str, Any]]
    """Keys of ``config.json`` that say the same of every checkpoint of this kind."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @classmethod
    def for_target(cls, target: Target, draft_vocab_size: int) -> Self:
        """Return a drafter layer with the dimensions of the target's own layers."""
        config = target.config
        heads = int(config.num_attention_heads)
        rope = getattr(config, "rope_parameters", None) or {}
        known = {
            "hidden_size": target.hidden_size,
            "target_hidden_size": target.hidden_size,
            "intermediate_size": int(config.intermediate_size),
            "num_attention_heads": heads,
            "num_key_value_heads": int(getattr(config, "num_key_value_heads", None) or heads),
            "head_dim": int(getattr(config, "head_dim", None) or target.hidden_size // heads),
            "vocab_size": target.vocab_size,
            "draft_vocab_size": min(draft_vocab_size, target.vocab_size),
            "rms_norm_eps": float(getattr(config, "rms_norm_eps", 1e-5)),
            "rope_theta": float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0),
        }
        return cls(**{key: value for key, value in known.items() if key in cls.model_fields})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a checkpoint's ``config.json``.

        Raises:
            ConfigError: No such file, not JSON, a missing dimension, or a rope scaling that is not implemented.
        """
        path = folder / "config.json"
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"'{folder}' is no {cls.label} checkpoint: its config.json is missing or not JSON ({error})."
            ) from error
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{path}: rope type '{kind}' is not supported in a drafter; only the plain one is.")
        heads = int(raw.get("num_attention_heads") or 1)
        derived = {
            "num_key_value_heads": heads,
            "head_dim": int(raw.get("hidden_size") or 0) // heads,
            "target_hidden_size": raw.get("hidden_size"),
            "draft_vocab_size": raw.get("vocab_size"),
        }
        if rope.get("rope_theta") is not None:
            derived["rope_theta"] = rope["rope_theta"]
        said = derived | {key: value for key, value in raw.items() if value is not None}
        return parse(cls, {key: value for key, value in said.items() if key in cls.model_fields}, where=str(path))

    def to_json(self) -> dict[str, Any]:
        """Return the flat Llama config that a checkpoint carries."""
        fixed = {"model_type": "llama", "num_hidden_layers": 1, "hidden_act": "silu", "tie_word_embeddings": False}
        return {**fixed, **self.described_as, **self.model_dump()}


class _Attention(nn.Module):
    def __init__(self, config: LayerConfig, width: int, *, bias: bool) -> None:
        super().__init__()
        wide = config.num_attention_heads * config.head_dim
        narrow = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, wide, bias=bias)
        self.k_proj = nn.Linear(width, narrow, bias=bias)
        self.v_proj = nn.Linear(width, narrow, bias=bias)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=False)


class _Mlp(nn.Module):
    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """SwiGLU."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DraftLayer(nn.Module):
    """A Llama layer.

    Args:
        config: Its dimensions.
        width: Of the attention's input.
        bias: Queries, keys and values have one.
        norms: Names of further norms of width H, for what is mixed into the input.
    """

    def __init__(self, config: LayerConfig, width: int, *, bias: bool = False, norms: Sequence[str] = ()) -> None:
        super().__init__()
        for name in norms:
            self.add_module(name, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config, width, bias=bias)
        self.mlp = _Mlp(config)


@dataclass(slots=True)
class LayerContext:
    """What the training-time test remembers of a batch: keys and values of step 0, then the diagonal of each step.

    Attributes:
        batch: The batch.
        hidden: ``[R, H]`` outputs that recur in the next step (``[N, H]`` projected features before step 0).
        prefix: Keys and values of step 0 at every slot that has one, the prompt's included.
        slots: ``[R]`` int64, flat slot index of every row.
        positions: ``[R]`` int64, the same relative to the row's sequence.
        rows: Which rows are whose.
        hidden_keys: ``[B, r, L]`` bool: keys of step 0 behind the row's own slot.
        diagonal_keys: ``[R, G, D]`` of every later step. ``diagonal_values``: likewise.
        picture: ``[R, H]`` what every row holds of the last image before it; None: nothing.
    """

    batch: DraftBatch
    hidden: Tensor
    prefix: Keys
    slots: Tensor
    positions: Tensor
    rows: Rows
    hidden_keys: Tensor
    started: bool = False
    diagonal_keys: list[Tensor] = field(default_factory=list)
    diagonal_values: list[Tensor] = field(default_factory=list)
    picture: Tensor | None = None

    def select(self, rows: Tensor) -> LayerContext:
        """Return a context of these rows, ``[n]`` int64, repeats allowed, sequence by sequence in the batch's order.

        Both contexts go on independently; where paths branch, the rows of a level name their parents' rows.
        """
        chosen, positions = Rows.of(self.rows.owners[rows], len(self.prefix.keys)), self.positions[rows]
        return LayerContext(
            self.batch,
            self.hidden[rows] if self.started else self.hidden,
            self.prefix,
            self.slots[rows],
            positions,
            chosen,
            _behind(self.prefix, chosen, positions),
            self.started,
            [key[rows] for key in self.diagonal_keys],
            [value[rows] for value in self.diagonal_values],
            None if self.picture is None else self.picture[rows],
        )


@dataclass(frozen=True, slots=True)
class Entered:
    """What enters the layer at step 0 (see ``OneLayerModel.enter``).

    Attributes:
        x: ``[K, W]`` input of the attention, slot by slot.
        slots: ``[K]`` int64, the flat indices of the slots that have a key, in increasing order; None: all N have.
        picture: ``[N, H]`` what every slot holds of the last image before it; None: nothing.
    """

    x: Tensor
    slots: Tensor | None = None
    picture: Tensor | None = None


def _behind(prefix: Keys, rows: Rows, positions: Tensor) -> Tensor:
    """Return ``[B, r, L]`` bool: which keys lie behind the ``[R]`` positions of rows; none where there is no row."""
    last = rows.spread(positions + 1) - 1  # -1 where there is no row
    return (prefix.positions[:, None] > last[..., None]) & (last >= 0)[..., None]


class OneLayerModel(DraftModel):
    """Base of the trainable drafters of one layer.

    A subclass has ``fc``, a layer, and says by ``project`` and ``mix`` what enters the layer; ``layer_class`` is the
    same at decode time.

    Args:
        config: Dimensions.
        embeddings: ``[V, H]`` token embeddings: frozen, never saved.
        draft_ids: ``[Vd]`` int64, the target ids of the draft vocabulary in increasing order.
    """

    name: ClassVar[str]
    layer_class: ClassVar[type[CachedLayer]]
    fc: nn.Linear

    def __init__(self, config: LayerConfig, embeddings: Tensor, draft_ids: Tensor) -> None:
        super().__init__(draft_ids, config.vocab_size)
        self.config = config
        self.embeddings: Tensor
        self.register_buffer("embeddings", embeddings.detach(), persistent=False)

    @property
    def layer(self) -> DraftLayer:
        """The layer."""
        raise NotImplementedError

    def project(self, features: Tensor) -> Tensor:
        """Return ``[n, H]``, what recurs as the output does, made from ``[n, 4H_target]`` features."""
        raise NotImplementedError

    def mix(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention's input and the residual ``[n, H]`` of n tokens.

        Args:
            embedded: ``[n, H]`` embeddings of the following tokens.
            hidden: ``[n, H]`` projected features, or outputs of the step before.
        """
        raise NotImplementedError

    def enter(self, batch: DraftBatch, embedded: Tensor, hidden: Tensor) -> Entered:  # noqa: ARG002 - for subclasses
        """Return what enters the layer at the slots of a batch; a drafter that treats images apart says here how.

        Args:
            batch: The batch; ``batch.shows_image`` says at which slots the following token is part of an image.
            embedded: ``[N, H]`` embeddings of the following tokens, an image's as the target's first layer sees them.
            hidden: ``[N, H]`` projected features.
        """
        return Entered(self.mix(embedded, hidden)[0])

    def recall(self, hidden: Tensor, picture: Tensor | None) -> Tensor:  # noqa: ARG002 - for subclasses
        """Return ``[n, H]`` hidden states with what the rows hold of an image added (``Entered.picture``)."""
        return hidden

    def randomise(self, seed: int) -> None:
        """Draw all matrices."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    # Output projections enter the residual stream and start smaller, as in GPT-2.
                    scale = 0.5**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02 * scale, generator=generator))

    # ---- training-time test ----

    def start(self, batch: DraftBatch) -> LayerContext:
        """Return the context of a batch's rows before any step, keys and values of step 0 included."""
        hidden = self.project(batch.features.to(self.fc.weight.dtype))
        entered = self.enter(batch, self._following(batch, hidden), hidden)
        keys = self._prefix(batch, entered)
        rows = Rows.packed([span.num_rows for span in batch.spans], hidden.device)
        positions = batch.slots - send_numbers([span.start for span in batch.spans], hidden.device)[rows.owners]
        picture = None if entered.picture is None else entered.picture[batch.slots]
        behind = _behind(keys, rows, positions)
        return LayerContext(batch, hidden, keys, batch.slots, positions, rows, behind, picture=picture)

    def advance(self, context: LayerContext, tokens: Tensor) -> Tensor:
        """Run one step with ``[R]`` input tokens; return ``[R, H]`` un-normed outputs, which recur in the next step."""
        layer, first = self.layer, not context.started
        hidden = context.hidden[context.slots] if first else context.hidden
        x, residual = self.mix(self._embed(tokens, hidden), self.recall(hidden, context.picture))
        positions = context.positions + len(context.diagonal_keys) + (0 if first else 1)
        queries = self._rotate(layer.self_attn.q_proj(x), positions)
        if not first:
            context.diagonal_keys.append(self._rotate(layer.self_attn.k_proj(x), positions))
            context.diagonal_values.append(layer.self_attn.v_proj(x).view(len(x), -1, self.config.head_dim))
        hidden = residual + layer.self_attn.o_proj(self._attend(context, queries))
        context.hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        context.started = True
        return context.hidden

    def _embed(self, tokens: Tensor, like: Tensor) -> Tensor:
        return F.embedding(tokens, self.embeddings).to(like.dtype)

    def _following(self, batch: DraftBatch, hidden: Tensor) -> Tensor:
        """Return ``[N, H]``: at every slot, the embedding of the token that follows, or what stands for it."""
        # The last slot of a sequence is wrong here, and never attended to.
        if batch.image_mask is None or batch.image_embeddings is None:
            return self._embed(torch.roll(batch.tokens, -1), hidden)
        own = self._embed(batch.tokens, hidden)
        return torch.roll(own.masked_scatter(batch.image_mask[:, None], batch.image_embeddings.to(own.dtype)), -1, 0)

    def _prefix(self, batch: DraftBatch, entered: Entered) -> Keys:
        """Return keys and values of step 0 at every slot that has one."""
        layer, x = self.layer, entered.x
        positions = torch.zeros(len(batch.tokens), dtype=torch.int64, device=x.device)
        for span in batch.spans:
            positions[span.start : span.start + span.length] = torch.arange(span.length, device=x.device)
        ends = [(span.start, span.start + span.length - 2) for span in batch.spans]
        if entered.slots is not None:
            positions = positions[entered.slots]
            ends = torch.searchsorted(entered.slots, send_numbers(ends, x.device)).tolist()
        keys = self._rotate(layer.self_attn.k_proj(x), positions)
        values = layer.self_attn.v_proj(x).view(len(x), -1, self.config.head_dim)
        return Keys.of(keys, values, positions, [(first, stop) for first, stop in ends])

    def _rotate(self, flat: Tensor, positions: Tensor) -> Tensor:
        """Return ``[n, heads, D]`` with the rotary embedding of ``positions`` applied."""
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta, flat.dtype)
        return apply_rotary(flat.view(len(flat), -1, self.config.head_dim), cos[:, None], sin[:, None])

    def _attend(self, context: LayerContext, queries: Tensor) -> Tensor:
        """Return ``[R, A * D]``: attention to step 0's keys up to the own slot, and to the own later steps."""
        groups, width = self.config.num_key_value_heads, self.config.head_dim
        keys, values, rows = context.prefix.keys, context.prefix.values, context.rows
        (count, most), length = rows.shape, keys.shape[2]
        grouped = queries.view(len(queries), groups, -1, width) * width**-0.5  # [R, G, A/G, D]
        query = rows.spread(grouped).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, G, A/G * r, D]
        scores = (query @ keys.transpose(2, 3)).view(count, groups, -1, most, length)
        scores = scores.masked_fill(context.hidden_keys[:, None, None], -torch.inf)
        if context.diagonal_keys:
            own = torch.stack([(grouped * key[:, :, None]).sum(-1) for key in context.diagonal_keys], dim=-1)
            scores = torch.cat([scores, rows.spread(own).permute(0, 2, 3, 1, 4)], dim=-1)
        weights = torch.softmax(scores, dim=-1)  # [B, G, A/G, r, L + steps]
        mixed = (weights[..., :length].to(values.dtype).flatten(2, 3) @ values).view(count, groups, -1, most, width)
        found = rows.gather(mixed.permute(0, 3, 1, 2, 4))  # [R, G, A/G, D]
        if context.diagonal_keys:
            shares = rows.gather(weights[..., length:].permute(0, 3, 1, 2, 4))  # [R, G, A/G, steps]
            for step, value in enumerate(context.diagonal_values):
                found = found + shares[..., step, None] * value[:, :, None]
        return found.flatten(1)

    def drafter(self, dtype: torch.dtype) -> OneLayerDrafter:
        """Return the decode-time drafter, with a copy of the weights as they are now."""
        return OneLayerDrafter(self.name, self.layer_class(self, dtype), self)

    # ---- checkpoints ----

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` in the public format."""
        write_tensors(folder, self.state_dict(), self.config.to_json())
