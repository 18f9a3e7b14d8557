"""Can a model verify a tree at all? A few tokens say so, once, when it is loaded.

Most decoder-only models do what their mask and positions tell them. Some go by a token's place in the cache instead
(ALiBi, positions counted by the cache), carry a state from token to token, or take no such mask: they would answer
something else than they do without a drafter, so they are refused here rather than found out by wrong answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vsdbench.decoding.interfaces import TokenTree
from vsdbench.errors import ConfigError, first_line, is_out_of_memory
from vsdbench.models.device import dtype_name, send_numbers
from vsdbench.models.fused import agree
from vsdbench.models.kv_cache import PreallocatedCache

if TYPE_CHECKING:
    from torch import Tensor

    from vsdbench.models.target import Target

_NUM_PROMPT, _NUM_PATH = 5, 7
_NUM_ASIDE = 24
"""Nodes that stand between the first two nodes of a path: a model that counts them is wrong by more than rounding."""
_INSTEAD = "Use a target whose tokens attend by mask and position alone, such as Llama, Qwen or Gemma."


def check_tree(target: Target) -> None:
    """See that a path's tokens are read the same among the nodes of a tree as alone, but for rounding.

    Raises:
        ConfigError: They are not, or the model takes no tree.
    """
    ids = [(index * 7 + 3) % target.vocab_size for index in range(_NUM_PROMPT + _NUM_PATH + _NUM_ASIDE)]
    prompt, path, aside = ids[:_NUM_PROMPT], ids[_NUM_PROMPT:-_NUM_ASIDE], ids[-_NUM_ASIDE:]
    behind = range(_NUM_ASIDE + 1, _NUM_ASIDE + _NUM_PATH - 1)
    try:
        alone = _rows(target, prompt, path, range(-1, _NUM_PATH - 1))
        among = _rows(target, prompt, [path[0], *aside, *path[1:]], [*[-1] * (1 + _NUM_ASIDE), 0, *behind])
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise ConfigError(f"{_cannot(target)}: its own code stops over one ({reason}). {_INSTEAD}") from error
    if not bool(torch.isfinite(alone).all()):
        raise ConfigError(
            f"'{target.name}' computes no numbers in {dtype_name(target.dtype)}: use --dtype bf16 or fp32."
        )
    if not agree(among[1 - _NUM_PATH :], alone[1 - _NUM_PATH :]):
        raise ConfigError(
            f"{_cannot(target)}: it reads a token otherwise when other guesses stand beside it. {_INSTEAD}"
        )


def _cannot(target: Target) -> str:
    return f"'{target.name}' ({type(target.model).__name__}) cannot verify a tree"


def _rows(target: Target, prompt: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
    """Return ``[N + 1, 4H]`` features of the prompt's last token and of a tree of N nodes behind it."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent < 0 else depths[parent] + 1)
    ids = send_numbers(tokens, target.device)
    cache = PreallocatedCache(target.num_layers, len(prompt) + len(tokens))
    state = target.prefill(prompt[:-1], cache.capacity, cache)
    state.tokens.append(prompt[-1])
    return target.forward_tree(
        state, TokenTree(ids, parents, depths, torch.zeros(len(ids), device=ids.device))
    ).features
