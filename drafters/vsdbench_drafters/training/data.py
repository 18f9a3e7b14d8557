"""Training data: the target's own answers to our prompts, made once and kept.

A drafter has to predict this target, so it learns from what this target says; anybody else's text teaches it the wrong
distribution. Making the answers is the expensive part of training, so it is done by slot-wise decoding, written shard
by shard (a killed run loses at most one shard and what was being decoded), continued where it stopped, and cached
under a hash of everything that determines it.

Which answers end up in the data depends on prompt indices alone, never on which answer was done first: the shortest
run of prompts from ``start_index`` whose answers fill the budget. A later stage that wants prompts not seen before
begins at ``TrainingData.next_index``.

Answers of small models often end in loops. The evaluation's answers do too, so some of it belongs in the data, but it
is the easiest text there is: an answer is cut after ``loop_repeats`` repetitions, which leaves the budget to the rest.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self, cast

import numpy as np
from pydantic import Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from vsdbench.bars import Bars
from vsdbench.config import Config, content_hash
from vsdbench.errors import ConfigError
from vsdbench.paths import cache_dir
from vsdbench_drafters.training.answers import Encoder, Request, Response, Tally, shared_prefix
from vsdbench_drafters.training.prompts import LICENCE, WIKI_LEADS, Split, load_articles
from vsdbench_drafters.training.shards import HELDOUT_OFFSET, Answer, DataFolder, TrainingData
from vsdbench_drafters.training.sources import Prompts, prompt_sources, prompts_version, with_images

if TYPE_CHECKING:
    import torch

    from vsdbench.models.fused import FusedLayers
    from vsdbench.models.image_prompt import ImagePrompt
    from vsdbench.models.target import Target
    from vsdbench_drafters.training.generate import Layers, SlotGenerator
    from vsdbench_drafters.training.prompts import Article
    from vsdbench_drafters.training.spool import FeatureSpool

_SHARD_S = 30.0
"""Seconds of answers that a killed process may lose."""
_MAX_SKIPPED = 1000
_MAX_IDLE = 2000
"""Answers in a row that add nothing new, after which no more are asked for."""


class DataConfig(Config):
    """What training data to make.

    Attributes:
        source: Where prompts come from; ``wiki`` is our questions about encyclopedia articles, with generated
            problems and code tasks, ``grounded`` tasks whose answers repeat an article's given opening, ``scenes``
            questions about rendered pictures, for a target that reads images.
        num_tokens: Response tokens wanted; the last answer may exceed it.
        max_new_tokens: Longest answer.
        max_prompt_tokens: Prompts that are longer once rendered are left out.
        temperatures: Prompt ``i`` is answered at the ``i``-th of these, in turn (0 is greedy).
        seed: Of prompts and sampling.
        slots: Answers decoded side by side; changes the speed only.
        num_heldout: Answers to held-out prompts kept for validation, the same ones whatever ``start_index`` is.
        start_index: First prompt.
        loop_repeats: Answers end after so many exact repetitions of their tail (0: never).
        text_share: Of ``scenes``: the share of the prompts that are ``wiki``'s, without an image.
    """

    source: Literal["wiki", "grounded", "scenes"] = "wiki"
    num_tokens: int = Field(default=400_000, ge=1)
    max_new_tokens: int = Field(default=256, ge=1)
    max_prompt_tokens: int = Field(default=320, ge=1)
    temperatures: tuple[Annotated[float, Field(ge=0)], ...] = Field(default=(0.0, 1.0), min_length=1)
    seed: int = Field(default=0, ge=0)
    slots: int = Field(default=128, ge=1)
    num_heldout: int = Field(default=64, ge=0)
    start_index: int = Field(default=0, ge=0)
    loop_repeats: int = Field(default=3, ge=0)
    text_share: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _images_to_share_with(self) -> Self:
        if self.text_share and self.source != "scenes":
            raise ValueError(f"text_share is {self.text_share:g}, but source '{self.source}' has text alone")
        return self

    @property
    def shows_images(self) -> bool:
        """Whether some prompts have images."""
        return self.source == "scenes"

    @property
    def has_text(self) -> bool:
        """Whether some prompts have none."""
        return not self.shows_images or self.text_share > 0

    def content(self) -> dict[str, Any]:
        """Return what determines the data: without what only changes the speed, or has no meaning for its source."""
        return self.model_dump(mode="json", exclude={"slots"} if self.shows_images else {"slots", "text_share"})


class DataTarget(Encoder, Protocol):
    """What is needed of a target."""

    model: object
    tokenizer: object
    eos_ids: frozenset[int]
    fingerprint: str
    dtype: torch.dtype
    fused_layers: FusedLayers | None

    @property
    def template_hash(self) -> str: ...  # noqa: D102


def data_key(config: DataConfig, target: DataTarget) -> str:
    """Return the hash of everything that determines the data; known before it is made."""
    return content_hash(
        {
            "config": config.content(),
            "target": target.fingerprint,
            "template": target.template_hash,
            "dtype": str(target.dtype),
            "prompts": prompts_version(config),
            "articles": WIKI_LEADS.sha256,
        }
    )


def ensure_data(
    config: DataConfig,
    target: DataTarget,
    *,
    console: Console | None = None,
    articles: Sequence[Article] | None = None,
    excluded: frozenset[str] | None = None,
    spools: Mapping[Split, FeatureSpool] | None = None,
) -> TrainingData:
    """Return the data, from the cache or made now.

    Args:
        config: What to make.
        target: Who answers.
        console: Where progress goes, and for whom this process waits if another one makes them; None: it does not wait.
        articles: In place of the fetched ones.
        excluded: Hashes of prompts that must not be used; None means those of every evaluation suite.
        spools: Get the features of the answers that are made now; for texts, and a target with fused layers.

    Raises:
        ConfigError: No prompt fits into ``max_prompt_tokens``, or another process makes them and there is no console.
        EnvironmentProblemError: The articles cannot be fetched or the disk is full.
    """
    folder = DataFolder(cache_dir() / "data" / data_key(config, target))
    if (data := folder.open()) is None:
        with folder.lock(console):
            data = folder.open() or _make(config, target, folder, console, articles, excluded, spools or {})
    return with_images(data, config, target.encode_chat)


def _make(  # noqa: PLR0917 - what ``ensure_data`` was given
    config: DataConfig,
    target: DataTarget,
    folder: DataFolder,
    console: Console | None,
    articles: Sequence[Article] | None,
    excluded: frozenset[str] | None,
    spools: Mapping[Split, FeatureSpool],
) -> TrainingData:
    """Return the data, made now in a folder that this process holds."""
    if articles is None:
        articles = load_articles(progress=console is not None) if config.has_text else ()
    if excluded is None and config.has_text:
        from vsdbench.suites.loaders import evaluation_prompt_hashes  # noqa: PLC0415 - loads every suite

        excluded = evaluation_prompt_hashes()
    maker = _Maker(config, target, folder, prompt_sources(config, articles, excluded or frozenset()), spools)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens, {task.fields[rate]:,.0f}/s,"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bars(*columns, console=console or Console(quiet=True), disable=console is None) as progress:
        answers, next_index = maker.run(progress)
    meta = {
        "licence": LICENCE if config.has_text else "none: the prompts are rendered",
        "source": f"{WIKI_LEADS.requirement}: {WIKI_LEADS.file}" if config.has_text else "vsdbench.pictures",
        "articles_sha256": WIKI_LEADS.sha256,
        "prompts_version": prompts_version(config),
        "target": target.fingerprint,
        "dtype": str(target.dtype),
        "config": config.model_dump(mode="json"),
        "note": ("Prompts quote Wikipedia leads (CC BY-SA 4.0); " if config.has_text else "")
        + "responses were written by the target.",
    }
    return folder.finish(answers, next_index=next_index, meta=meta)


class _Maker:
    """One run of making data: which prompts are still wanted, and what has been answered so far."""

    def __init__(
        self,
        config: DataConfig,
        target: DataTarget,
        folder: DataFolder,
        prompts: tuple[Prompts, Prompts],
        spools: Mapping[Split, FeatureSpool],
    ) -> None:
        self._config = config
        self._target = target
        self._folder = folder
        self._spools = spools
        self._train, self._heldout = prompts
        self._prefix = [] if config.shows_images else shared_prefix(target)
        self._answers: dict[int, Answer] = {}
        self._seen: set[bytes] = set()
        self._num = {"train": Tally(), "heldout": Tally()}
        self._unsaved: list[Answer] = []
        self._saved = time.monotonic()
        self._idle = 0
        for answer in folder.load_shards().values():
            self._note(answer)

    def run(self, progress: Bars) -> tuple[list[Answer], int]:
        """Answer prompts until the budget is filled; return the answers to keep and the first index not used."""
        task = progress.add_task("Training data", total=self._config.num_tokens, rate=0.0)
        made, begun = 0, time.monotonic()

        def tell(generator: SlotGenerator) -> None:
            done = min(self._num["train"].tokens + self._under_way(generator), self._config.num_tokens)
            rate = (made + generator.num_made) / (time.monotonic() - begun)
            progress.update(task, completed=done, rate=rate)

        while (selection := self._select()) is None:
            generator = self._generator()
            try:
                for response in generator.stream(self._requests(generator), tick=partial(tell, generator)):
                    self._num[_split(response.request.index)].in_flight -= 1
                    answer = _answer(response)
                    if response.features is not None:
                        self._spools[_split(answer.key)].add(answer.ids, response.features)
                    self._keep(answer)
                    if self._may_be_enough() and self._select() is not None:
                        break  # what is still under way are answers to later prompts
            finally:
                made += generator.num_made
                for tally in self._num.values():
                    tally.in_flight = 0
                self._flush()
        return selection

    def _generator(self) -> SlotGenerator:
        from vsdbench_drafters.training.generate import SlotGenerator  # noqa: PLC0415 - imports torch

        config = self._config
        return SlotGenerator(
            self._target.model,
            eos_ids=self._target.eos_ids,
            slots=config.slots,
            max_prompt_tokens=config.max_prompt_tokens,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            shared_prefix=self._prefix,
            loop_repeats=config.loop_repeats,
            look=self._look if config.shows_images else None,
            fused=self._target.fused_layers,
            keeps=self._spools["train"].keeps if self._spools else None,
        )

    def _look(self, prompts: Sequence[ImagePrompt]) -> Iterator[tuple[Layers, int]]:
        """Let the target read prompts with images (``generate.Look``), no more at once than it reads together."""
        from vsdbench.models.reading import packs, read_sequences  # noqa: PLC0415 - imports torch

        for pack in packs([len(prompt) for prompt in prompts]):
            for read in read_sequences(cast("Target", self._target), [prompts[i] for i in pack], keys=True):
                yield read.layers, read.position_offset

    # ---- which prompts ----

    def _under_way(self, generator: SlotGenerator) -> int:
        """Return the tokens so far of answers for training that have not ended."""
        train, heldout = self._num["train"].in_flight, self._num["heldout"].in_flight
        return int(generator.num_under_way * train / max(1, train + heldout))

    def _requests(self, generator: SlotGenerator) -> Iterator[Request]:
        """Yield prompts that have no answer yet, in order, until those in flight will probably fill the budget."""
        train, heldout = self._num["train"], self._num["heldout"]
        for key in self._keys("heldout"):
            if heldout.answers + heldout.in_flight >= self._config.num_heldout:
                break
            yield from self._request(key, self._heldout)
        for key in self._keys("train"):
            mean = train.mean(self._config.max_new_tokens)
            # Those that have ended first are the short ones: the others have at least half of the mean before them.
            expected = max(train.in_flight * mean, self._under_way(generator) + train.in_flight * mean / 2)
            if train.tokens + expected >= self._config.num_tokens:
                break
            yield from self._request(key, self._train)

    def _keys(self, split: Split) -> Iterator[int]:
        return itertools.count(HELDOUT_OFFSET if split == "heldout" else self._config.start_index)

    def _request(self, key: int, prompts: Prompts) -> Iterator[Request]:
        """Yield the prompt's request, or note that it does not fit; nothing if it has an answer."""
        if key in self._answers:
            return
        index, config = key % HELDOUT_OFFSET, self._config
        ids = self._target.encode_chat(prompts[index].messages)
        prefix = len(self._prefix)
        if prefix < len(ids) <= config.max_prompt_tokens and list(ids)[:prefix] == self._prefix:
            self._num[_split(key)].in_flight += 1
            yield Request(key, ids, config.temperatures[index % len(config.temperatures)])
            return
        self._keep(Answer(key, np.zeros(0, dtype=np.int32), 0, 0.0, "skipped"))
        if not self._seen and len(self._answers) >= _MAX_SKIPPED:
            raise ConfigError(
                f"none of {_MAX_SKIPPED} prompts has at most {config.max_prompt_tokens} tokens, the last one has "
                f"{len(ids)}; raise 'max_prompt_tokens'."
            )

    # ---- what was answered ----

    def _keep(self, answer: Answer) -> None:
        before = len(self._seen)
        self._note(answer)
        self._unsaved.append(answer)
        if time.monotonic() - self._saved >= _SHARD_S:
            self._flush()
        self._idle = self._idle + 1 if len(self._seen) == before else 0
        if self._idle >= _MAX_IDLE:
            raise ConfigError(
                f"of {len(self._answers)} answers the last {self._idle} were empty or had been given before, and "
                f"{self._num['train'].tokens} of {self._config.num_tokens} tokens are made: this target has no more to "
                "say; lower 'data.num_tokens', or train for another."
            )

    def _digest(self, answer: Answer) -> bytes:
        """Return what makes an answer one of its kind: of two equal ones to texts, one is kept; images differ."""
        return str(answer.key).encode() if self._config.shows_images else answer.response_digest

    def _note(self, answer: Answer) -> None:
        self._answers[answer.key] = answer
        if answer.num_response_tokens and self._digest(answer) not in self._seen:
            self._seen.add(self._digest(answer))
            tally = self._num[_split(answer.key)]
            tally.answers += 1
            tally.tokens += answer.num_response_tokens

    def _flush(self) -> None:
        if self._unsaved:
            for spool in self._spools.values():
                spool.close()
            self._folder.save_shard(self._unsaved)
            self._unsaved = []
        self._saved = time.monotonic()

    def _may_be_enough(self) -> bool:
        train, heldout = self._num["train"], self._num["heldout"]
        return train.tokens >= self._config.num_tokens and heldout.answers >= self._config.num_heldout

    def _select(self) -> tuple[list[Answer], int] | None:
        """Return what to keep and the first index not used, or None while answers are missing.

        In prompt order, held-out first, each response to a text once.
        """
        kept: list[Answer] = []
        seen: set[bytes] = set()
        for split, enough in (("heldout", self._config.num_heldout), ("train", self._config.num_tokens)):
            have = 0
            for key in self._keys("heldout" if split == "heldout" else "train"):
                if have >= enough:
                    break
                answer = self._answers.get(key)
                if answer is None:
                    return None
                if answer.num_response_tokens and self._digest(answer) not in seen:
                    seen.add(self._digest(answer))
                    kept.append(answer)
                    have += 1 if split == "heldout" else answer.num_response_tokens
        return kept, key


def _split(key: int) -> Split:
    """Return what the prompt of a key is for."""
    return "heldout" if key >= HELDOUT_OFFSET else "train"


def _answer(response: Response) -> Answer:
    request = response.request
    ids = np.concatenate([np.array(list(request.prompt_ids), dtype=np.int32), response.response_ids])
    return Answer(request.index, ids, len(request.prompt_ids), request.temperature, response.stop_reason)
