"""How the built target learns to see, in two stages, each one that can be stopped and goes on where it was.

1. ``Naming``: the tower and the projector alone. Every patch learns to put out the language model's own embedding of
   the word that says what it shows. The language model does not run, so a picture costs milliseconds.
2. ``Answering``: everything together. Scenes with all their questions go through the language model, the loss is on
   the answers alone.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.masking_utils import sdpa_mask

from vsdbench.pictures.lessons import Lesson, make_lesson, pixel_values, word_targets, word_tokens
from vsdbench.pictures.llava import image_features
from vsdbench.pictures.scenes import BACKGROUNDS, Scene
from vsdbench.pictures.settings import StageSettings

_ATTENTION = "vsdbench-lessons"
_SHARPNESS = 8.0  # of the choice among words, in squared distances between two of them
_BACKGROUND_WEIGHT = 0.2  # of a patch that shows nothing, of which there are many
_WARMUP = 0.04  # share of the steps
_LAST_LR = 0.02  # share of the learning rate at the last step


class Stage(ABC):
    """A training that can be stopped.

    Args:
        model: In fp32; trained in place.
        settings: Of the stage.
        autocast: Dtype of matrix products.
    """

    name: str
    first_scene = 0
    save_every_s = 180.0

    def __init__(self, model: LlavaForConditionalGeneration, settings: StageSettings, autocast: torch.dtype) -> None:
        self.model = model
        self.settings = settings
        self.autocast = autocast
        model.model.vision_tower.set_attn_implementation("eager")  # plain products, for the reason of ``_attend``
        for parameter in model.parameters():
            parameter.requires_grad_(requires_grad=False)
        vision = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
        language = list(model.model.language_model.layers.parameters()) if settings.language_learning_rate else []
        groups = [
            {"params": vision, "lr": settings.learning_rate},
            {"params": language, "lr": settings.language_learning_rate},
        ]
        self._parameters: list[nn.Parameter] = vision + language
        for parameter in self._parameters:
            parameter.requires_grad_()
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: _share(step, settings.num_steps))
        self._schedule = schedule
        self.done = 0

    @abstractmethod
    def loss(self, scenes: list[Scene]) -> Tensor:
        """Return the loss on a batch of training scenes, a scalar."""

    def run(self, saved: Path, report: Callable[[int, float], None] = lambda *_: None) -> None:
        """Take the steps that are left, and report the number of each and its loss.

        What is learned is written to ``saved`` once in a while and at the end.
        """
        if saved.is_file():
            self._load(saved)
        since = time.monotonic()
        while self.done < self.settings.num_steps:
            start = self.first_scene + self.done * self.settings.batch_size
            scenes = [Scene(start + index, "train") for index in range(self.settings.batch_size)]
            with torch.autocast(self.model.device.type, self.autocast, enabled=self.autocast != torch.float32):
                loss = self.loss(scenes)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            self._schedule.step()
            self.done += 1
            report(self.done, float(loss.detach()))
            if time.monotonic() - since > self.save_every_s or self.done == self.settings.num_steps:
                self._save(saved)
                since = time.monotonic()

    def _save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        state: dict[str, Any] = {"done": self.done, "trained": trained}
        if self.done < self.settings.num_steps:
            state |= {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()}
        torch.save(state, partial)
        partial.replace(path)

    def _load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["trained"], strict=False)
        self.done = state["done"]
        if self.done < self.settings.num_steps:
            self._optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])


class Naming(Stage):
    """The first stage: every patch learns the word for what it shows."""

    name = "naming patches"

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        settings: StageSettings,
        autocast: torch.dtype,
        tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    ) -> None:
        super().__init__(model, settings, autocast)
        self.words = model.get_input_embeddings().weight.detach()[word_tokens(tokenizer)].float()
        self._unit = float(torch.cdist(self.words, self.words).pow(2).mean())

    def loss(self, scenes: list[Scene]) -> Tensor:
        """Return the cross-entropy of the right word by distance, and half the distance to it."""
        labels, added = word_targets(scenes, self.words)
        features = image_features(self.model, pixel_values(scenes)).float()
        distances = self.distances(features, added).flatten(0, 1)
        right = labels.flatten()
        weights = torch.where(right < len(BACKGROUNDS), _BACKGROUND_WEIGHT, 1.0)
        losses = F.cross_entropy(-_SHARPNESS * distances, right, reduction="none")
        losses = losses + distances.gather(1, right[:, None])[:, 0] / 2
        return (losses * weights).sum() / weights.sum()

    def distances(self, features: Tensor, added: Tensor) -> Tensor:
        """Return ``[B, 81, W]`` squared distances of patches from words, in mean squared distances of two words."""
        return torch.cdist(features - added, self.words.expand(len(features), -1, -1)).pow(2) / self._unit


class Answering(Stage):
    """The second stage: the language model reads the patches and answers."""

    name = "answering questions"
    first_scene = 1_000_000

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        settings: StageSettings,
        autocast: torch.dtype,
        tokenizer: Any,  # noqa: ANN401 - as above
    ) -> None:
        super().__init__(model, settings, autocast)
        self._tokenizer = tokenizer

    def loss(self, scenes: list[Scene]) -> Tensor:
        """Return the mean cross-entropy of the answers' tokens."""
        lesson = make_lesson(scenes, self._tokenizer, self.model.config.image_token_id)
        return F.cross_entropy(answer_logits(self.model, lesson), lesson.answers)


def answer_logits(model: LlavaForConditionalGeneration, lesson: Lesson) -> Tensor:
    """Return ``[A, V]`` fp32 logits of a lesson's answer tokens, every question beside the others."""
    language: Any = model.model.language_model
    dtype = _products_dtype(model)
    embedded = model.get_input_embeddings()(lesson.ids).to(dtype)  # sums between the layers are in that dtype too
    features = image_features(model, lesson.pixels.to(model.dtype))
    embedded = embedded.masked_scatter((lesson.ids == model.config.image_token_id)[..., None], features.to(embedded))
    hidden = torch.zeros(lesson.visible.shape, dtype=dtype).masked_fill_(~lesson.visible, -torch.inf)
    with _quick(language):
        states = language(
            inputs_embeds=embedded, attention_mask=hidden, position_ids=lesson.positions, use_cache=False
        ).last_hidden_state
    logits: Tensor = model.lm_head(states.flatten(0, 1)[lesson.predicts]).float()
    return logits


def _products_dtype(model: LlavaForConditionalGeneration) -> torch.dtype:
    """Return the dtype of a model's matrix products: autocast's, or the model's own."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


@contextmanager
def _quick(language: Any) -> Iterator[None]:  # noqa: ANN401 - a transformers model
    """Let a Llama model attend by plain products and norm its states in their own dtype: fewer and smaller tensors."""
    usual = language.config._attn_implementation  # noqa: SLF001 - there is no public getter
    norms = [module for module in language.modules() if hasattr(module, "variance_epsilon")]
    language.set_attn_implementation(_ATTENTION)
    for norm in norms:
        norm.forward = partial(_norm, norm)
    try:
        yield
    finally:
        language.set_attn_implementation(usual)
        for norm in norms:
            del norm.forward


def _norm(norm: Any, states: Tensor) -> Tensor:  # noqa: ANN401 - transformers' LlamaRMSNorm
    return F.rms_norm(states, states.shape[-1:], norm.weight.to(states.dtype), norm.variance_epsilon)


def _attend(  # noqa: PLR0917 - the order is transformers'
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return ``[B, T, heads, W]`` by plain products: on CPUs the fused kernel's backward takes 3 times as long.

    Args:
        query: ``[B, heads, T, W]``.
        key: ``[B, G, T, W]``.
        value: ``[B, G, T, W]``.
        attention_mask: ``[B, 1, T, T]`` additive.
        dropout: Not used: no layer of it behaves differently while it learns.
        scaling: Of the scores; None means 1 / sqrt(W).
    """
    del dropout
    batch, heads, count, width = query.shape
    num_groups = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    scores = (query * scale).reshape(batch, num_groups, -1, width) @ key.transpose(-1, -2)
    scores = scores.view(batch, num_groups, -1, count, count) + attention_mask[:, :, None]
    mixed = torch.softmax(scores, dim=-1).view(batch, num_groups, -1, count) @ value
    return mixed.view(batch, heads, count, width).transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


def _share(step: int, num_steps: int) -> float:
    """Return the share of the learning rate at a step: a short rise, then half a cosine."""
    warmup = max(1.0, _WARMUP * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return _LAST_LR + (1 - _LAST_LR) * (1 + math.cos(math.pi * (step - warmup) / max(1.0, num_steps - warmup))) / 2
