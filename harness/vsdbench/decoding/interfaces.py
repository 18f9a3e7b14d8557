"""The contracts that everything else is built on: trees, targets, drafters.

Rows and nodes. One verification step feeds the target ``N + 1`` tokens: the *root* (the last committed token, whose
key and value are not in the cache yet) and the ``N`` draft tokens of a tree. *Node* ``i`` (0 … N-1) is a draft token;
*row* ``i + 1`` is its line in the target's output and row 0 is the root's. A parent of -1 is the root, so the row of a
node's parent is always ``parents[i] + 1``. Parents come before their children. Row ``r``'s logits are the target's
distribution of the token that *follows* row ``r``.

Shape legend: N draft tokens, V target vocabulary, H target hidden size, L prompt tokens, A accepted rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vsdbench.decoding.sampling import KeyedNoise

ShapeKind = Literal["chain", "static", "dynamic", "coupled", "sampled"]
VerifyRule = Literal["greedy", "coupled", "rejection", "traversal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeShape:
    """What a drafter may propose in one step.

    ``chain``: one path. ``static``: a fixed topology filled with the top-ranked children. ``dynamic``: grown by the
    cumulative draft probability and re-ranked to the budget (EAGLE-2, arXiv 2406.16858). ``coupled``: grown like
    ``dynamic`` by what the drafter expects of the draw, whose numbers it reads (``decoding.coupling``); for the rule of
    that name, and ``dynamic`` at temperature 0. ``sampled``: the fixed topology filled with children drawn without
    replacement from the draft distribution.

    Attributes:
        kind: One of the five above.
        budget: Draft tokens verified by one target forward, root excluded (N at most).
        depth: Longest root-to-leaf path, in draft tokens.
        top_k: Children expanded a node (1 for a chain).
        min_node_prob: A node is sent only if the product of the draft probabilities along its path is as large; 0 sends
            what the budget holds. For trees that grow, ``dynamic`` and ``coupled``, as is the next.
        min_level_prob: A level is drafted only if the nodes above it have such a product in all, since what it can add
            to the tokens of a step is less (as OPT-Tree, arXiv 2406.17276, stops); 0 drafts ``depth`` levels. Both
            make a step as large as the drafter is sure. A device must be waited for to know.
    """

    kind: ShapeKind = "dynamic"
    budget: int = 7
    depth: int = 4
    top_k: int = 4
    min_node_prob: float = 0.0
    min_level_prob: float = 0.0

    @property
    def adapts(self) -> bool:
        """Whether the number of nodes or levels depends on the drafter's probabilities."""
        return self.min_node_prob > 0 or self.min_level_prob > 0


def without_thresholds(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a shape that is written down, less thresholds of 0: before there were any, none was said.

    >>> without_thresholds({"budget": 7, "min_node_prob": 0.0, "min_level_prob": 0.5})
    {'budget': 7, 'min_level_prob': 0.5}
    """
    return {name: value for name, value in shape.items() if value or not name.startswith("min_")}


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A proposal: ``N`` draft tokens under the root (N = 0 is plain autoregressive decoding).

    Attributes:
        tokens: ``[N]`` int64, ids in the target's vocabulary.
        parents: Length N; ``parents[i]`` is -1 (the root) or a node index smaller than ``i``. Children of one parent
            are listed in the order in which verification must try them (the order in which they were drawn). A tuple
            where the shape will come again, so that what is made of it is kept; ``structure.Numbers`` where a device
            made it.
        depths: Length N; 1 for a child of the root. Of the same kind.
        log_probs: ``[N]`` float32, the drafter's log-probability of each token given its parent's path.
        draft_probs: ``[N + 1, V]`` float32 or None. Row ``r`` is the full draft distribution from which the children
            of row ``r`` were drawn without replacement (zeros for leaves). None: children were chosen
            deterministically, so their proposal distribution is a point mass each.
        has_probs: False where the drafter knows no probabilities (a look-up) and ``log_probs`` holds zeros.

    A proposal is read again after decoding, for the diagnostics: its tensors must not be written to once it was made.
    """

    tokens: Tensor
    parents: Sequence[int]
    depths: Sequence[int]
    log_probs: Tensor
    draft_probs: Tensor | None = None
    has_probs: bool = True

    def __len__(self) -> int:
        return len(self.parents)


@dataclass(frozen=True, slots=True)
class TargetOutput:
    """What one target forward over a tree gives.

    Attributes:
        logits: ``[N + 1, V]`` in the target's dtype; verification widens the rows that it visits, few of many.
        features: ``[N + 1, 4H]`` in the target's dtype: the hidden states that enter three layers, low to high, and the
            last one, normed, which the LM head multiplies. A drafter takes the part that it needs.
    """

    logits: Tensor
    features: Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """What verification decided: the accepted path and the token that follows it.

    Attributes:
        path: Accepted node indices from the root's child downwards (may be empty).
        next_token: The bonus or correction token; its distribution is what makes the rule lossless.
    """

    path: list[int]
    next_token: int


class TargetState(Protocol):
    """A sequence being decoded: its committed tokens and their cache."""

    tokens: list[int]
    """Prompt and committed tokens; the last one is the root of the next step and is not in the cache yet."""
    prompt: Sequence[int]
    """The prompt as it was given, with its images if it has any (``models.image_prompt``)."""
    features: Tensor
    """``[L, 4H]`` features of the prompt, for the drafter's own prefill."""
    next_logits: Tensor
    """``[V]`` float32 logits of the token that follows the prompt."""
    embeddings: Tensor | None
    """``[L, H]`` what the language model was given at the prompt's tokens, images included; None for text alone."""
    image_mask: Tensor | None
    """``[L]`` bool, which of the prompt's tokens stand for images; None for text alone."""
    noise: KeyedNoise | None
    """The numbers that draw its tokens under the rule ``coupled``; None under the others."""

    def commit(self, path: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Keep the root and the accepted nodes of the last forward in the cache and drop the rest.

        Args:
            path: Accepted node indices.
            tokens: Their ids, and the id of the token that follows them: the next root.

        Returns:
            ``[A + 1]`` int64, the rows that were kept, on the target's device.
        """

    def last_tokens(self, count: int) -> Tensor:
        """Return ``[count]`` int64, the last of ``tokens`` on the target's device: no copy where they are there."""


class Drafter(Protocol):
    """Proposes; only the engine verifies, commits and times.

    Life of one sequence: ``begin`` once after the target's prefill and its first sampled token, then ``propose`` and
    ``commit`` in turn. A drafter may keep state between calls but must not depend on earlier sequences.

    A drafter that cannot draft deeper than some depth, whatever it is asked for, says so by an attribute ``max_depth``.
    One that can draft for several sequences has a method ``fork() -> Drafter``, which gives another one with the same
    weights and a state of its own (``bench.methods.forks``); ``DraftsTogether`` makes that cheaper. One whose steps can
    run compiled has a method ``compile_steps(graphs: models.compiled.Graphs, shape: TreeShape) -> str | None``, which
    compiles them for trees of a shape and says why not, if not.
    """

    name: str

    def begin(self, state: TargetState, max_length: int) -> None:
        """Prepare for a new sequence of at most ``max_length`` tokens in all (``state.tokens`` ends with the root)."""

    def propose(
        self, state: TargetState, shape: TreeShape, *, temperature: float, generator: torch.Generator
    ) -> TokenTree:
        """Return a tree of at most ``shape.budget`` tokens under ``state.tokens[-1]``.

        ``temperature`` 0 means greedy decoding. Only ``sampled`` shapes draw from ``generator``.
        """

    def commit(self, state: TargetState, num_accepted: int, features: Tensor) -> None:
        """Learn what was kept, after ``state.commit``.

        Args:
            state: Its last ``num_accepted + 1`` tokens are the accepted draft tokens and the next root.
            num_accepted: Accepted draft tokens of this step.
            features: ``[num_accepted + 1, 4H]`` target features of the old root and of the accepted tokens.
        """


class Request(NamedTuple):
    """What ``Drafter.propose`` is asked for, as one value."""

    state: TargetState
    shape: TreeShape
    temperature: float
    generator: torch.Generator


@runtime_checkable
class DraftsTogether(Protocol):
    """A drafter that can draft for several sequences at once; where there are several, the engine asks for that."""

    def propose_together(self, drafters: Sequence[Any], requests: Sequence[Request]) -> list[TokenTree]:
        """Return the tree that each drafter would propose by itself.

        Args:
            drafters: Forks of one drafter, this one the first.
            requests: One each.
        """


@dataclass(slots=True)
class StepRecord:
    """One verification step as it was: counts and milliseconds, nothing derived.

    Where several sequences are decoded together, counts are of this sequence, and times of the step for all
    ``num_sequences`` of them.
    """

    num_nodes: int
    depth: int
    num_accepted: int
    num_emitted: int
    draft_ms: float
    verify_ms: float
    other_ms: float
    num_sequences: int = 1


class Drafted(NamedTuple):
    """What one step proposed and what was kept of it: references alone, from which diagnostics are counted later.

    Attributes:
        parents: Of the tree's N nodes.
        log_probs: ``[N]`` float32, wherever the drafter made them.
        path: Nodes kept, cut at the end of the answer.
        has_probs: As in ``TokenTree``.
        drawn: The children were drawn from the draft distribution.
    """

    parents: Sequence[int]
    log_probs: Tensor
    path: Sequence[int]
    has_probs: bool = True
    drawn: bool = False


@dataclass(slots=True)
class Generation:
    """One decoded answer with its raw measurements.

    Attributes:
        token_ids: Output tokens, the first (sampled from the prefill) included, cut at EOS and the limit.
        stop_reason: ``eos``, ``length`` or ``context``.
        prefill_s: Target and drafter prefill up to and including the first token.
        decode_s: Everything after it; ``len(token_ids) - 1`` tokens were emitted in this time. Where several sequences
            are decoded together: while this one was among them, without the prefills of others.
        steps: One record a verification step.
        drafted: The step's tree and what was kept of it, one a step; empty where an engine does not tell.
    """

    token_ids: list[int]
    stop_reason: str
    prefill_s: float
    decode_s: float
    steps: list[StepRecord] = field(default_factory=list)
    drafted: list[Drafted] = field(default_factory=list)

    @property
    def s_per_token(self) -> float:
        """Seconds a token, prefill apart; 0 where the answer ended with its first token."""
        return self.decode_s / max(1, len(self.token_ids) - 1)
