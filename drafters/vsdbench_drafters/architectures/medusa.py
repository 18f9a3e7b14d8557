"""Medusa (arXiv 2401.10774): K heads that each predict one of the next tokens from one hidden state of the target.

Slot t has the target's last normed hidden state at token t, from which its own LM head predicts token t + 1. Head i
predicts token t + 2 + i: at decode time t + 1 is the root, and head i gives the tokens at depth i + 1. Heads see
neither the root nor each other's tokens, so all nodes of a level have the same distribution.

A head is ``num_layers`` residual blocks ``x + SiLU(linear(x))`` and an LM head of its own. Tensor names on disk are
those of public checkpoints, ``{head}.{block}.linear.weight`` and ``{head}.{num_layers}.weight``; ours adds ``d2t``
and ``t2d`` for the draft vocabulary, as EAGLE-3's do.

Shape legend: R rows of the loss, H the target's width, V target vocabulary, Vd draft vocabulary, M nodes of a level.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsdbench.decoding.tree import empty_tree, grow
from vsdbench.errors import ConfigError
from vsdbench.models.packed import Product
from vsdbench_drafters.architectures.checkpoints import (
    draft_vocabulary_of,
    fill,
    loader,
    read_tensors,
    write_tensors,
)
from vsdbench_drafters.objectives.base import DraftBatch, DraftModel

if TYPE_CHECKING:
    from vsdbench.decoding.interfaces import TargetState, TokenTree, TreeShape
    from vsdbench.models.target import Target

_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
_PREFIX = "medusa_head."  # of checkpoints that hold the target too


@dataclass(slots=True)
class MedusaContext:
    """Where the rows of a batch are.

    Attributes:
        features: ``[R, H]`` the target's last normed hidden states at the rows' slots.
        hidden: ``[R, H]`` outputs of the last head.
        step: The next head.
    """

    features: Tensor
    hidden: Tensor
    step: int = 0

    def select(self, rows: Tensor) -> MedusaContext:
        """Return a context of these rows, which goes on independently."""
        return MedusaContext(self.features[rows], self.hidden[rows], self.step)


class MedusaModel(DraftModel):
    """The trainable heads. Step i of the training-time test is head i; the input tokens are not looked at.

    Args:
        hidden_size: H.
        vocab_size: V.
        num_heads: K.
        num_layers: Residual blocks of a head.
        draft_ids: ``[Vd]`` int64, the target ids of the draft vocabulary in increasing order.
    """

    name: ClassVar[str] = "medusa"
    one_head: ClassVar[bool] = False

    def __init__(
        self, *, hidden_size: int, vocab_size: int, num_heads: int, num_layers: int, draft_ids: Tensor
    ) -> None:
        super().__init__(draft_ids, vocab_size)
        self.max_steps = num_heads
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(num_layers)) for _ in range(num_heads)
        )
        self.norm = nn.Identity()
        self.lm_head = nn.ModuleList(nn.Linear(hidden_size, len(draft_ids), bias=False) for _ in range(num_heads))

    def head(self, step: int = 0) -> Tensor:
        """Return the LM head of a step."""
        head = self.lm_head[step]
        assert isinstance(head, nn.Linear)
        return head.weight

    def linears(self, step: int) -> list[nn.Linear]:
        """Return the linear layers of the residual blocks of a head."""
        blocks = self.blocks[step]
        assert isinstance(blocks, nn.ModuleList)
        return [block for block in blocks if isinstance(block, nn.Linear)]

    def start(self, batch: DraftBatch) -> MedusaContext:
        """Return the rows' features, before any head."""
        features = batch.features[batch.slots, -self.hidden_size :].to(self.head().dtype)
        return MedusaContext(features, features)

    def advance(self, context: MedusaContext, tokens: Tensor) -> Tensor:  # noqa: ARG002 - heads see no tokens
        """Run the residual blocks of the next head; return their ``[R, H]`` outputs."""
        hidden = context.features
        for linear in self.linears(context.step):
            hidden = hidden + F.silu(linear(hidden))
        context.hidden = hidden
        context.step += 1
        return hidden

    @classmethod
    def from_target(cls, target: Target, draft_ids: Tensor, *, seed: int, num_heads: int, num_layers: int) -> Self:
        """Return fresh heads that all say what the target's own head says: blocks are zero, LM heads the target's.

        Nothing is drawn, so the seed of a recipe decides the order of the data alone.
        """
        del seed
        model = cls(
            hidden_size=target.hidden_size,
            vocab_size=target.vocab_size,
            num_heads=num_heads,
            num_layers=num_layers,
            draft_ids=draft_ids.to(target.device),
        )
        head = target.model.get_output_embeddings().weight
        with torch.no_grad():
            for step in range(num_heads):
                model.head(step).copy_(head[draft_ids.to(head.device)])
                for linear in model.linears(step):
                    linear.weight.zero_()
                    linear.bias.zero_()
        return model.to(target.device)

    # ---- checkpoints ----

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        tensors = {_public(name, self.num_layers): tensor for name, tensor in self.state_dict().items()}
        config = {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "medusa_num_heads": self.max_steps,
            "medusa_num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "vocab_size": len(self.t2d),
            "draft_vocab_size": len(self.d2t),
        }
        write_tensors(folder, tensors, config)

    @classmethod
    def load(cls, folder: Path, target: Target) -> Self:
        """Load a checkpoint, ours or foreign, for a target; all dimensions follow from the tensors.

        Raises:
            ConfigError: It is not a Medusa checkpoint, or one for another target.
        """
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in read_tensors(folder, _FILES).items()}
        found = [match for name in tensors if (match := re.fullmatch(r"(\d+)\.(\d+)\.weight", name))]
        if not found:
            raise ConfigError(f"checkpoint '{folder}' has no tensors named '0.1.weight', so it is not Medusa.")
        num_heads, num_layers = 1 + max(int(match[1]) for match in found), max(int(match[2]) for match in found)
        size, width = tensors[found[0][0]].shape
        if width != target.hidden_size:
            raise ConfigError(
                f"checkpoint '{folder}' takes hidden states {width} wide, those of target '{target.name}' are "
                f"{target.hidden_size}: it was trained for another target."
            )
        if size > target.vocab_size or len(tensors.get("t2d", target.embed_tokens.weight)) != target.vocab_size:
            raise ConfigError(
                f"checkpoint '{folder}' was trained for another vocabulary than the {target.vocab_size} tokens of "
                f"target '{target.name}': use the target it was trained for."
            )
        draft_ids = draft_vocabulary_of(folder, size, tensors, target)
        model = cls(
            hidden_size=width,
            vocab_size=target.vocab_size,
            num_heads=num_heads,
            num_layers=num_layers,
            draft_ids=draft_ids.to(target.device),
        )
        fill(
            model,
            tensors,
            folder,
            "Medusa",
            stored_as=lambda name: _public(name, num_layers),
            described_by="first head",
        )
        return model.to(target.device)

    def drafter(self, dtype: torch.dtype) -> MedusaDrafter:
        """Return the decode-time drafter, with a copy of the weights as they are now."""
        return MedusaDrafter(self, dtype=dtype)


def _public(name: str, num_layers: int) -> str:
    """Return a tensor's name on disk.

    >>> _public("blocks.2.0.bias", 1), _public("lm_head.2.weight", 1), _public("d2t", 1)
    ('2.0.linear.bias', '2.1.weight', 'd2t')
    """
    kind, _, rest = name.partition(".")
    if kind == "blocks":
        block, _, field = rest.rpartition(".")
        return f"{block}.linear.{field}"
    return f"{rest.partition('.')[0]}.{num_layers}.weight" if kind == "lm_head" else name


class MedusaDrafter:
    """Proposes trees from the hidden state of which the root was predicted (protocol ``Drafter``).

    Args:
        model: The trained heads.
        dtype: Dtype of their products, usually the target's.
    """

    name = MedusaModel.name

    def __init__(self, model: MedusaModel, *, dtype: torch.dtype) -> None:
        assert model.max_steps is not None
        self.num_heads = self.max_depth = model.max_steps
        self.vocab_size = len(model.t2d)
        self._d2t, self._dtype = model.d2t, dtype
        self._width = model.hidden_size
        self._blocks = [
            [
                (Product(linear.weight.detach().to(dtype).contiguous(), narrow=True), linear.bias.detach().to(dtype))
                for linear in model.linears(step)
            ]
            for step in range(self.num_heads)
        ]
        self._heads = [
            Product(model.head(step).detach().to(dtype).contiguous(), narrow=True) for step in range(self.num_heads)
        ]
        self._feature = torch.empty(0)

    def fork(self) -> MedusaDrafter:
        """Return another one with the same heads."""
        return copy.copy(self)

    def begin(self, state: TargetState, max_length: int) -> None:  # noqa: ARG002 - there is no cache
        """Take the hidden state of the last prompt token, from which the root was predicted."""
        self._take(state.features)

    def commit(self, state: TargetState, num_accepted: int, features: Tensor) -> None:  # noqa: ARG002 - of no use here
        """Take the hidden state of the last accepted token, from which the new root was predicted."""
        self._take(features)

    @torch.inference_mode()
    def propose(
        self,
        state: TargetState,
        shape: TreeShape,
        *,
        temperature: float,
        generator: torch.Generator,
    ) -> TokenTree:
        """Grow a tree under the root, no deeper than there are heads."""
        if shape.budget < 1 or shape.depth < 1:
            return empty_tree(self._d2t.device)
        shape = replace(shape, depth=min(shape.depth, self.num_heads))
        return grow(self, shape, state=state, temperature=temperature, generator=generator)

    def _take(self, features: Tensor) -> None:
        self._feature = features[-1:, -self._width :].to(self._dtype)

    # ---- protocol LevelScorer: a level's distribution depends on its depth alone ----

    def root(self) -> Tensor:
        """Return ``[Vd]`` log-probabilities of the root's children."""
        return self._log_probs(0)

    def level(self, tokens: Tensor, parent_slots: Tensor, depth: int) -> Tensor:  # noqa: ARG002 - see above
        """Return ``[M, Vd]`` log-probabilities of the children of M nodes."""
        return self._log_probs(depth).expand(len(tokens), -1)

    def to_target(self, ids: Tensor) -> Tensor:
        """Map draft-vocabulary ids to target ids."""
        return ids + self._d2t[ids]

    def _log_probs(self, step: int) -> Tensor:
        hidden = self._feature
        for multiply, bias in self._blocks[step]:
            hidden = hidden + F.silu(multiply(hidden) + bias)
        return torch.log_softmax(self._heads[step](hidden)[0].float(), dim=-1)


build = loader(MedusaModel)
