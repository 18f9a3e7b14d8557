"""The target: any decoder-only model of transformers, driven by two calls: ``prefill`` and ``forward_tree``.

The model's own code computes everything; this file only supplies what tree decoding needs around it: explicit masks
and positions, a cache that can be compacted, and the drafter's features: the states that enter three layers, and the
last ones. A model that reads images is a target too: after the prompt is text alone (see ``image_prefill``).

Shape legend: L prompt tokens, N draft tokens, C committed tokens in the cache, V vocabulary, H hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vsdbench.decoding.interfaces import TargetOutput, TokenTree
from vsdbench.decoding.structure import row_depths
from vsdbench.errors import ConfigError
from vsdbench.models import attention
from vsdbench.models.compiled import CompiledLayers, compile_layers
from vsdbench.models.device import send_numbers
from vsdbench.models.encoding import ImageEncoder, Message, make_encoder
from vsdbench.models.fused import FusedLayers, agree, can_fuse
from vsdbench.models.image_prompt import ImagePrompt
from vsdbench.models.kv_cache import CachePool, PreallocatedCache
from vsdbench.models.loading import choose_attention, eos_ids, layer_stack, load_model, pin_rotary
from vsdbench.models.masks import Masks
from vsdbench.models.packed import can_pack, pack, unpack
from vsdbench.models.probe import check_tree
from vsdbench.models.reading import prefill_images
from vsdbench.models.state import SequenceState

_CHUNK = 1024
"""Tokens of a prompt that are read in one forward: the mask of a long prompt as a whole would grow with its square."""


class Target:
    """A frozen decoder-only language model with a tree forward.

    Attributes:
        name: As the user wrote it.
        model: The transformers model, in evaluation mode.
        tokenizer: Its tokenizer.
        encoder: Makes its prompts.
        fingerprint: Hash of weights and config.
        hidden_size, vocab_size: H, and V, the width of the logits.
        max_positions: Tokens that its position embedding allows without changing for a longer sequence.
        feature_layers: The three layers whose inputs are the features, ``(2, n // 2, n - 3)`` as in EAGLE-3.
        eos_ids: Tokens that end an answer.
        masks: Makes its attention masks.
        fused_layers: What runs in the place of the model's own layers; None where those run.
        compiled_layers: What runs in the place of the fused ones behind a prompt, if that was asked for.
        not_compiled: Why nothing does, if that was asked for.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - a transformers model
        tokenizer: Any,  # noqa: ANN401 - and its tokenizer
        *,
        name: str,
        fingerprint: str,
        attention_name: str = "auto",
        packed: bool = True,
        compiled: Collection[int] = (),
        processor: Any = None,  # noqa: ANN401 - as above
    ) -> None:
        self.model = model.eval().requires_grad_(requires_grad=False)
        self.tokenizer = tokenizer
        self.encoder = make_encoder(tokenizer, processor, name=name, config=model.config)
        self.name = name
        self.fingerprint = fingerprint
        self.config = model.config.get_text_config()
        self.attention = choose_attention(self.config) if attention_name == "auto" else attention_name
        model.set_attn_implementation(self.attention)
        groups = attention.groups(model.get_decoder()) if self.attention == attention.NAME else 1
        self._packing = pack(model) if packed and can_pack(model.device, model.dtype) else None
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.masks = Masks(self.config, groups=groups, name=name, dtype=self.dtype, device=self.device)
        self.hidden_size: int = self.config.hidden_size
        self.vocab_size: int = self.config.vocab_size
        held = getattr(self.config, "max_position_embeddings", None), pin_rotary(model.get_decoder())
        self.max_positions: int = min((limit for limit in held if limit), default=sys.maxsize)
        self.embed_tokens: nn.Embedding = model.get_input_embeddings()
        self._stack, self._layers_name = layer_stack(model, self.config.num_hidden_layers, name)
        self.num_layers = len(self._layers())
        self.eos_ids = eos_ids(model, tokenizer)
        self._entering: dict[int, Tensor] = {}
        self._last = torch.empty(0)
        self._hooks: list[RemovableHandle] = []
        self._watch()
        self._cache: PreallocatedCache | None = None
        self.pool: CachePool | None = None  # of sequences decoded together (``together``)
        self.fused_layers: FusedLayers | None = None
        self.compiled_layers: CompiledLayers | None = None
        self.not_compiled: str | None = None
        self._compiled_rows = compiled
        check_tree(self)
        self._fuse()

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        name: str,
        fingerprint: str,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
        **how: Any,  # noqa: ANN401 - as below
    ) -> Target:
        """Load a model folder (config, safetensors, tokenizer) onto a device.

        Linear layers are packed where that makes them faster, unless they shall stay as they are (``packed=False``).
        Tree forwards of ``compiled`` rows run compiled where that is possible; ``not_compiled`` says why it is not.
        ``attention_name`` is transformers' name of another attention than ours.

        Raises:
            ConfigError: The folder is not a decoder-only model that transformers knows.
        """
        model, tokenizer, processor = load_model(path, name, device, dtype, trust_remote_code=trust_remote_code)
        return cls(model, tokenizer, name=name, fingerprint=fingerprint, processor=processor, **how)

    def keep_layers(self, count: int) -> None:
        """Cut the model after its first ``count`` layers (early exit), for use as a draft model.

        Raises:
            ConfigError: ``count`` is not between 1 and the number of layers.
        """
        if not 1 <= count <= self.num_layers:
            raise ConfigError(f"num_layers is {count}, but '{self.name}' has {self.num_layers} layers.")
        setattr(self._stack, self._layers_name, self._layers()[:count])
        self.config.num_hidden_layers = self.num_layers = count
        self._cache = self.pool = None
        self._watch()
        self._fuse()

    def prepare_sharding(self, device: torch.device) -> nn.ModuleList:
        """Return the decoder layers, as plain as they were loaded, for a caller that moves the model to ``device``."""
        if self._packing is not None:
            unpack(self.model)
            self._packing = self.fused_layers = self.compiled_layers = None
        self.device = device
        self.masks.move(device)
        return self._layers()

    def _layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = getattr(self._stack, self._layers_name)
        return layers

    # ---- prompts ----

    def encode_chat(self, messages: Sequence[Message]) -> Sequence[int]:
        """Return the prompt of a conversation: token ids, or an ``ImagePrompt`` where messages have ``images``.

        Raises:
            ConfigError: There are images and the model cannot read them.
        """
        return self.encoder.chat(messages)

    def encode_text(self, text: str, images: Sequence[Any] = ()) -> Sequence[int]:
        """Return the prompt of a text outside of any template, images (PIL) before it; raises as ``encode_chat``."""
        return self.encoder.text(text, images)

    @property
    def reads_images(self) -> bool:
        """Whether prompts may have images."""
        return isinstance(self.encoder, ImageEncoder)

    @property
    def window(self) -> int | None:
        """Tokens that a sliding layer sees; None where none slides."""
        return self.masks.window

    @property
    def template_hash(self) -> str:
        """16 hex digits of the chat template's sha256."""
        return self.encoder.template_hash

    # ---- the two calls ----

    @torch.inference_mode()
    def prefill(self, tokens: Sequence[int], max_length: int, cache: PreallocatedCache | None = None) -> SequenceState:
        """Return the state after the prompt: its features and the logits of the token that follows.

        Args:
            tokens: The L prompt tokens.
            max_length: Rows that the cache must hold in all, scratch rows of a tree included.
            cache: Where keys and values go; None: the target's own, of one sequence at a time.

        Raises:
            ConfigError: The prompt is empty or does not fit, or its images are read in a way that rules out decoding.
        """
        if not tokens:
            raise ConfigError("The prompt has no tokens: nothing can be decoded from it.")
        if self.compiled_layers is not None:
            max_length = self.compiled_layers.graphs.capacity(max_length)
        if cache is None and (self._cache is None or self._cache.capacity < max_length):
            self._cache = PreallocatedCache(self.num_layers, max_length)
        cache = self._cache if cache is None else cache
        assert cache is not None
        cache.reset()
        state = SequenceState(tokens, cache)
        if not isinstance(tokens, ImagePrompt):
            state.features, logits = self._read(state, 0, tokens)
        else:
            read, state.features = prefill_images(self, tokens, cache)
            cache.length = tokens.num_read
            state.position_offset = read.position_offset
            state.image_mask = tokens.image_mask.to(self.device)
            state.embeddings, logits = read.embeddings, read.logits
            if behind := tokens.tokens[tokens.num_read :]:
                more, logits = self._read(state, tokens.num_read, behind)
                embedded = self.embed_tokens(send_numbers(behind, self.device))
                state.features = torch.cat([state.features, more])
                state.embeddings = torch.cat([state.embeddings, embedded])
        state.next_logits = logits[-1].float()
        return state

    def _read(self, state: SequenceState, start: int, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Append n tokens of the prompt to the cache; return their ``[n, 4H]`` features and ``[1, V]`` logits."""
        features = []
        end = start + len(tokens)
        for first in range(start, end, _CHUNK):
            stop = min(first + _CHUNK, end)
            keys = torch.arange(stop, device=self.device)
            ids, new = send_numbers(tokens[first - start : stop - start], self.device), keys[first:]
            seen, offset = new[:, None] >= keys, state.position_offset
            logits = self.forward(ids, new, seen, keys, state.cache, logits_to_keep=1, position_offset=offset)
            state.cache.length = stop
            features.append(self.features())
        return torch.cat(features), logits

    @torch.inference_mode()
    def forward_tree(self, state: SequenceState, tree: TokenTree) -> TargetOutput:
        """Return logits and features of the root and of every draft token, in one forward.

        Args:
            state: The sequence; its last token is the root.
            tree: N draft tokens.
        """
        committed, num_rows = state.cache.length, len(tree) + 1
        if self.compiled_layers is not None:
            tree = self.compiled_layers.fill(tree, state.cache.capacity - committed)
        ids = torch.cat([state.last_tokens(1), tree.tokens])
        positions = row_depths(tree.depths, self.device) + committed
        masks = self.masks.of_tree(tree.parents, positions, committed)
        logits = self.run(ids, positions + state.position_offset, masks, state.cache, layers=self.compiled_layers)
        return TargetOutput(logits[:num_rows], self.features()[:num_rows])

    @torch.inference_mode()
    def branch_states(self, ids: Tensor, positions: Tensor, visible: Tensor) -> Tensor:
        """Return ``[n, H]`` last normed hidden states of n tokens in one forward without a cache.

        Args:
            ids: ``[n]`` token ids: a sequence, and branches that continue it in any places.
            positions: ``[n]`` positions.
            visible: ``[n, n]`` bool: which of these tokens each one attends to.
        """
        mask = self.masks.of(positions, visible, positions)
        output = self.model.get_decoder()(
            input_ids=ids[None], attention_mask=mask, position_ids=positions[None], use_cache=False
        )
        states: Tensor = output.last_hidden_state[0]
        return states

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        visible: Tensor,
        key_positions: Tensor,
        cache: PreallocatedCache,
        *,
        logits_to_keep: int = 0,
        position_offset: int = 0,
    ) -> Tensor:
        """Return ``[n, V]`` logits of n tokens (of the last ``logits_to_keep`` ones if that is not 0).

        Keys and values are written behind ``cache.length``, which stays as it is: the caller commits.

        Args:
            ids: ``[n]`` token ids.
            positions: ``[n]`` positions, counted in tokens.
            visible: ``[n, K]`` bool: which cached or new tokens each token attends to.
            key_positions: ``[K]`` positions of those, for sliding windows.
            cache: Where keys and values go.
            logits_to_keep: Rows of logits wanted; 0 means all.
            position_offset: Added to what the model's position embedding is told.
        """
        masks = self.masks.of(positions, visible, key_positions)
        return self.run(ids, positions + position_offset, masks, cache, logits_to_keep=logits_to_keep)

    def run(
        self,
        ids: Tensor,
        positions: Tensor,
        masks: Tensor | dict[str, Tensor],
        cache: PreallocatedCache | None,
        *,
        logits_to_keep: int = 0,
        layers: Callable[..., Tensor] | None = None,
        **own: Any,  # noqa: ANN401 - of the model's own code
    ) -> Tensor:
        """Return what ``forward`` does; ``layers`` run in the place of fused ones, ``own`` is for the model's own."""
        if self.fused_layers is not None:
            embedded = self.embed_tokens(ids)
            kept: dict[int, Tensor] = dict.fromkeys(self.feature_layers, embedded)
            run: Callable[..., Tensor] = layers or self.fused_layers
            self._last = run(embedded, positions, masks, cache, kept)[None]
            self._entering = kept
            rows: Tensor = self.model.get_output_embeddings()(self._last[0, -logits_to_keep:])  # all of them if 0
            return rows
        logits: Tensor = self.model(
            input_ids=ids[None],
            attention_mask=masks,
            position_ids=positions[None].clamp(max=self.max_positions - 1),  # guesses past the end are cut anyway
            cache=cache,
            use_cache=cache is not None,
            logits_to_keep=logits_to_keep,
            **own,
        ).logits[0]
        return logits

    # ---- the layers ----

    def _fuse(self) -> None:
        """Take the fused layers in the place of the model's own, if there are such and both say the same."""
        self.fused_layers = self.compiled_layers = None
        self.not_compiled = "its layers have no fused form" if self._compiled_rows else None
        layers = self._layers()
        decoder = self.model.get_decoder()
        if not can_fuse(decoder, self.config, self.attention, plain=bool(self._compiled_rows)):
            return
        probe = [index * 7 % self.vocab_size for index in range(5)]
        own = self.prefill(probe, len(probe)).features
        self.fused_layers = FusedLayers(decoder, layers, self.config)
        ours = self.prefill(probe, len(probe)).features
        if not agree(ours, own):
            self.fused_layers = None
        elif self._compiled_rows:
            self.not_compiled = compile_layers(self, self._compiled_rows, probe)
        self._cache = None  # it was made outside of any decoding, for the probe alone

    @property
    def layers_are(self) -> str:
        """``native`` or ``fused``, or ``own`` where the model's own code runs its layers."""
        fused = self.fused_layers
        return "own" if fused is None else "fused" if fused.native is None else "native"

    # ---- features ----

    def _watch(self) -> None:
        """Choose the feature layers of the model as it is now; keep what enters them and what leaves the last one."""
        middle = (2, self.num_layers // 2, self.num_layers - 3)
        self.feature_layers = tuple(min(max(layer, 0), self.num_layers - 1) for layer in middle)
        for hook in self._hooks:
            hook.remove()
        layers = self._layers()
        kept = set(self.feature_layers)
        self._hooks = [layers[i].register_forward_pre_hook(self._keeper(i), with_kwargs=True) for i in kept]
        self._hooks.append(self.model.get_decoder().register_forward_hook(self._keep_last))

    def _keeper(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._entering[index] = args[0] if args else kwargs["hidden_states"]

        return keep

    def _keep_last(self, _decoder: nn.Module, _args: object, output: Any) -> None:  # noqa: ANN401 - of transformers
        self._last = output.last_hidden_state

    def entered(self) -> list[Tensor]:
        """Return what entered the three feature layers in the last forward, whoever called the model: ``[B, n, H]``."""
        return [self._entering[layer] for layer in self.feature_layers]

    def features(self) -> Tensor:
        """Return ``[n, 4H]`` of the last forward: what entered the feature layers, then the last normed states."""
        return torch.cat([*(states[0] for states in self.entered()), self._last[0]], dim=-1)

    @contextmanager
    def as_shipped(self) -> Iterator[Any]:
        """Give the model as transformers runs it by itself (its own attention, plain weights), for the baseline."""
        self.model.set_attn_implementation("eager" if self.attention == "eager" else "sdpa")
        if self._packing is not None:
            self._packing.on = False
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(self.attention)
            if self._packing is not None:
                self._packing.on = True
