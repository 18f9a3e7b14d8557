"""A model folder's weights, tokenizer and processor, by the classes of transformers that its config asks for.

And where in a model the engine finds what it needs: its layers, its attention, the tokens that end an answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging

from vsdbench.errors import ConfigError, first_line, is_out_of_memory
from vsdbench.models import attention
from vsdbench.models.encoding import load_processor, reads_images

_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers raises over folders that are broken, incomplete or of another kind."""


def load_model(
    path: Path, name: str, device: torch.device, dtype: torch.dtype, *, trust_remote_code: bool
) -> tuple[Any, Any, Any]:
    """Return the model on its device, its tokenizer and, if it reads images, its processor.

    Raises:
        ConfigError: The folder is not a decoder-only model that transformers knows, or lacks some of its weights.
        EnvironmentProblemError: Its processor needs a package that is not installed.
    """
    logging.disable_progress_bar()
    local: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path, **local)
        sees = reads_images(config)
        kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model, found = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **local)
        tokenizer = None if sees else AutoTokenizer.from_pretrained(path, **local)
    except _UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"'{name}' cannot be loaded as a decoder-only model: {first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):  # transformers would go on with random ones
        raise ConfigError(
            f"'{name}' lacks {len(missing)} of the weights of a {type(model).__name__} ({missing[0]}, ...): "
            "give a folder that holds the whole model, its language-model head included."
        )
    model = model.to(device)
    if not sees:
        return model, tokenizer, None
    processor = load_processor(path, config, name=name, trust_remote_code=trust_remote_code)
    return model, processor.tokenizer, processor


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:  # noqa: ANN401 - of transformers
    """Return the tokens that end an answer, as the generation config and the tokenizer name them."""
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for value in (getattr(generation, "eos_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if value is not None:
            found.update(value if isinstance(value, list | tuple) else [value])
    return frozenset(found)


def layer_stack(model: Any, count: int, name: str) -> tuple[nn.Module, str]:  # noqa: ANN401 - a transformers model
    """Return the module that holds the model's decoder layers, and the attribute it holds them in.

    Raises:
        ConfigError: The model has no such list.
    """
    for attribute, child in model.get_decoder().named_children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return model.get_decoder(), attribute
    raise ConfigError(f"'{name}' ({type(model).__name__}) keeps its {count} layers in no list: it cannot be a target.")


def choose_attention(config: Any) -> str:  # noqa: ANN401 - a transformers config
    """Return ours, or the model's own eager attention where scores are soft-capped or have sinks."""
    if getattr(config, "attn_logit_softcapping", None) is not None or config.model_type == "gpt_oss":
        return "eager"
    return attention.register()


def pin_rotary(decoder: nn.Module) -> int | None:
    """Keep rotary embeddings from changing with the length; return the tokens up to which they would not (None: any).

    Some (``dynamic``, ``longrope``) turn by other angles once a sequence is longer than what the model was first
    trained for. The guesses at the end of a tree would decide that for tokens that are kept, and the keys in the cache
    were turned by the old angles.
    """
    limits: list[int] = []
    for module in decoder.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if not isinstance(kinds, str | dict):
            continue
        config: Any = module.config
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        for layer_type, kind in by_layer.items():
            if "dynamic" in kind:
                limits.append(config.max_position_embeddings)
            elif kind == "longrope":
                parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
                limits.append(parameters["original_max_position_embeddings"])
        if limits:
            module.rope_type = "default" if isinstance(kinds, str) else dict.fromkeys(kinds, "default")  # type: ignore[assignment]
    return min(limits, default=None)
