"""What verification thinks of a drafted token and of a drafted path: a_t, κ and U.

Shape legend: any leading shape ``[...]``, L tokens of a path. q and p are the models' probabilities of the drafted
tokens.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from vsdbench_drafters.objectives.base import TINY

Acceptance = Literal["sampled", "tree", "greedy"]


def acceptance(model: Acceptance, q: Tensor, p: Tensor, is_choice: Tensor) -> Tensor:
    """Return ``[...]`` a_t, the chance that verification keeps a drafted token (this project's reconstruction).

    ``sampled``: min(1, p / q), rejection sampling of tokens drawn from q. ``tree``: p, a child that was chosen
    deterministically, T > 0. ``greedy``: 1 if the token is the target's choice, T = 0.

    >>> import torch
    >>> acceptance("sampled", torch.tensor([0.5, 0.2]), torch.tensor([0.1, 0.4]), torch.tensor([False, True]))
    tensor([0.2000, 1.0000])
    """
    if model == "sampled":
        return (p / q.clamp(min=TINY)).clamp(max=1.0)
    return p if model == "tree" else is_choice.to(p.dtype)


def expected_length(accept: Tensor) -> Tensor:
    """Return ``[...]`` U = Σ_j ∏_{k ≤ j} a_k, the expected number of accepted tokens; ``accept`` is ``[..., L]``.

    Tokens behind a path's end have a = 0.

    >>> import torch
    >>> expected_length(torch.tensor([0.5, 0.5, 0.0]))
    tensor(0.7500)
    """
    return accept.cumprod(-1).sum(-1)


def log_validity(accept: Tensor, valid: Tensor) -> Tensor:
    """Return ``[...]`` log κ = Σ_t log a_t over the valid tokens; both arguments are ``[..., L]``."""
    return (accept.clamp(min=TINY).log() * valid).sum(-1)


def elbo(log_q: Tensor, log_p: Tensor, accept: Tensor, valid: Tensor) -> Tensor:
    """Return ``[...]`` log κ + log p - log q of each path.

    Its mean over paths drawn from q estimates the paper's objective E_q[log κ] - KL(q ‖ p), which bounds
    log Σ_z p(z) κ(z) from below (Jensen) and meets it where q(z) ∝ p(z) κ(z).
    """
    return log_validity(accept, valid) + ((log_p - log_q) * valid).sum(-1)
