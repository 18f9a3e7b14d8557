"""Peers: decode loops of others, on the same weights in the same run, so that ours is not only compared with itself.

A peer is found by entry point (group ``vsdbench.peers``): called with the target and options, it returns a function
from a prompt and settings to a ``Generation``. Here are those of transformers: ``generate`` with prompt lookup, and
with a draft model (assisted generation, arXiv 2211.17192), both with a constant number of draft tokens; the library's
default adapts it to earlier prompts, so that results would depend on their order.

Both run the model as its users run it (stock attention, plain weights), like the baseline ``hf-generate``. At T > 0
every token is the keyed draw of plain decoding, so a peer emits the same tokens and equal work is compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.utils import logging

from vsdbench.decoding.baseline import Clock, generation_config, keyed_processors, only
from vsdbench.decoding.ending import Ending
from vsdbench.decoding.interfaces import Generation, StepRecord
from vsdbench.errors import ConfigError, did_you_mean
from vsdbench.models.device import synchronize
from vsdbench.models.draft_model import load_draft_model
from vsdbench.models.image_prompt import ImagePrompt

if TYPE_CHECKING:
    from vsdbench.decoding.engine import DecodeSettings
    from vsdbench.models.target import Target

Peer: TypeAlias = "Callable[[Sequence[int], DecodeSettings], Generation]"


@dataclass(slots=True)
class _Forwards:
    """When each forward of a model began and ended, and how many tokens it read."""

    device: torch.device
    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Watch a model."""
        hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, _model: nn.Module, _args: object, kwargs: Mapping[str, Any]) -> None:
        self.rows.append(int(kwargs["input_ids"].shape[1]))
        synchronize(self.device)
        self.starts.append(time.perf_counter())

    def _end(self, _model: nn.Module, _args: object, _output: object) -> None:
        synchronize(self.device)
        self.ends.append(time.perf_counter())


def build_lookup(target: Target, options: Mapping[str, Any]) -> Peer:
    """Entry point ``hf-prompt-lookup``: ``generate`` with n-grams of the text so far as drafts.

    Args:
        target: The target.
        options: ``num_tokens`` (10), drafted a step, and ``max_ngram`` (2), the longest n-gram that is looked up.

    Raises:
        ConfigError: An option is unknown or no positive whole number.
    """
    chosen = _read_options("hf-prompt-lookup", options, {"num_tokens": 10, "max_ngram": 2})

    def run(prompt: Sequence[int], settings: DecodeSettings) -> Generation:
        config = generation_config(
            target,
            prompt,
            settings,
            prompt_lookup_num_tokens=chosen["num_tokens"],
            max_matching_ngram_size=chosen["max_ngram"],
        )
        return _generate(target, prompt, settings, config)

    return run


def build_assisted(target: Target, options: Mapping[str, Any]) -> Peer:
    """Entry point ``hf-assisted``: ``generate`` with a draft model.

    Args:
        target: The target.
        options: ``model`` (as for the drafter ``draft_model``), optionally ``num_layers`` after which it is cut, and
            ``num_tokens`` (5), drafted a step.

    Raises:
        ConfigError: No model is named, it has another vocabulary, or an option is unknown or impossible.
    """
    named = {key: value for key, value in options.items() if key != "model"}
    chosen = _read_options("hf-assisted", named, {"num_tokens": 5}, also=("num_layers", "model"))
    if not options.get("model"):
        raise ConfigError("hf-assisted needs the option 'model': a hub id, a model folder or an embedded model.")
    draft = load_draft_model(target, str(options["model"]), num_layers=chosen.get("num_layers"))
    draft.model.generation_config = GenerationConfig(
        num_assistant_tokens=chosen["num_tokens"],
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )

    def run(prompt: Sequence[int], settings: DecodeSettings) -> Generation:
        with draft.as_shipped():
            return _generate(target, prompt, settings, generation_config(target, prompt, settings), draft)

    return run


@torch.inference_mode()
def _generate(
    target: Target,
    prompt: Sequence[int],
    settings: DecodeSettings,
    config: GenerationConfig,
    draft: Target | None = None,
) -> Generation:
    """Return the answer with one step a forward of the target.

    The first forward reads the prompt and verifies drafts: it is the prefill, and what it emits beyond one token is a
    step whose verification rode along, in the peer's favour.
    """
    if isinstance(prompt, ImagePrompt):
        raise ConfigError("peers of transformers are measured on text alone; leave them out of suites with images.")
    ids = torch.tensor([list(prompt)], device=target.device)
    ours, theirs, clock = _Forwards(target.device), _Forwards(target.device), Clock(target.device)
    watched_draft = theirs.of(draft.model) if draft is not None else theirs.of(nn.Identity())
    with target.as_shipped() as model, only(model, config), ours.of(model), watched_draft, _quiet():
        synchronize(target.device)
        started = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=keyed_processors(settings),
            stopping_criteria=StoppingCriteriaList([clock]),
            **({} if draft is None else {"assistant_model": draft.model}),
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    first = min([ours.starts[0], *theirs.starts[:1]])
    draft_prefill_s = theirs.ends[0] - theirs.starts[0] if theirs.starts else 0.0
    prefill_s = first - started + ours.ends[0] - ours.starts[0] + draft_prefill_s
    steps = [_step(ours, clock, index) for index in range(1, len(clock.times))]
    if emitted := clock.lengths[0] - len(prompt) - 1:
        nodes = ours.rows[0] - len(prompt) - 1
        draft_ms = 1e3 * (ours.starts[0] - first - draft_prefill_s)
        steps.insert(0, StepRecord(nodes, nodes, min(emitted - 1, nodes), emitted, draft_ms, 0.0, 0.0))
    return Generation(
        token_ids=tokens,
        stop_reason=str(Ending.of(target, prompt, settings).reason(output.shape[1], tokens[-1])),
        prefill_s=prefill_s,
        decode_s=clock.times[-1] - started - prefill_s,
        steps=steps,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the library says about arguments that it passes to itself."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _step(forwards: _Forwards, clock: Clock, index: int) -> StepRecord:
    nodes = forwards.rows[index] - 1
    emitted = clock.lengths[index] - clock.lengths[index - 1]
    return StepRecord(
        num_nodes=nodes,
        depth=nodes,
        num_accepted=min(emitted - 1, nodes),
        num_emitted=emitted,
        draft_ms=1e3 * (forwards.starts[index] - clock.times[index - 1]),
        verify_ms=1e3 * (forwards.ends[index] - forwards.starts[index]),
        other_ms=1e3 * (clock.times[index] - forwards.ends[index]),
    )


def _read_options(
    name: str, options: Mapping[str, Any], defaults: Mapping[str, int], also: Sequence[str] = ()
) -> dict[str, int]:
    for key, value in options.items():
        if key not in {*defaults, *also}:
            raise ConfigError(f"{name} has no option '{key}'.{did_you_mean(key, [*defaults, *also])}")
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name}: {key} is {value!r}; it must be a whole number of at least 1.")
    return {**defaults, **options}
