"""Drafters of one layer at decode time: the same layer without autograd, modules or copies.

A target step of a small model takes about twenty milliseconds, so a draft step may take two: weights are fused once
at load, the key-value cache is preallocated, and a level of the tree is one forward over its nodes.

The first C rows of the cache are committed slots (true features). Nodes of the growing tree are written behind them,
slot after slot, and are forgotten with the next proposal. A node attends to all committed slots, its ancestors and
itself, at position C - 1 + depth: exactly what training-time test showed the layer. Of a prompt with images, a drafter
that compresses them has fewer rows than the prompt has slots; positions go on as if it had them all.

Shape legend: L prompt tokens, C committed slots, n rows of one forward, H width, Vd draft vocabulary, A heads, G
key-value heads, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vsdbench.decoding.structure import Ancestry
from vsdbench.decoding.tree import empty_tree, grow, widest_level
from vsdbench.models import native
from vsdbench.models.device import send_numbers
from vsdbench.models.masks import ContextMask
from vsdbench.models.native_layers import Dimensions, LayerParts, make_native
from vsdbench.models.packed import Product
from vsdbench_drafters.architectures.compiled_step import CompiledStep, compile_step, sizes_for
from vsdbench_drafters.architectures.layer_rows import LayerRows, PromptRows, later
from vsdbench_drafters.architectures.layers import apply_rotary, rotary

if TYPE_CHECKING:
    from vsdbench.decoding.interfaces import Request, TargetState, TokenTree, TreeShape
    from vsdbench.models.compiled import Graphs
    from vsdbench_drafters.architectures.one_layer import OneLayerModel

_SPARE_ROWS = 128
_CHUNK = 1024
"""Slots of a prompt that are taken in by one forward: a mask of all of them would grow with their square."""


class CachedLayer:
    """Weights and cache of the draft layer: one forward over n rows.

    A subclass says by ``project`` and ``mix`` what enters the layer, and by ``log_probs`` what its output means.

    Args:
        model: Its weights are copied, cast and fused.
        dtype: Dtype of the products; log-probabilities are float32 in any case.

    Attributes:
        compiled: What runs a step, if that was asked for.
    """

    remembers_images: ClassVar[bool] = False
    """Whether a step depends on the image before it."""

    def __init__(self, model: OneLayerModel, dtype: torch.dtype) -> None:
        attention, mlp = model.layer.self_attn, model.layer.mlp
        self.config = model.config
        self.dtype = dtype
        self.device = model.fc.weight.device
        self.embeddings = model.embeddings.to(dtype)
        self.fc = self.product(model.fc.weight)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [projection.bias for projection in projections if projection.bias is not None]
        self.qkv = self.product(*(projection.weight for projection in projections), biases=biases)
        self.out = self.product(attention.o_proj.weight)
        self.gate = self.product(mlp.gate_proj.weight)
        self.up = self.product(mlp.up_proj.weight)
        self.down = self.product(mlp.down_proj.weight)
        self.head = self.product(model.head())
        self.mlp_norm = self.cast(model.layer.post_attention_layernorm.weight)
        self._mask = ContextMask(dtype, self.device)
        parts = LayerParts(None, self.mlp_norm, self.qkv, None, self.out, self.gate, self.up, self.down)
        heads, groups, width = model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim
        eps = model.config.rms_norm_eps
        sizes = Dimensions(heads=heads, groups=groups, width=width, eps=eps, scaling=width**-0.5, dtype=dtype)
        self._native = make_native([parts], sizes)
        self.compiled: CompiledStep | None = None
        self.capacity = 0
        self.keys = self.values = self.cos = self.sin = torch.empty(0)

    def fork(self) -> Self:
        """Return a layer with the same weights and a cache of its own."""
        twin = copy.copy(self)
        twin.capacity = 0
        twin.keys = twin.values = twin.cos = twin.sin = torch.empty(0)
        return twin

    def plain_fork(self) -> Self:
        """Return a fork that runs operation by operation: what compiled steps are compared with."""
        twin = self.fork()
        twin.compiled = twin._native = None  # noqa: SLF001 - its own
        return twin

    def reserve(self, rows: int) -> None:
        """Make room for ``rows`` cache rows; what is cached stays."""
        if rows <= self.capacity:
            return
        if self.compiled is not None:
            rows = self.compiled.graphs.capacity(rows)
        shape = (self.config.num_key_value_heads, rows, self.config.head_dim)
        keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        values = torch.zeros_like(keys)
        if self.capacity:
            keys[:, : self.capacity], values[:, : self.capacity] = self.keys, self.values
        self.keys, self.values, self.capacity = keys, values, rows
        positions = torch.arange(rows, device=self.device)
        self.cos, self.sin = rotary(positions, self.config.head_dim, self.config.rope_theta, self.dtype)

    def cast(self, *weights: Tensor) -> Tensor:
        """Return a copy of weights, joined along their outputs, in the dtype of the products."""
        return torch.cat([weight.detach() for weight in weights]).to(self.dtype).contiguous()

    def product(self, *weights: Tensor, biases: Sequence[Tensor] = ()) -> Product:
        """Return the product with weights joined along their outputs; few rows may see them rounded to bfloat16."""
        return Product(self.cast(*weights), self.cast(*biases) if biases else None, narrow=True)

    def project(self, features: Tensor) -> Tensor:
        """Return ``[n, H]``, what recurs as the output does, made from ``[n, 4H]`` target features."""
        raise NotImplementedError

    def mix(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention's input and the residual of n rows, from ``[n, H]`` embeddings and hidden states."""
        raise NotImplementedError

    def enter(self, hidden: Tensor, embedded: Tensor, shows_image: Tensor) -> PromptRows:  # noqa: ARG002 - for subclasses
        """Return what a prompt with images puts into the layer.

        Args:
            hidden: ``[L - 1, H]`` projected features.
            embedded: ``[L - 1, H]`` embeddings of the following tokens, an image's as the target's first layer sees it.
            shows_image: ``[L - 1]`` bool: slots that are followed by a piece of an image.
        """
        return PromptRows(*self.mix(embedded, hidden), torch.arange(len(hidden), device=hidden.device))

    def forget(self) -> None:
        """Forget the images of the sequence before."""

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Return ``[n, Vd]`` float32 log-probabilities of what follows ``[n, H]`` outputs."""
        raise NotImplementedError

    def step(self, rows: LayerRows, *, last: bool = False) -> tuple[Tensor, Tensor]:
        """Run n rows; return ``[n, H]`` un-normed outputs and ``[n, Vd]`` log-probabilities, or the last row's."""
        kept = slice(-1 if last else 0, None)
        if self.compiled is not None and (size := self.compiled.size(rows, self.capacity)):
            output, log_probs = self.compiled(self, rows, size)
            return output[kept], log_probs[kept]
        output = self.forward(*rows)[kept]
        return output, self.log_probs(output)

    def forward(self, hidden: Tensor, tokens: Tensor, positions: slice, row: int, hide: Tensor | None) -> Tensor:
        """Run n rows (see ``LayerRows``), writing keys and values; return ``[n, H]`` un-normed outputs."""
        return self.run(*self.mix(self.embed(tokens), hidden), positions, row, hide)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return ``[n, H]`` embeddings."""
        return F.embedding(tokens, self.embeddings)

    def run(self, x: Tensor, residual: Tensor, positions: slice | Tensor, row: int, hide: Tensor | None) -> Tensor:
        """Run n rows from the attention's input ``[n, W]`` on; arguments and result as those of ``forward``."""
        cos, sin = self.cos[positions], self.sin[positions]
        if self._native is not None and self._native.takes(len(x)):
            turns = cos.float().expand(len(x), -1), sin.float().expand(len(x), -1)
            mask = None if hide is None else self._mask.ending(self._additive(hide), row + len(x))
            return self._native.run(residual, turns, [mask], (self.keys, self.values), row, entered=x)
        heads = self.heads(x, cos, sin)
        return self.finish(self.attend(*heads, row, hide), residual)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries ``[n, A, D]``, keys and values ``[n, G, D]``, turned by ``[n or 1, D]`` cosines and sines."""
        config = self.config
        mixed = self.qkv(x).view(len(x), -1, config.head_dim)
        narrow, wide = config.num_key_value_heads, config.num_attention_heads
        turned = apply_rotary(mixed[:, : wide + narrow], cos[:, None], sin[:, None])
        return turned[:, :wide], turned[:, wide:], mixed[:, wide + narrow :]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, row: int, hide: Tensor | None) -> Tensor:
        """Return ``[n, A * D]``; n keys and values are written first, ``row`` and ``hide`` are as in ``LayerRows``."""
        stop = row + len(queries)
        self.keys[:, row:stop] = keys.transpose(0, 1)
        self.values[:, row:stop] = values.transpose(0, 1)
        each = self.config.num_attention_heads // len(self.keys)
        mask = None if hide is None else self._mask.ending(self._additive(hide).repeat(each, 1), stop)
        return self.weighted(queries, self.keys[:, :stop], self.values[:, :stop], mask)

    def weighted(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Return ``[n, A * D]``: attention of ``[n, A, D]`` queries to K keys under a mask ``[A / G * n, K]``."""
        (count, heads, width), groups = queries.shape, len(keys)
        each = heads // groups
        # Query heads of a group stand along the query axis, so that keys and values are not repeated.
        stacked = (
            queries.reshape(count, groups, each, width).permute(1, 2, 0, 3).reshape(1, groups, each * count, width)
        )
        attended = F.scaled_dot_product_attention(stacked, keys[None], values[None], attn_mask=mask)
        return attended.view(groups, each, count, width).permute(2, 0, 1, 3).reshape(count, heads * width)

    def _additive(self, hide: Tensor) -> Tensor:
        """Return the mask of what is hidden."""
        return torch.zeros(hide.shape, dtype=self.dtype, device=self.device).masked_fill_(hide, -torch.inf)

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """Return the ``[n, H]`` un-normed outputs of what attention gave."""
        hidden = self.out.plus(attended, residual)
        normed = self.norm(hidden, self.mlp_norm)
        return self.down.plus(self.up.times(normed, self.gate.silu(normed)), hidden)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return ``x`` normed."""
        return native.norm(x, weight, self.config.rms_norm_eps)


class OneLayerDrafter:
    """Proposes trees with one draft layer (protocol ``Drafter``).

    Args:
        name: As in the list of drafters.
        layer: The layer.
        model: The trained drafter that it is of.
    """

    def __init__(self, name: str, layer: CachedLayer, model: OneLayerModel) -> None:
        self.name = name
        self.layer = layer
        self.vocab_size = model.config.vocab_size
        self.d2t = model.d2t
        self._committed = 0
        self._skipped = 0  # slots of the prompt that have no row
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._root_hidden = self._root_log_probs = torch.empty(0)

    def fork(self) -> Self:
        """Return another one with the same weights and a cache of its own."""
        twin = copy.copy(self)
        twin.layer = self.layer.fork()
        return twin

    @torch.inference_mode()
    def begin(self, state: TargetState, max_length: int) -> None:
        """Run the layer over the prompt: slot t has the feature of token t and the embedding of token t + 1."""
        self.layer.reserve(max_length + _SPARE_ROWS)
        self.layer.forget()
        self._committed, self._skipped, self._pending = 0, 0, []
        following = send_numbers(state.tokens[1:], self.layer.device)
        features = state.features
        image_mask: Tensor | None = getattr(state, "image_mask", None)  # a target that cannot see has neither
        seen: Tensor | None = getattr(state, "embeddings", None)
        if image_mask is not None and seen is not None and len(following) > 1:
            self._look(features[:-1], following[:-1], image_mask[1:], seen[1:])
        elif len(following) > 1:
            for part in range(0, len(following) - 1, _CHUNK):
                until = min(part + _CHUNK, len(following) - 1)
                self._absorb(features[part:until], following[part:until])
        self._pending.append((features[-1:], following[-1:]))

    @torch.inference_mode()
    def propose(
        self,
        state: TargetState,
        shape: TreeShape,
        *,
        temperature: float,
        generator: torch.Generator,
    ) -> TokenTree:
        """Take in what was committed, then grow a tree under the root."""
        if shape.budget < 1 or shape.depth < 1:
            return empty_tree(self.layer.device)
        if self._pending:
            features, tokens = self.take_pending()
            rows = self.committed_rows(self.layer.project(features), tokens)
            hidden, log_probs = self.layer.step(rows, last=True)
            self.learn_root(hidden, log_probs[0])
        self.reserve(shape)
        return grow(Growth(self), shape, state=state, temperature=temperature, generator=generator)

    def propose_together(self, drafters: Sequence[OneLayerDrafter], requests: Sequence[Request]) -> list[TokenTree]:
        """Return what ``propose`` of each would, their rows in one product a level (protocol ``DraftsTogether``)."""
        from vsdbench_drafters.architectures.one_layer_together import propose_together  # noqa: PLC0415 - it imports this module

        return propose_together(drafters, requests)

    def take_pending(self) -> tuple[Tensor, Tensor]:
        """Return ``[n, 4H]`` features and ``[n]`` following tokens of what was committed since the last proposal."""
        features = torch.cat([pair[0] for pair in self._pending])
        tokens = torch.cat([pair[1] for pair in self._pending])
        self._pending = []
        return features, tokens

    def learn_root(self, hidden: Tensor, log_probs: Tensor) -> None:
        """Take the ``[1, H]`` output at the newest slot and ``[Vd]`` log-probabilities of the root's children."""
        self._root_hidden, self._root_log_probs = hidden, log_probs

    def reserve(self, shape: TreeShape) -> None:
        """Make room for a tree while it grows."""
        self.layer.reserve(self.num_slots + shape.depth * max(shape.top_k, shape.budget) + 1)

    @torch.inference_mode()
    def commit(self, state: TargetState, num_accepted: int, features: Tensor) -> None:
        """Queue the new pairs of feature and following token; the next proposal's first forward takes them in."""
        self._pending.append((features, state.last_tokens(num_accepted + 1)))

    def compile_steps(self, graphs: Graphs, shape: TreeShape) -> str | None:
        """Let steps run compiled, for trees of a shape; return why they do not, if so (see ``Drafter``)."""
        if self.layer.remembers_images:
            return "a step depends on the image before it"
        return compile_step(self.layer, sizes_for(max(shape.depth + 1, widest_level(shape))), graphs)

    def _absorb(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Append committed slots to the cache; return their ``[n, H]`` outputs."""
        return self.layer.forward(*self.committed_rows(self.layer.project(features), tokens))

    def committed_rows(self, hidden: Tensor, tokens: Tensor) -> LayerRows:
        """Return n rows that are committed slots from now on, of ``[n, H]`` projected features."""
        start, count = self._committed, len(tokens)
        first = self.num_slots
        self.layer.reserve(first + count)
        hide = later(count, tokens.device) if count > 1 else None
        self._committed += count
        return LayerRows(hidden, tokens, slice(first, first + count), start, hide)

    def _look(self, features: Tensor, tokens: Tensor, shows: Tensor, seen: Tensor) -> None:
        """Take in the slots of a prompt with images.

        Args:
            features: ``[L - 1, 4H]``.
            tokens: ``[L - 1]`` the following tokens.
            shows: ``[L - 1]`` bool: those that are pieces of an image.
            seen: ``[L - 1, H]`` what enters the target's first layer there.
        """
        embedded = self.layer.embed(tokens)
        embedded[shows] = seen[shows].to(embedded.dtype)
        rows = self.layer.enter(self.layer.project(features), embedded, shows)
        self._committed, self._skipped = len(rows.x), len(tokens) - len(rows.x)
        self.layer.run(*rows, 0, later(len(rows.x), tokens.device))

    @property
    def num_committed(self) -> int:
        """C: rows in the draft cache that stem from true features."""
        return self._committed

    @property
    def num_slots(self) -> int:
        """Slots that these rows stand for, which is the position of the next one."""
        return self._committed + self._skipped


class Growth:
    """Scores the levels of one growing tree (protocol ``LevelScorer``)."""

    def __init__(self, drafter: OneLayerDrafter) -> None:
        self.vocab_size = drafter.vocab_size
        self._layer = drafter.layer
        self._committed = drafter.num_committed
        self._num_slots = drafter.num_slots
        self._d2t = drafter.d2t
        self._root = drafter._root_log_probs  # noqa: SLF001 - one unit with its drafter
        self._hidden = drafter._root_hidden  # noqa: SLF001 - row s + 1 is slot s
        self._ancestry = Ancestry(self._d2t.device)
        self._num_nodes = 0

    def root(self) -> Tensor:
        """Return ``[Vd]`` log-probabilities of the root's children."""
        return self._root

    def level(self, tokens: Tensor, parent_slots: Tensor, depth: int) -> Tensor:
        """Return ``[M, Vd]`` log-probabilities of the children of M nodes."""
        output, log_probs = self._layer.step(self.rows(tokens, parent_slots, depth))
        self.learn(output)
        return log_probs

    def rows(self, tokens: Tensor, parent_slots: Tensor, depth: int) -> LayerRows:
        """Return the rows of M nodes."""
        if self._num_nodes == 0:  # all are children of the root
            hidden = self._hidden.expand(len(tokens), -1)
        else:
            hidden = self._hidden.index_select(0, parent_slots + 1)
        position, row = self._num_slots - 1 + depth, self._committed + self._num_nodes
        self._num_nodes += len(tokens)
        seen = self._ancestry.add(parent_slots)
        return LayerRows(hidden, tokens, slice(position, position + 1), row, None if seen is None else ~seen)

    def learn(self, output: Tensor) -> None:
        """Take the ``[M, H]`` outputs at the newest nodes."""
        self._hidden = torch.cat([self._hidden, output])

    def to_target(self, ids: Tensor) -> Tensor:
        """Map draft-vocabulary ids to target ids."""
        return ids + self._d2t[ids]
