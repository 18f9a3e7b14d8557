"""Tensors of an EAGLE-3 checkpoint on disk: read from either of the two public forms, written atomically."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vsdbench.errors import ConfigError

if TYPE_CHECKING:
    from vsdbench.models.target import Target
    from vsdbench_drafters.architectures.eagle3 import Eagle3Config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of ``model.safetensors``, or of ``pytorch_model.bin`` read without running its code.

    Raises:
        ConfigError: Neither file is there, or it is damaged.
    """
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    try:
        if safe.exists():
            tensors: dict[str, Tensor] = load_file(safe)
        elif pickled.exists():
            tensors = torch.load(pickled, map_location="cpu", weights_only=True)
        else:
            raise ConfigError(f"'{folder}' has neither model.safetensors nor pytorch_model.bin.")
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the weights in '{folder}' cannot be read ({reason}); fetch or train them again.") from error
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def write_tensors(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write ``config.json`` and ``model.safetensors``; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.safetensors.partial"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(folder / "model.safetensors")
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(folder / "config.json")


def check_fits(folder: Path, config: Eagle3Config, tensors: dict[str, Tensor], target: Target) -> tuple[Tensor, Tensor]:
    """Return ``(draft_ids [Vd], embeddings [V, H])`` of a checkpoint that fits the target.

    Raises:
        ConfigError: It does not, with the reason.
    """
    fc = tensors.get("fc.weight")
    if fc is None:
        raise ConfigError(f"checkpoint '{folder}' has no tensor 'fc.weight', so it is not EAGLE-3.")
    if fc.shape[1] != 3 * target.hidden_size:
        raise ConfigError(
            f"checkpoint '{folder}' takes features {fc.shape[1]} wide, but three layers of target '{target.name}' "
            f"give {3 * target.hidden_size}: it was trained for another target."
        )
    if config.vocab_size != target.vocab_size:
        raise ConfigError(
            f"checkpoint '{folder}' was trained for a vocabulary of {config.vocab_size} tokens, target "
            f"'{target.name}' has {target.vocab_size}: use the target it was trained for."
        )
    size = config.draft_vocab_size
    offsets = tensors.get("d2t")
    if offsets is None and size < target.vocab_size:
        raise ConfigError(f"checkpoint '{folder}' has a draft vocabulary of {size} but no 'd2t' map to target ids.")
    if offsets is None:
        offsets = torch.zeros(size, dtype=torch.int64)
    draft_ids = offsets.to(torch.int64).cpu() + torch.arange(len(offsets))
    if len(offsets) != size or int(draft_ids.min()) < 0 or int(draft_ids.max()) >= target.vocab_size:
        raise ConfigError(f"checkpoint '{folder}': 'd2t' does not map {size} draft ids into the target's vocabulary.")
    if size < target.vocab_size and not bool(offsets.any()):
        raise ConfigError(f"checkpoint '{folder}': 'd2t' is all zero, so the vocabulary map was never written.")
    if len(set(draft_ids.tolist())) != size:
        raise ConfigError(f"checkpoint '{folder}': 'd2t' maps two draft ids to one target id.")
    embeddings = tensors.get("embed_tokens.weight", target.embed_tokens.weight.detach())
    if tuple(embeddings.shape) != (target.vocab_size, config.hidden_size):
        raise ConfigError(
            f"checkpoint '{folder}' is {config.hidden_size} wide, but its token embeddings are "
            f"{tuple(embeddings.shape)}: it has to carry its own 'embed_tokens.weight'."
        )
    return draft_ids, embeddings
