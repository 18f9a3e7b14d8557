"""Tensors of a drafter's checkpoint on disk: read from any of the public forms, checked, written atomically."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vsdbench.errors import ConfigError, EnvironmentProblemError, is_disk_full
from vsdbench.store.files import write_atomic

if TYPE_CHECKING:
    from vsdbench.decoding.interfaces import Drafter
    from vsdbench.models.target import Target
    from vsdbench_drafters.objectives.base import DraftModel

VOCABULARY = frozenset({"d2t", "t2d"})
"""Tensors that say which target tokens the drafter knows."""


def loader(model: type[Any]) -> Callable[..., Drafter]:
    """Return the entry point of an architecture, ``build(target, checkpoint, options)``: all it takes is a checkpoint.

    Args:
        model: Its class, with ``name``, ``load(folder, target)`` and ``drafter(dtype)``.
    """

    def build(target: Target, *, checkpoint: Path | None, options: dict[str, Any]) -> Drafter:
        """Load a checkpoint for decoding.

        Args:
            target: The target that it drafts for.
            checkpoint: The checkpoint folder.
            options: None are known.

        Raises:
            ConfigError: No checkpoint, an unknown option, or a checkpoint that does not fit the target.
        """
        if options:
            raise ConfigError(
                f"drafter '{model.name}' has no option '{next(iter(options))}'; it takes only a checkpoint."
            )
        if checkpoint is None:
            raise ConfigError(f"drafter '{model.name}' needs a checkpoint folder, or a recipe that trains one.")
        drafter: Drafter = model.load(checkpoint, target).drafter(target.dtype)
        return drafter

    build.__module__ = model.__module__  # whose docstring describes it
    return build


def read_tensors(folder: Path, also: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of ``model.safetensors``, or of ``pytorch_model.bin`` read without running its code.

    Args:
        folder: The checkpoint.
        also: Further file names, tried after those two.

    Raises:
        ConfigError: None of the files is there, or it is damaged.
    """
    names = ["model.safetensors", "pytorch_model.bin", *also]
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        listed = f"neither {', '.join(names[:-1])} nor {names[-1]}"
        raise ConfigError(f"'{folder}' has {listed}.")
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the weights in '{folder}' cannot be read ({reason}); fetch or train them again.") from error
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def save_whole(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, its folder made, that appears whole or not at all.

    Raises:
        EnvironmentProblemError: The disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise EnvironmentProblemError(f"the disk is full: {path} cannot be written; free some space.") from error
        raise
    partial.replace(path)


def write_tensors(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write ``config.json`` and ``model.safetensors``; each appears whole or not at all.

    Raises:
        EnvironmentProblemError: The disk is full.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_whole(folder / "model.safetensors", plain)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomic(folder / "config.json", text.encode())


def draft_vocabulary_of(folder: Path, size: int, tensors: dict[str, Tensor], target: Target) -> Tensor:
    """Return ``[Vd]`` int64, the target ids of a checkpoint's draft vocabulary: the whole one where it has no map.

    Args:
        folder: The checkpoint.
        size: Vd, as its config or its LM head says.
        tensors: Its tensors.
        target: The target.

    Raises:
        ConfigError: The map is missing or does not fit the target.
    """
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
    return draft_ids


def check_vocabulary_size(folder: Path, size: int, target: Target) -> None:
    """Check that a checkpoint was trained for a vocabulary as large as the target's.

    Raises:
        ConfigError: It was not.
    """
    if size != target.vocab_size:
        raise ConfigError(
            f"checkpoint '{folder}' was trained for a vocabulary of {size} tokens, target "
            f"'{target.name}' has {target.vocab_size}: use the target it was trained for."
        )


def embeddings_of(folder: Path, hidden_size: int, tensors: dict[str, Tensor], target: Target) -> Tensor:
    """Return ``[V, H]`` token embeddings: the checkpoint's own, or else the target's.

    Raises:
        ConfigError: They are not as wide as the drafter.
    """
    embeddings = tensors.get("embed_tokens.weight", target.embed_tokens.weight.detach())
    if tuple(embeddings.shape) != (target.vocab_size, hidden_size):
        raise ConfigError(
            f"checkpoint '{folder}' is {hidden_size} wide, but its token embeddings are "
            f"{tuple(embeddings.shape)}: it has to carry its own 'embed_tokens.weight'."
        )
    return embeddings


def fill(
    model: DraftModel,
    tensors: dict[str, Tensor],
    folder: Path,
    kind: str,
    *,
    stored_as: Callable[[str], str] = str,
    described_by: str = "config.json",
) -> None:
    """Load a checkpoint's tensors; those that the drafter has no use for are left out.

    Args:
        model: The drafter, vocabulary already set.
        tensors: The tensors.
        folder: Where they are from.
        kind: What the checkpoint is, for the message.
        stored_as: From a name of ``state_dict()`` to the name on disk.
        described_by: What the drafter's dimensions were read from.

    Raises:
        ConfigError: One is missing or has another shape than the drafter's dimensions say.
    """
    names = {name: stored_as(name) for name in model.state_dict() if name not in VOCABULARY}
    try:
        model.load_state_dict({name: tensors[own] for name, own in names.items() if own in tensors}, strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"checkpoint '{folder}' does not match its own {described_by}: {reason}") from error
    missing = [own for own in names.values() if own not in tensors]
    if missing:
        raise ConfigError(f"checkpoint '{folder}' lacks the tensor '{missing[0]}', which {kind} needs.")
