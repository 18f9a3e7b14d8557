"""Making a plain transformers model of a GGUF file.

Importing this module must stay cheap: torch and transformers are imported only when a file is converted.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from types import ModuleType

from rich.console import Console


def convert_gguf(gguf: Path, folder: Path, *, name: str, progress: bool) -> None:
    """Write a GGUF file's model as float32 safetensors, with its tokenizer and chat template, to a new folder.

    The dequantised values (scale times integer plus offset) need more than bfloat16's eight bits, so float32 is kept.

    Args:
        gguf: The file.
        folder: Made here.
        name: For the message on stderr.
        progress: Whether to show that message.
    """
    console = Console(stderr=True)  # bound to the real stderr before it is redirected
    status = console.status(f"Converting {name} to safetensors (once; about half a minute)")
    with status if progress else nullcontext(), _silence():
        import gguf as library  # noqa: PLC0415 - as the others
        import torch  # noqa: PLC0415 - not at the import of this module
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

        # transformers reads the whole file for model, config and tokenizer each, and the names once for every module.
        with _remembered(library, "GGUFReader"), _remembered(library, "get_tensor_name_map"):
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.hf_quantizer = None  # the weights are dequantised: what is saved is a plain model
        model.__dict__.pop("is_quantized", None)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _remembered(module: ModuleType, name: str) -> Iterator[None]:
    """Let a function of a library give what it gave before when it is asked the same."""
    function = getattr(module, name)
    setattr(module, name, functools.cache(function))
    try:
        yield
    finally:
        setattr(module, name, function)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the conversion's progress bars, log lines and warnings from the terminal, and put the settings back."""
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        from transformers.utils import logging  # noqa: PLC0415 - slow, and it may warn while it is imported

        verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if had_bars:
                logging.enable_progress_bar()
