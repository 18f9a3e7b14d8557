"""EAGLE-3 (arXiv 2503.01840): one transformer layer that drafts from three of the target's hidden states.

The model for training and its checkpoint format. Tensor names are those of the public checkpoints, so a drafter
trained here loads elsewhere and one trained elsewhere loads here; the decode-time drafter is in ``eagle3_drafter``.

Forward: ``h = fc(features)``; ``x = [input_layernorm(embed(next token)), hidden_norm(h)]`` goes through attention, the
residual is the un-normed ``h``; the un-normed output recurs as the next ``h``; logits are ``lm_head(norm(output))``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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
from vsdbench_drafters.architectures.eagle3_drafter import Eagle3Layer
from vsdbench_drafters.architectures.layers import RMSNorm
from vsdbench_drafters.architectures.one_layer import FIRST_SHARE, DraftLayer, LayerConfig, OneLayerModel

if TYPE_CHECKING:
    from vsdbench.models.target import Target
    from vsdbench_drafters.architectures.one_layer_drafter import CachedLayer


class Eagle3Config(LayerConfig):
    """Dimensions of one drafter.

    Attributes:
        target_hidden_size: Width of the target's hidden states; ``fc`` takes three of them.
    """

    label: ClassVar[str] = "EAGLE-3"
    described_as: ClassVar[dict[str, Any]] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "attention_bias": False,
        "mlp_bias": False,
    }
    target_hidden_size: int


class _MidLayer(DraftLayer):
    hidden_norm: RMSNorm
    input_layernorm: RMSNorm

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config, 2 * config.hidden_size, norms=("hidden_norm", "input_layernorm"))


class Eagle3Model(OneLayerModel):
    """The trainable drafter. ``state_dict()`` has exactly the tensors of an EAGLE-3 checkpoint.

    Args:
        config: Dimensions.
        embeddings: ``[V, H]`` the target's token embeddings: frozen, shared, never saved.
        draft_ids: ``[Vd]`` int64, the target ids of the draft vocabulary in increasing order.
    """

    name: ClassVar[str] = "eagle3"
    layer_class: ClassVar[type[CachedLayer]] = Eagle3Layer
    config: Eagle3Config

    def __init__(self, config: Eagle3Config, embeddings: Tensor, draft_ids: Tensor) -> None:
        super().__init__(config, embeddings, draft_ids)
        self.fc = nn.Linear(3 * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = _MidLayer(config)
        self.norm: RMSNorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)

    @property
    def layer(self) -> DraftLayer:
        """The layer."""
        return self.midlayer

    def head(self, step: int = 0) -> Tensor:  # noqa: ARG002 - one head for all steps
        """Return the LM head."""
        return self.lm_head.weight

    def project(self, features: Tensor) -> Tensor:
        """Return ``[n, H]`` made from the three hidden states that enter layers of the target."""
        hidden: Tensor = self.fc(features[:, : self.fc.in_features])
        return hidden

    def mix(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, normed, side by side; the residual is ``hidden`` as it is."""
        layer = self.midlayer
        return torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(hidden)], dim=-1), hidden

    @classmethod
    def from_target(cls, target: Target, draft_ids: Tensor, *, seed: int) -> Eagle3Model:
        """Return a fresh drafter whose LM head, final norm and first features are the target's.

        The LM head starts as the target's rows of the draft vocabulary, and ``fc`` passes the highest of the three
        features through, so that the output starts from what the target thought of the *previous* token. The final
        norm is shrunk, because that guess is confident and wrong: at full size the first loss is twice as high.
        """
        config = Eagle3Config.for_target(target, len(draft_ids))
        model = cls(config, target.embed_tokens.weight.detach(), draft_ids.to(target.device))
        model.randomise(seed)
        with torch.no_grad():
            model.fc.weight.zero_()
            model.fc.weight[:, 2 * config.target_hidden_size :].copy_(torch.eye(config.hidden_size))
            head = target.model.get_output_embeddings().weight
            model.lm_head.weight.copy_(head[draft_ids.to(head.device)])
            final_norm = getattr(target.model.get_decoder(), "norm", None)
            if final_norm is not None:
                model.norm.weight.copy_(FIRST_SHARE * final_norm.weight)
        return model.to(target.device)

    @classmethod
    def load(cls, folder: Path, target: Target) -> Eagle3Model:
        """Load a checkpoint, ours or foreign, for a target.

        Raises:
            ConfigError: It is not an EAGLE-3 checkpoint, or one for another target.
        """
        tensors = read_tensors(folder)
        fc = tensors.get("fc.weight")
        if fc is None:
            raise ConfigError(f"checkpoint '{folder}' has no tensor 'fc.weight', so it is not EAGLE-3.")
        if fc.shape[1] != 3 * target.hidden_size:
            raise ConfigError(
                f"checkpoint '{folder}' takes features {fc.shape[1]} wide, but three layers of target '{target.name}' "
                f"give {3 * target.hidden_size}: it was trained for another target."
            )
        config = Eagle3Config.read(folder)
        check_vocabulary_size(folder, config.vocab_size, target)
        draft_ids = draft_vocabulary_of(folder, config.draft_vocab_size, tensors, target)
        embeddings = embeddings_of(folder, config.hidden_size, tensors, target)
        model = cls(config, embeddings.to(target.device), draft_ids.to(target.device))
        fill(model, tensors, folder, config.label)
        return model.to(target.device)


build = loader(Eagle3Model)
