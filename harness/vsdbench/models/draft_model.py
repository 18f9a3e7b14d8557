"""A second model beside the target, with its vocabulary: what independent draft models and assisted generation run."""

from __future__ import annotations

from vsdbench.errors import ConfigError
from vsdbench.models.source import fetch_model
from vsdbench.models.target import Target


def load_draft_model(target: Target, name: str, *, num_layers: int | None = None) -> Target:
    """Return a model that can draft for ``target``, on its device and in its dtype.

    Args:
        target: The target.
        name: Hub id, model folder or embedded model.
        num_layers: Layers after which it is cut (early exit); None keeps all.

    Raises:
        ConfigError: It has another vocabulary than the target, or not so many layers.
    """
    files = fetch_model(name)
    model = Target.load(files.path, name=name, fingerprint=files.fingerprint, device=target.device, dtype=target.dtype)
    if model.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise ConfigError(f"'{name}' has another vocabulary than '{target.name}': a draft model must share it.")
    if num_layers is not None:
        model.keep_layers(num_layers)
    return model
