"""The second baseline: ``generate`` of transformers on the same weights, timed token by token.

It runs the model as its users run it (stock attention, plain weights, dynamic cache). At T > 0 its next token comes
from the same keyed draw as the engine's ``coupled`` rule, so both sides emit the same tokens and equal work is
compared; the draw replaces the library's own, which costs about as much.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from vsdbench.decoding.ending import Ending
from vsdbench.decoding.interfaces import Generation
from vsdbench.decoding.sampling import SamplingParams, coupled_token, target_scores
from vsdbench.errors import ConfigError
from vsdbench.models.device import synchronize
from vsdbench.models.image_prefill import on_device
from vsdbench.models.image_prompt import ImagePrompt

if TYPE_CHECKING:
    from vsdbench.decoding.engine import DecodeSettings
    from vsdbench.models.target import Target


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each step was over and how long the sequence was then; never stops anything."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []
        self.lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Note both; return False for every sequence."""
        del scores, kwargs
        synchronize(self._device)
        self.times.append(time.perf_counter())
        self.lengths.append(int(input_ids.shape[1]))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _CoupledDraw(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the token that the keyed draw of this position picks."""

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self._params = params
        self._seed = seed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = coupled_token(target_scores(scores[0], self._params), self._seed, input_ids.shape[1])
        only = torch.full_like(scores, -torch.inf)
        only[0, token] = 0.0
        return only


@contextmanager
def only(model: Any, config: GenerationConfig) -> Iterator[None]:  # noqa: ANN401 - a transformers model
    """Let nothing but ``config`` decide: ``generate`` fills what it leaves open from the model's own defaults.

    Those may hold a repetition penalty or an end token, and then the baseline would answer something else.
    """
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def generation_config(
    target: Target,
    prompt: Sequence[int],
    settings: DecodeSettings,
    **more: Any,  # noqa: ANN401 - GenerationConfig's
) -> GenerationConfig:
    """Return how ``generate`` shall decode: greedy (keyed draws are a logits processor), up to the answer's end.

    Raises:
        ConfigError: The prompt is empty or longer than the target's context.
    """
    if not prompt:
        raise ConfigError("The prompt has no tokens: nothing can be decoded from it.")
    ending = Ending.of(target, prompt, settings)
    return GenerationConfig(
        max_new_tokens=ending.length - len(prompt),
        do_sample=False,
        eos_token_id=sorted(ending.eos_ids) or None,
        # Nothing is padded; a token of the prompt would be taken for padding and be hidden from a draft model.
        pad_token_id=min(set(range(len(prompt) + 1)) - set(prompt)),
        use_cache=True,
        **more,
    )


def keyed_processors(settings: DecodeSettings) -> LogitsProcessorList:
    """Return the logits processors that leave plain decoding's token: none when it is greedy."""
    drawn = settings.sampling.temperature > 0
    return LogitsProcessorList([_CoupledDraw(settings.sampling, settings.seed)] if drawn else [])


@torch.inference_mode()
def hf_generate(
    target: Target,
    prompt: Sequence[int],
    settings: DecodeSettings,
    **more: Any,  # noqa: ANN401 - GenerationConfig's
) -> Generation:
    """Return the answer of ``model.generate`` with its prefill and decode times (no steps: it has no trees).

    Args:
        target: The target.
        prompt: Prompt token ids.
        settings: Length and sampling.
        **more: Further fields of the generation config: another kind of cache, say.

    Raises:
        ConfigError: The prompt is empty or longer than the target's context.
    """
    config = generation_config(target, prompt, settings, **more)
    clock = Clock(target.device)
    ids = torch.tensor([list(prompt)], device=target.device)
    images = on_device(target, prompt.inputs_for(len(prompt))) if isinstance(prompt, ImagePrompt) else {}
    with target.as_shipped() as model, only(model, config):
        synchronize(target.device)
        started = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **images,
            generation_config=config,
            logits_processor=keyed_processors(settings),
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    tokens = output[0, len(prompt) :].tolist()
    return Generation(
        token_ids=tokens,
        stop_reason=str(Ending.of(target, prompt, settings).reason(output.shape[1], tokens[-1])),
        prefill_s=clock.times[0] - started,
        decode_s=clock.times[-1] - clock.times[0],
    )
