"""EAGLE-1 and EAGLE-2 (arXiv 2401.15077, 2406.16858): one transformer layer that predicts the target's next feature.

The feature is the target's last hidden state *after* its final norm, the input of its LM head: the public code stores
``hidden_states[-1]`` of transformers, which is normed, and applies the LM head to it directly. Here it is the fourth
part of the target's features. The two versions are one drafter: EAGLE-2 differs in how trees are grown only.

Forward: ``h = x = fc([embed(next token), feature])`` goes through a Llama layer without an input norm; its un-normed
output is the predicted feature and recurs as such; logits are the target's own LM head's, frozen, on the rows that the
draft vocabulary keeps. Tensor names are those of public checkpoints (``fc``, ``layers.0``); a public one carries the
target's embeddings too, and has no draft vocabulary. Ours adds ``d2t`` and ``t2d``, as EAGLE-3's do.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vsdbench.errors import ConfigError
from vsdbench_drafters.architectures.checkpoints import (
    check_vocabulary_size,
    draft_vocabulary_of,
    embeddings_of,
    fill,
    loader,
    read_tensors,
)
from vsdbench_drafters.architectures.eagle_drafter import EagleLayer
from vsdbench_drafters.architectures.one_layer import FIRST_SHARE, DraftLayer, LayerConfig, OneLayerModel

if TYPE_CHECKING:
    from vsdbench.models.target import Target
    from vsdbench_drafters.architectures.one_layer_drafter import CachedLayer


class EagleConfig(LayerConfig):
    """Dimensions of one drafter; its width is the target's.

    Attributes:
        bias: ``fc`` has one; public checkpoints do unless they say otherwise.
        qkv_bias: Queries, keys and values have one (checkpoints for Qwen2).
    """

    label: ClassVar[str] = "EAGLE"
    described_as: ClassVar[dict[str, Any]] = {"architectures": ["LlamaForCausalLMEagle"]}
    bias: bool = True
    qkv_bias: bool = False


class EagleModel(OneLayerModel):
    """The trainable drafter. ``state_dict()`` has the tensors of an EAGLE checkpoint without the embeddings.

    Args:
        config: Dimensions.
        embeddings: ``[V, H]`` the target's token embeddings: frozen, shared, never saved.
        draft_ids: ``[Vd]`` int64, the target ids of the draft vocabulary in increasing order.
        head: ``[Vd, H]`` their rows of the target's LM head: frozen, never saved.
    """

    name: ClassVar[str] = "eagle"
    layer_class: ClassVar[type[CachedLayer]] = EagleLayer
    predicts_features: ClassVar[bool] = True
    config_class: ClassVar[type[EagleConfig]] = EagleConfig
    config: EagleConfig

    def __init__(self, config: EagleConfig, embeddings: Tensor, draft_ids: Tensor, head: Tensor) -> None:
        super().__init__(config, embeddings, draft_ids)
        self.layers = nn.ModuleList([DraftLayer(config, config.hidden_size, bias=config.qkv_bias)])
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.bias)
        self.norm = nn.Identity()
        self.frozen_head: Tensor
        self.register_buffer("frozen_head", head.detach().float(), persistent=False)

    @property
    def layer(self) -> DraftLayer:
        """The layer."""
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        return layer

    def head(self, step: int = 0) -> Tensor:  # noqa: ARG002 - one head for all steps
        """Return the target's LM head."""
        return self.frozen_head

    def project(self, features: Tensor) -> Tensor:
        """Return the target's last normed hidden states as they are."""
        return features[:, -self.config.hidden_size :]

    def mix(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``fc`` of both, which is the residual too."""
        x = self.fc(torch.cat([embedded, hidden], dim=-1))
        return x, x

    @classmethod
    def from_target(cls, target: Target, draft_ids: Tensor, *, seed: int, **options: Any) -> Self:  # noqa: ANN401 - of subclasses
        """Return a fresh drafter that predicts a share of the last feature: what the target thought a token ago.

        Args:
            target: The target.
            draft_ids: ``[Vd]`` int64, the target ids of its vocabulary in increasing order.
            seed: Of the random matrices.
            **options: Further fields of the config.
        """
        config = cls.config_class.for_target(target, len(draft_ids)).model_copy(update=options)
        model = cls(config, target.embed_tokens.weight, draft_ids.to(target.device), _head_rows(target, draft_ids))
        model.randomise(seed)
        with torch.no_grad():
            model.fc.weight.zero_()
            model.fc.weight[:, config.hidden_size :].copy_(FIRST_SHARE * torch.eye(config.hidden_size))
            model.fc.bias.zero_()
        return model.to(target.device)

    @classmethod
    def load(cls, folder: Path, target: Target) -> Self:
        """Load a checkpoint, ours or foreign, for a target.

        Raises:
            ConfigError: It is not an EAGLE checkpoint, or one for another target.
        """
        tensors = read_tensors(folder)
        fc = tensors.get("fc.weight")
        if fc is None or "layers.0.mlp.up_proj.weight" not in tensors:
            missing = "fc.weight" if fc is None else "layers.0.mlp.up_proj.weight"
            raise ConfigError(f"checkpoint '{folder}' has no tensor '{missing}', so it is not EAGLE-1 or EAGLE-2.")
        if fc.shape[1] != 2 * target.hidden_size:
            raise ConfigError(
                f"checkpoint '{folder}' takes embedding and feature {fc.shape[1]} wide, those of target "
                f"'{target.name}' are {2 * target.hidden_size}: it was trained for another target."
            )
        _check_one_layer(folder, tensors)
        config = cls.config_class.read(folder).model_copy(update=cls.shown_by(tensors))
        check_vocabulary_size(folder, config.vocab_size, target)
        draft_ids = draft_vocabulary_of(folder, config.draft_vocab_size, tensors, target)
        embeddings = embeddings_of(folder, config.hidden_size, tensors, target)
        model = cls(config, embeddings.to(target.device), draft_ids.to(target.device), _head_rows(target, draft_ids))
        fill(model, tensors, folder, config.label)
        return model.to(target.device)

    @classmethod
    def shown_by(cls, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return the fields of the config that a checkpoint's tensors say, whatever its ``config.json`` does."""
        return {"bias": "fc.bias" in tensors, "qkv_bias": "layers.0.self_attn.q_proj.bias" in tensors}


build = loader(EagleModel)


def _head_rows(target: Target, draft_ids: Tensor) -> Tensor:
    head: Tensor = target.model.get_output_embeddings().weight.detach()
    return head[draft_ids.to(head.device)]


def _check_one_layer(folder: Path, tensors: dict[str, Tensor]) -> None:
    further = sorted({name.split(".")[1] for name in tensors if name.startswith("layers.")} - {"0"})
    if further:
        raise ConfigError(f"checkpoint '{folder}' has {1 + len(further)} layers; an EAGLE drafter here has one.")
