"""The record: one JSON line a prompt x turn x method x mode x repeat, and the only data every number is derived from.

The schema is versioned (``schema`` is the first key of a line) so that results stay readable for as long as they are
kept; old lines live on as fixtures in ``tests/golden``. A record holds what was observed (counts, times, a hash of the
output) and nothing that can be computed from it.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Protocol, Self, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vsdbench.decoding.interfaces import without_thresholds
from vsdbench.errors import ConfigError

SCHEMA_VERSION = 1

Count: TypeAlias = Annotated[int, Field(ge=0)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0)]
Seconds: TypeAlias = NonNegative
RecordKey: TypeAlias = tuple[str, str, int, str, str, float, int]
"""Suite, prompt id, turn, method, mode, temperature, repeat: what makes a record the only one of its kind in a run."""

_OURS = f'{{"schema":{SCHEMA_VERSION},'
"""How every line begins that ``to_line`` wrote."""
NUM_BINS = 10
STEP_COLUMNS = ("num_nodes", "depth", "num_accepted", "num_emitted", "draft_ms", "verify_ms", "other_ms")


class StepLike(Protocol):
    """Anything with the counts and milliseconds of one verification step (the engine's own ``StepRecord`` is one)."""

    @property
    def num_nodes(self) -> int: ...  # noqa: D102 - each is the field of the same name in Steps
    @property
    def depth(self) -> int: ...  # noqa: D102
    @property
    def num_accepted(self) -> int: ...  # noqa: D102
    @property
    def num_emitted(self) -> int: ...  # noqa: D102
    @property
    def draft_ms(self) -> float: ...  # noqa: D102
    @property
    def verify_ms(self) -> float: ...  # noqa: D102
    @property
    def other_ms(self) -> float: ...  # noqa: D102


class Model(BaseModel):
    """Frozen, unknown keys refused, NaN and infinity refused (JSON has neither)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True, serialize_by_alias=True
    )


class Steps(Model):
    """The verification steps of one answer as columns of equal length; all empty where an engine gives totals only.

    Attributes:
        num_nodes: Draft tokens verified, root excluded (0 for plain autoregressive decoding).
        depth: Longest root-to-leaf path of the proposed tree, in draft tokens.
        num_accepted: Draft tokens kept.
        num_emitted: Tokens committed with the bonus or correction, cut at EOS and at the length limit.
        draft_ms: Time in the drafter, milliseconds.
        verify_ms: Time in the target's forward, milliseconds.
        other_ms: The rest of the step, milliseconds.
    """

    num_nodes: tuple[Count, ...] = ()
    depth: tuple[Count, ...] = ()
    num_accepted: tuple[Count, ...] = ()
    num_emitted: tuple[Annotated[int, Field(ge=1)], ...] = ()
    draft_ms: tuple[Seconds, ...] = ()
    verify_ms: tuple[Seconds, ...] = ()
    other_ms: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        lengths = {name: len(getattr(self, name)) for name in STEP_COLUMNS}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"step columns must have equal lengths, got {lengths}")
        most = [accepted + 1 for accepted in self.num_accepted]
        pairs = ((self.num_accepted, self.depth), (self.depth, self.num_nodes), (self.num_emitted, most))
        if not any(any(map(operator.gt, *pair)) for pair in pairs):
            return self
        for i, (nodes, depth, accepted, emitted) in enumerate(
            zip(self.num_nodes, self.depth, self.num_accepted, self.num_emitted, strict=True)
        ):
            if not accepted <= depth <= nodes:
                raise ValueError(f"step {i}: need num_accepted <= depth <= num_nodes, got {accepted}, {depth}, {nodes}")
            if emitted > accepted + 1:
                raise ValueError(f"step {i}: num_emitted is {emitted}, at most num_accepted + 1 = {accepted + 1}")
        return self

    def __len__(self) -> int:
        return len(self.num_emitted)

    @classmethod
    def from_steps(cls, steps: Iterable[StepLike]) -> Steps:
        """Return the columns of ``steps``; milliseconds are kept to 0.1 microseconds."""
        rows = [
            (s.num_nodes, s.depth, s.num_accepted, s.num_emitted, *(round(ms, 4) for ms in _times(s))) for s in steps
        ]
        columns = zip(*rows, strict=True) if rows else ((),) * len(STEP_COLUMNS)
        return cls.model_validate(dict(zip(STEP_COLUMNS, columns, strict=True)))


def _times(step: StepLike) -> tuple[float, float, float]:
    return step.draft_ms, step.verify_ms, step.other_ms


class Tree(Model):
    """The shape that the drafter was asked for (see ``TreeShape``)."""

    kind: str
    budget: Count
    depth: Count
    top_k: Count
    min_node_prob: NonNegative = 0.0
    min_level_prob: NonNegative = 0.0

    @model_serializer(mode="wrap")
    def _no_thresholds_go_without_saying(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_thresholds(write(self))


class Calibration(Model):
    """Draft tokens whose fate was decided, by the drafter's confidence in them: ten bins of equal width, low to high.

    A token is counted where its parent was kept (or is the root) and the answer did not end with that parent. Its
    confidence is the drafter's probability of it after that parent; it turned out true if the token was kept.

    Attributes:
        count: Tokens of each bin; one of confidence 1 belongs to the last.
        sum_confidence: Sum of their confidences.
        kept: How many of them were kept.
        brier_sum: Sum of (confidence - kept)^2 over all bins.
    """

    count: Annotated[tuple[Count, ...], Field(min_length=NUM_BINS, max_length=NUM_BINS)]
    sum_confidence: Annotated[tuple[NonNegative, ...], Field(min_length=NUM_BINS, max_length=NUM_BINS)]
    kept: Annotated[tuple[Count, ...], Field(min_length=NUM_BINS, max_length=NUM_BINS)]
    brier_sum: NonNegative

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(kept > count for kept, count in zip(self.kept, self.count, strict=True)):
            raise ValueError(f"kept is {self.kept}, which is more than count {self.count}")
        return self


class Diagnostics(Model):
    """Where the drafter's own preference and what decoding kept part, as counts that add up over records.

    The *greedy path* starts at the root and takes the drafter's likeliest child (the first of equals) as far as the
    tree goes. Of children that were drawn at random the likeliest may not be among those drawn, so then ``num_pruned``,
    ``num_greedy_steps``, ``greedy_tokens`` and ``calibration`` are None; without probabilities (a look-up) the greedy
    path is that of first choices, and ``num_pruned`` and ``calibration`` are None.

    Attributes:
        num_steps: Verification steps.
        num_pruned: Steps whose greedy path does not reach the depth asked for: its end was left out of the tree.
        num_kept_steps: Steps that kept a draft token.
        num_greedy_steps: Of these, those whose kept path is the greedy path or its beginning.
        greedy_tokens: Draft tokens kept that lie on the greedy path.
        tree_tokens: Draft tokens kept.
        calibration: The drafter's confidence against what was kept.
        kept_by_rank: Draft tokens kept by the rank of their node in its tree, most probable path from the root first,
            the first of equals before the others; up to the last rank at which anything was kept.
    """

    num_steps: Count
    num_pruned: Count | None
    num_kept_steps: Count
    num_greedy_steps: Count | None
    greedy_tokens: Count | None
    tree_tokens: Count
    calibration: Calibration | None
    kept_by_rank: tuple[Count, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.num_greedy_steps or 0) <= self.num_kept_steps <= self.num_steps >= (self.num_pruned or 0):
            raise ValueError(
                f"num_steps is {self.num_steps}, fewer than num_kept_steps ({self.num_kept_steps}), num_greedy_steps "
                f"({self.num_greedy_steps}) or num_pruned ({self.num_pruned})"
            )
        if not (self.greedy_tokens or 0) <= self.tree_tokens == sum(self.kept_by_rank):
            raise ValueError(
                f"tree_tokens is {self.tree_tokens}, which does not go with greedy_tokens ({self.greedy_tokens}) and "
                f"kept_by_rank (in all {sum(self.kept_by_rank)})"
            )
        return self


class Divergence(Model):
    """The first place where the output leaves that of the same engine's baseline.

    Attributes:
        index: Position in the output, 0-based.
        gap: The target's logit of the reference token minus that of the token emitted; None if it was not measured.
        kind: ``near_tie`` where the gap is within what rounding explains, else ``violation``.
        reference_token: The baseline's token; None if its output had already ended.
        token: The token emitted instead; None if this output had already ended.
    """

    index: Count
    gap: float | None
    kind: Literal["near_tie", "violation"]
    reference_token: int | None
    token: int | None


class Record(Model):
    """One answer of one method, as measured. Times are seconds, counts are tokens.

    ``num_output_tokens`` includes the first token, which the prefill gives; the steps emit the others, so where there
    are steps their ``num_emitted`` add up to ``num_output_tokens - 1``. ``lossless`` is the comparison with the same
    engine's baseline: ``reference`` is that baseline itself, ``unchecked`` where no token-wise comparison is defined.
    ``diagnostics`` is there for drafters in our own engine alone; lines without it (those of baselines, and those from
    before it was measured) are read, and written back, without it. ``num_image_tokens`` counts the prompt's tokens that
    stand for images; lines of text prompts leave it out.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    run_id: str
    suite: str
    suite_version: str
    prompt_id: str
    prompt_hash: str
    category: str
    turn: Count
    repeat: Count
    order_in_block: Count
    seed: int

    method: str
    kind: Literal["baseline", "drafter"]
    objective: str | None = None
    target: str
    target_fingerprint: str
    drafter_fingerprint: str | None = None
    dtype: str
    attention: str
    template_hash: str

    mode: Literal["greedy", "stochastic"]
    temperature: Annotated[float, Field(ge=0)]
    sampling_top_k: int | None = None
    top_p: float | None = None
    rule: str | None = None
    tree: Tree | None = None
    max_new_tokens: Annotated[int, Field(ge=1)]
    stop_reason: Literal["eos", "length", "context"]

    num_prompt_tokens: Count
    num_image_tokens: Count = 0
    num_output_tokens: Annotated[int, Field(ge=1)]
    output_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    prefill_s: Seconds
    decode_s: Seconds
    steps: Steps = Steps()
    diagnostics: Diagnostics | None = None
    divergence: Divergence | None = None
    lossless: Literal["equal", "near_tie", "violation", "unchecked", "reference"]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.mode == "greedy") != (self.temperature == 0):
            raise ValueError(f"mode {self.mode} does not go with temperature {self.temperature}; greedy means 0")
        emitted = sum(self.steps.num_emitted)
        if len(self.steps) and emitted != self.num_output_tokens - 1:
            raise ValueError(
                f"the steps emit {emitted} tokens, but num_output_tokens - 1 is {self.num_output_tokens - 1}"
            )
        found = self.diagnostics
        counts = (len(self.steps), sum(self.steps.num_accepted))
        if found is not None and (found.num_steps, found.tree_tokens) != counts:
            raise ValueError(
                f"diagnostics are of {found.num_steps} steps and {found.tree_tokens} kept tokens, but there are "
                f"{counts[0]} and {counts[1]}"
            )
        if self.num_image_tokens > self.num_prompt_tokens:
            raise ValueError(
                f"num_image_tokens is {self.num_image_tokens}, more than num_prompt_tokens ({self.num_prompt_tokens})"
            )
        if (self.divergence.kind if self.divergence else None) != (
            self.lossless if self.lossless in {"near_tie", "violation"} else None
        ):
            raise ValueError(f"lossless is {self.lossless!r}, which does not go with divergence {self.divergence!r}")
        return self

    @property
    def key(self) -> RecordKey:
        """What identifies the record in its run, for resuming."""
        return (self.suite, self.prompt_id, self.turn, self.method, self.mode, self.temperature, self.repeat)

    def to_line(self) -> str:
        """Return the record as one line of JSON, newline included."""
        left_out = {"diagnostics"} if self.diagnostics is None else set()
        if not self.num_image_tokens:
            left_out.add("num_image_tokens")
        return self.model_dump_json(exclude=left_out) + "\n"


def parse_record(line: str | bytes, *, where: str) -> Record:
    """Return the record of one line of ``records.jsonl``.

    Args:
        line: The JSON text.
        where: File and line number, for the message.

    Raises:
        ConfigError: The line is not JSON, is of another schema, or does not fit the schema.
    """
    if line[: len(_OURS)] in {_OURS, _OURS.encode()}:
        try:
            return Record.model_validate_json(line)  # several times as fast; what is wrong is found out below
        except ValidationError:
            pass
    try:
        data = json.loads(line)
    except ValueError as error:
        raise ConfigError(
            f"{where} is not JSON ({error}); restore the file from a copy, or delete that line and --resume the run."
        ) from error
    version = data.get("schema") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{where} has record schema {version!r}, but this version of vsdbench reads schema {SCHEMA_VERSION}; "
            "read it with the version that wrote it (its manifest.json names it)."
        )
    try:
        return Record.model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            f"{where} is not a record of schema {SCHEMA_VERSION}: {first_problem(error, 'record')}; "
            "restore the file from a copy, or delete that line and --resume the run."
        ) from error


def first_problem(error: ValidationError, whole: str) -> str:
    """Return the first thing that is wrong: the field, or what the ``whole`` is called, and why."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or whole}: {first['msg']}"


def hash_tokens(token_ids: Sequence[int]) -> str:
    """Return the sha256 (hex) of the token ids, written in decimal and joined by commas.

    >>> hash_tokens([1, 2])[:8]
    '17f8af97'
    """
    return hashlib.sha256(",".join(str(int(i)) for i in token_ids).encode()).hexdigest()
