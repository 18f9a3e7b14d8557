"""EAGLE-3 (arXiv 2503.01840): one transformer layer that drafts from three of the target's hidden states.

The model for training and its checkpoint format. Tensor names are those of the public checkpoints, so a drafter
trained here loads elsewhere and one trained elsewhere loads here; the decode-time drafter is in ``eagle3_drafter``.

Forward: ``h = fc(features)``; ``x = [input_layernorm(embed(next token)), hidden_norm(h)]`` goes through attention, the
residual is the un-normed ``h``; the un-normed output recurs as the next ``h``; logits are ``lm_head(norm(output))``.

Shape legend: N packed tokens, R rows of the loss, H drafter width, V target vocabulary, Vd draft vocabulary, A heads,
G key-value heads, D head width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsdbench.config import Config, parse
from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.eagle3_files import check_fits, read_tensors, write_tensors
from vsdbench_drafters.architectures.layers import RMSNorm, apply_rotary, rotary
from vsdbench_drafters.objectives.base import DraftBatch, DraftModel

if TYPE_CHECKING:
    from vsdbench.models.target import Target
    from vsdbench_drafters.architectures.eagle3_drafter import Eagle3Drafter


_FIRST_NORM = 0.3  # share of the target's final norm that a fresh drafter starts with


class Eagle3Config(Config):
    """Dimensions of one drafter, named as in a Llama ``config.json``.

    Attributes:
        target_hidden_size: Width of the target's hidden states; ``fc`` takes three of them.
        vocab_size: V. ``draft_vocab_size``: Vd.
        rope_theta: Base of the rotary embedding, of the drafter's own (10000 where a checkpoint does not say).
    """

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @classmethod
    def for_target(cls, target: Target, draft_vocab_size: int) -> Eagle3Config:
        """Return a drafter layer with the dimensions of the target's own layers."""
        config = target.config
        heads = int(config.num_attention_heads)
        rope = getattr(config, "rope_parameters", None) or {}
        return cls(
            hidden_size=target.hidden_size,
            target_hidden_size=target.hidden_size,
            intermediate_size=int(config.intermediate_size),
            num_attention_heads=heads,
            num_key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or target.hidden_size // heads),
            vocab_size=target.vocab_size,
            draft_vocab_size=min(draft_vocab_size, target.vocab_size),
            rms_norm_eps=float(getattr(config, "rms_norm_eps", 1e-5)),
            rope_theta=float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0),
        )

    @classmethod
    def read(cls, folder: Path) -> Eagle3Config:
        """Read a checkpoint's ``config.json``.

        Raises:
            ConfigError: No such file, not JSON, a missing dimension, or a rope scaling that is not implemented.
        """
        path = folder / "config.json"
        try:
            raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"'{folder}' is no EAGLE-3 checkpoint: its config.json is missing or not JSON ({error})."
            ) from error
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{path}: rope type '{kind}' is not supported in a drafter; only the plain one is.")
        known = {key: value for key, value in raw.items() if key in cls.model_fields and value is not None}
        heads = int(raw.get("num_attention_heads") or 1)
        known.setdefault("num_key_value_heads", heads)
        known.setdefault("head_dim", int(raw.get("hidden_size") or 0) // heads)
        known.setdefault("target_hidden_size", raw.get("hidden_size"))
        known.setdefault("draft_vocab_size", raw.get("vocab_size"))
        if rope.get("rope_theta") is not None:
            known.setdefault("rope_theta", rope["rope_theta"])
        return parse(cls, known, where=str(path))

    def to_json(self) -> dict[str, Any]:
        """Return the flat Llama config that a checkpoint carries."""
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            **self.model_dump(),
        }


class _Attention(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        wide = config.num_attention_heads * config.head_dim
        narrow = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=False)


class _Mlp(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """SwiGLU."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _MidLayer(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)


@dataclass(slots=True)
class DraftContext:
    """What the training-time test remembers of a batch: keys and values of step 0, then the diagonal of each step.

    Attributes:
        batch: The batch.
        hidden: ``[R, H]`` outputs that recur in the next step (``[N, H]`` projected features before step 0).
        keys: ``[N, G, D]`` of step 0 at every slot, the prompt's included. ``values``: likewise.
        slots: ``[R]`` int64, flat slot index of every row.
        positions: ``[R]`` int64, the same relative to the row's sequence.
        spans: ``(start, keys, rows)`` of every sequence that has rows: its first token, how many keys of step 0 it
            has, and which rows are its own.
        masks: ``[rows, keys]`` bool of every span: keys behind the row's own slot.
        diagonal_keys: ``[R, G, D]`` of every later step. ``diagonal_values``: likewise.
    """

    batch: DraftBatch
    hidden: Tensor
    keys: Tensor
    values: Tensor
    slots: Tensor
    positions: Tensor
    spans: list[tuple[int, int, slice]]
    masks: list[Tensor]
    started: bool = False
    diagonal_keys: list[Tensor] = field(default_factory=list)
    diagonal_values: list[Tensor] = field(default_factory=list)

    def select(self, rows: Tensor) -> DraftContext:
        """Return a context of these rows, ``[n]`` int64, repeats allowed, those of one sequence standing together.

        Both contexts go on independently; where paths branch, the rows of a level name their parents' rows.
        """
        spans, masks, first = [], [], 0
        for (start, length, own), mask in zip(self.spans, self.masks, strict=True):
            mine = rows[(rows >= own.start) & (rows < own.stop)] - own.start
            if len(mine):
                spans.append((start, length, slice(first, first + len(mine))))
                masks.append(mask[mine])
                first += len(mine)
        return DraftContext(
            self.batch,
            self.hidden[rows] if self.started else self.hidden,
            self.keys,
            self.values,
            self.slots[rows],
            self.positions[rows],
            spans,
            masks,
            self.started,
            [key[rows] for key in self.diagonal_keys],
            [value[rows] for value in self.diagonal_values],
        )


class Eagle3Model(DraftModel):
    """The trainable drafter. ``state_dict()`` has exactly the tensors of an EAGLE-3 checkpoint.

    Args:
        config: Dimensions.
        embeddings: ``[V, H]`` the target's token embeddings: frozen, shared, never saved.
        draft_ids: ``[Vd]`` int64, the target ids of the draft vocabulary in increasing order.
    """

    def __init__(self, config: Eagle3Config, embeddings: Tensor, draft_ids: Tensor) -> None:
        super().__init__(draft_ids, config.vocab_size)
        self.config = config
        self.fc = nn.Linear(3 * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = _MidLayer(config)
        self.norm: RMSNorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.embeddings: Tensor
        self.register_buffer("embeddings", embeddings.detach(), persistent=False)

    def head(self, step: int = 0) -> Tensor:  # noqa: ARG002 - one head for all steps
        """Return the LM head."""
        return self.lm_head.weight

    def drafter(self, dtype: torch.dtype) -> Eagle3Drafter:
        """Return the decode-time drafter, with a copy of the weights as they are now."""
        from vsdbench_drafters.architectures.eagle3_drafter import Eagle3Drafter  # noqa: PLC0415 - it imports this module

        return Eagle3Drafter(self, dtype=dtype)

    @classmethod
    def from_target(cls, target: Target, draft_ids: Tensor, *, seed: int) -> Eagle3Model:
        """Return a fresh drafter whose LM head, final norm and first features are the target's.

        The LM head starts as the target's rows of the draft vocabulary, and ``fc`` passes the highest of the three
        features through, so that the output starts from what the target thought of the *previous* token. The final
        norm is shrunk, because that guess is confident and wrong: at full size the first loss is twice as high.
        """
        config = Eagle3Config.for_target(target, len(draft_ids))
        generator = torch.Generator().manual_seed(seed)
        model = cls(config, target.embed_tokens.weight.detach(), draft_ids.to(target.device))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    # Output projections enter the residual stream and start smaller, as in GPT-2.
                    scale = 0.5**0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02 * scale, generator=generator))
            model.fc.weight.zero_()
            model.fc.weight[:, 2 * config.target_hidden_size :].copy_(torch.eye(config.hidden_size))
            head = target.model.get_output_embeddings().weight
            model.lm_head.weight.copy_(head[draft_ids.to(head.device)])
            final_norm = getattr(target.model.get_decoder(), "norm", None)
            if final_norm is not None:
                model.norm.weight.copy_(_FIRST_NORM * final_norm.weight)
        return model.to(target.device)

    # ---- training-time test ----

    def start(self, batch: DraftBatch) -> DraftContext:
        """Return the context of a batch's rows before any step, keys and values of step 0 included."""
        hidden = self.fc(batch.features.to(self.fc.weight.dtype))
        keys, values = self._prefix(batch, hidden)
        spans, masks, positions = [], [], []
        for span in batch.spans:
            slots = torch.arange(span.first_slot, span.length - 2, device=hidden.device)
            every = torch.arange(span.length - 2, device=hidden.device)
            masks.append(every[None] > slots[:, None])
            positions.append(slots)
            spans.append((span.start, span.length - 2, slice(span.first_row, span.first_row + span.num_rows)))
        return DraftContext(batch, hidden, keys, values, batch.slots, torch.cat(positions), spans, masks)

    def advance(self, context: DraftContext, tokens: Tensor) -> Tensor:
        """Run one step with ``[R]`` input tokens; return ``[R, H]`` un-normed outputs, which recur in the next step."""
        layer, first = self.midlayer, not context.started
        hidden = context.hidden[context.slots] if first else context.hidden
        x = torch.cat([layer.input_layernorm(self._embed(tokens, hidden)), layer.hidden_norm(hidden)], dim=-1)
        positions = context.positions + len(context.diagonal_keys) + (0 if first else 1)
        queries = self._rotate(layer.self_attn.q_proj(x), positions)
        if not first:
            context.diagonal_keys.append(self._rotate(layer.self_attn.k_proj(x), positions))
            context.diagonal_values.append(layer.self_attn.v_proj(x).view(len(x), -1, self.config.head_dim))
        hidden = hidden + layer.self_attn.o_proj(self._attend(context, queries))
        context.hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        context.started = True
        return context.hidden

    def _embed(self, tokens: Tensor, like: Tensor) -> Tensor:
        return F.embedding(tokens, self.embeddings).to(like.dtype)

    def _prefix(self, batch: DraftBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of step 0 at every slot, ``[N, G, D]`` each."""
        layer = self.midlayer
        following = torch.roll(batch.tokens, -1)  # the last slot of a sequence is wrong here, and never attended to
        x = torch.cat([layer.input_layernorm(self._embed(following, hidden)), layer.hidden_norm(hidden)], dim=-1)
        positions = torch.zeros(len(batch.tokens), dtype=torch.int64, device=hidden.device)
        for span in batch.spans:
            positions[span.start : span.start + span.length] = torch.arange(span.length, device=hidden.device)
        values = layer.self_attn.v_proj(x).view(len(x), -1, self.config.head_dim)
        return self._rotate(layer.self_attn.k_proj(x), positions), values

    def _rotate(self, flat: Tensor, positions: Tensor) -> Tensor:
        """Return ``[n, heads, D]`` with the rotary embedding of ``positions`` applied."""
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta, flat.dtype)
        return apply_rotary(flat.view(len(flat), -1, self.config.head_dim), cos[:, None], sin[:, None])

    def _attend(self, context: DraftContext, queries: Tensor) -> Tensor:
        """Return ``[R, A * D]``: attention to step 0's keys up to the own slot, and to the own later steps."""
        groups, width = self.config.num_key_value_heads, self.config.head_dim
        grouped = queries.view(len(queries), groups, -1, width) * width**-0.5  # [R, G, A/G, D]
        own_scores = [(grouped * key[:, :, None]).sum(-1) for key in context.diagonal_keys]
        own = torch.stack(own_scores, dim=-1) if own_scores else None  # [R, G, A/G, steps]
        outputs, own_weights = [], []
        for (start, length, rows), mask in zip(context.spans, context.masks, strict=True):
            prefix, count = slice(start, start + length), rows.stop - rows.start
            query = grouped[rows].permute(1, 2, 0, 3).flatten(1, 2)  # [G, A/G * r, D]
            keys, values = context.keys[prefix].transpose(0, 1), context.values[prefix].transpose(0, 1)
            scores = (query @ keys.transpose(1, 2)).view(groups, -1, count, length)  # [G, A/G, r, prefix]
            scores = scores.masked_fill(mask, -torch.inf)
            if own is not None:
                scores = torch.cat([scores, own[rows].permute(1, 2, 0, 3)], dim=-1)
            weights = torch.softmax(scores, dim=-1)
            mixed = (weights[..., :length].to(values.dtype).flatten(1, 2) @ values).view(groups, -1, count, width)
            outputs.append(mixed.permute(2, 0, 1, 3))
            own_weights.append(weights[..., length:].permute(2, 0, 1, 3))
        mixed_all = torch.cat(outputs)
        if own is not None:
            shares = torch.cat(own_weights)  # [R, G, A/G, steps]
            for step, value in enumerate(context.diagonal_values):
                mixed_all = mixed_all + shares[..., step, None] * value[:, :, None]
        return mixed_all.flatten(1)

    # ---- checkpoints ----

    def save(self, folder: Path, extra: dict[str, Any] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` in the public format; ``extra`` keys join the config."""
        write_tensors(folder, self.state_dict(), {**self.config.to_json(), **(extra or {})})

    @classmethod
    def load(cls, folder: Path, target: Target) -> Eagle3Model:
        """Load a checkpoint, ours or foreign, for a target.

        Raises:
            ConfigError: It is not an EAGLE-3 checkpoint, or one for another target.
        """
        config, tensors = Eagle3Config.read(folder), read_tensors(folder)
        draft_ids, embeddings = check_fits(folder, config, tensors, target)
        model = cls(config, embeddings.to(target.device), draft_ids.to(target.device))
        wanted = {name: tensors[name] for name in model.state_dict() if name in tensors and name not in {"d2t", "t2d"}}
        try:
            missing = model.load_state_dict(wanted, strict=False).missing_keys
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ConfigError(f"checkpoint '{folder}' does not match its own config.json: {reason}") from error
        missing = [name for name in missing if name not in {"d2t", "t2d"}]
        if missing:
            raise ConfigError(f"checkpoint '{folder}' lacks the tensor '{missing[0]}', which EAGLE-3 needs.")
        return model.to(target.device)


def build(target: Target, *, checkpoint: Path | None, options: dict[str, Any]) -> Eagle3Drafter:
    """Entry point ``eagle3``: load a checkpoint for decoding.

    Args:
        target: The target it drafts for.
        checkpoint: The checkpoint folder.
        options: None are known.

    Raises:
        ConfigError: No checkpoint, an unknown option, or a checkpoint that does not fit the target.
    """
    from vsdbench_drafters.architectures.eagle3_drafter import Eagle3Drafter  # noqa: PLC0415 - it imports this module

    if options:
        raise ConfigError(f"drafter 'eagle3' has no option '{next(iter(options))}'; it takes only a checkpoint.")
    if checkpoint is None:
        raise ConfigError("drafter 'eagle3' needs a checkpoint folder, or a recipe that trains one.")
    return Eagle3Drafter(Eagle3Model.load(Path(checkpoint), target), dtype=target.dtype)
