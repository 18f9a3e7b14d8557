"""Recipes: everything that determines a trained drafter, in one YAML file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from vsdbench import registry
from vsdbench.config import Config, apply_override, load_yaml, parse
from vsdbench.errors import ConfigError, did_you_mean, said_of
from vsdbench.paths import find_data
from vsdbench.suites.schema import TreeConfig
from vsdbench_drafters.training.contest import check_fresh, member, split_name
from vsdbench_drafters.training.data import DataConfig


class _Architecture(Config):
    """What all drafters have.

    Attributes:
        draft_vocab_size: Vd, how many rows an LM head has, or how many of the target's are used; a smaller one makes
            every draft step and the loss cheaper and covers less of the output.
    """

    draft_vocab_size: int = Field(default=8192, ge=16)


class Eagle3Architecture(_Architecture):
    """EAGLE-3 (arXiv 2503.01840): one layer that reads three of the target's hidden states; its LM head is trained.

    Attributes:
        copying: Start with heads that find where the last token stood before and repeat what followed it
            (``architectures.copying``); not EAGLE-3's own start, which learns that late or never.
    """

    type: Literal["eagle3"] = "eagle3"
    copying: bool = False


class EagleArchitecture(_Architecture):
    """EAGLE-1 and EAGLE-2 (arXiv 2401.15077, 2406.16858): one layer that predicts the target's last hidden state."""

    type: Literal["eagle"]


class MedusaArchitecture(_Architecture):
    """Medusa (arXiv 2401.10774): heads that each predict one of the next tokens from the target's last hidden state.

    Attributes:
        num_heads: How many tokens are predicted, so how deep a tree can be.
        num_layers: Residual blocks of a head.
    """

    type: Literal["medusa"]
    num_heads: int = Field(default=4, ge=1, le=16)
    num_layers: int = Field(default=1, ge=1, le=4)


class MsdArchitecture(_Architecture):
    """MSD (arXiv 2505.14260): EAGLE-1/2's layer, which sees an image's pieces as the target's first layer does."""

    type: Literal["msd"]


class ViSpecArchitecture(_Architecture):
    """ViSpec (arXiv 2509.15235): EAGLE-1/2's layer, which reads an image as a few vectors.

    Attributes:
        num_q: Vectors of an image: all but one stand in its place, one is added to the text behind it.
    """

    type: Literal["vispec"]
    num_q: int = Field(default=2, ge=1, le=256)


ArchitectureConfig: TypeAlias = Annotated[
    Eagle3Architecture | EagleArchitecture | MedusaArchitecture | MsdArchitecture | ViSpecArchitecture,
    Field(discriminator="type"),
]
"""Which drafter is trained, by its ``type``."""


class ObjectiveConfig(Config):
    """Which loss, by its entry-point name.

    Attributes:
        type: Name in the group ``vsdbench.objectives``.
        ttt_steps: Steps of training-time test.
        step_weight: Weight of step i is ``step_weight**i``.
        options: Further arguments of the objective.
    """

    type: str
    ttt_steps: int = Field(default=4, ge=1, le=16)
    step_weight: float = Field(default=0.8, gt=0, le=1)
    options: dict[str, Any] = Field(default_factory=dict)


class TrainingConfig(Config):
    """How it is trained.

    Attributes:
        epochs: Passes over the data; every pass has an order of its own.
        batch_tokens: Response tokens gathered for one forward (whole sequences, so slightly more).
        accumulate: Batches for one optimiser step.
        optimiser: ``adamw``, or ``muon`` for the matrices of the layer with AdamW for the rest.
        lr: Peak learning rate of the matrices, the LM head apart.
        vector_lr: Peak of norms and biases.
        head_lr: Peak of the LM head, which starts from the target's. 0 freezes it.
        weight_decay: Of the matrices.
        betas: Of AdamW.
        clip: Largest norm of a gradient.
        warmup: Share of the steps spent warming up.
        schedule: From the peak to 0: ``linear`` or ``cosine``.
        seed: Of initialisation and data order.
        ema: Decay of an exponential moving average of the weights that is judged and saved in their place; 0: none.
        features: ``online`` runs the target for every batch; ``cached`` once, to a file that later arms read.
        keys: Keep the target's keys and values of the data, so that an objective that asks about drafted tokens need
            not run the text before them again; ``auto``: if this recipe's objective asks. A contest says true, so that
            the arm that makes the features makes these too, for all arms.
        keys_gb: Largest file of keys and values, in 10⁹ bytes; the text is run again where it would be larger.
        autocast: Products in bfloat16 with float32 weights; ``auto``: if that is the target's dtype.
        checkpoint_s: Seconds between resumable checkpoints.
        compile: ``torch.compile`` for the loss; ``auto``: on GPUs.
        shard_target: Under torchrun, every process keeps a share of the target's layers, which need not fit into one.
    """

    epochs: int = Field(default=1, ge=1)
    batch_tokens: int = Field(default=256, ge=1)
    accumulate: int = Field(default=1, ge=1)
    optimiser: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=3e-3, gt=0)
    vector_lr: float = Field(default=3e-3, gt=0)
    head_lr: float = Field(default=1e-3, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = Field(default=1.0, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    schedule: Literal["linear", "cosine"] = "linear"
    seed: int = Field(default=0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    features: Literal["online", "cached"] = "cached"
    keys: bool | Literal["auto"] = "auto"
    keys_gb: float = Field(default=4.0, ge=0)
    autocast: bool | Literal["auto"] = "auto"
    checkpoint_s: float = Field(default=60.0, gt=0)
    compile: bool | Literal["auto"] = "auto"
    shard_target: bool = False

    @model_validator(mode="after")
    def _betas_in_range(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; both must lie in [0, 1)")
        return self


class EvaluationConfig(Config):
    """How a training is judged on held-out prompts: by decoding them, with the drafter as it is then.

    Attributes:
        prompts: Held-out prompts decoded at every evaluation.
        max_new_tokens: Of each.
        times: Evaluations over the training, the last one at its end.
        tree: The tree that is sent.
        temperature: 0: greedy; otherwise the sampled text of the baseline is reproduced (rule ``coupled``).
        select: ``best``: keep the weights of the evaluation with the highest tau; ``last``: those of the end.
    """

    prompts: int = Field(default=16, ge=1)
    max_new_tokens: int = Field(default=64, ge=2)
    times: int = Field(default=4, ge=1)
    tree: TreeConfig = TreeConfig()
    temperature: float = Field(default=0.0, ge=0)
    select: Literal["best", "last"] = "best"

    @model_validator(mode="after")
    def _one_tree_for_all(self) -> Self:
        if self.tree.kind == "auto":
            raise ValueError("tree.kind is 'auto', but checkpoints can only be compared with one and the same tree")
        return self


class RecipeConfig(Config):
    """One drafter: target, architecture, objective, data, training.

    Attributes:
        name: Recipe name, as its file.
        version: Raised whenever the recipe changes what it trains.
        description: One sentence for the list.
        target: Target name or folder.
        warm_start: A recipe whose drafter this training goes on from; it is trained first if it is not there.
        evaluation: Decode held-out prompts during training, and select by what they show; None: by no means.
    """

    name: str
    version: int = Field(default=1, ge=1)
    description: str = ""
    target: str
    architecture: ArchitectureConfig = Eagle3Architecture()
    objective: ObjectiveConfig
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    warm_start: str | None = None
    evaluation: EvaluationConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _eagle3_unless_said(cls, raw: Any) -> Any:  # noqa: ANN401 - whatever YAML holds
        chosen = raw.get("architecture") if isinstance(raw, dict) else None
        return raw | {"architecture": {"type": "eagle3"} | chosen} if isinstance(chosen, dict) else raw

    def content(self) -> dict[str, Any]:
        """Return what determines the weights: without names, words, and what only changes the speed.

        The warm start's own content is not part of it: ``drafter_key`` adds that.
        """
        content = self.model_dump(mode="json", exclude={"name", "version", "description", "target", "warm_start"})
        if self.evaluation is None:
            del content["evaluation"]
        if not content["architecture"].get("copying", True):
            del content["architecture"]["copying"]
        content["data"] = self.data.content()
        for speed in ("features", "keys", "keys_gb", "checkpoint_s", "compile", "shard_target"):
            del content["training"][speed]
        return content


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> RecipeConfig:
    """Return a recipe by name or path, ``key=value`` overrides applied; ``NAME:ARM@SEED`` is a member of a contest.

    Raises:
        ConfigError: No such recipe, or it is not valid.
    """
    base, arm, seed = split_name(name_or_path)
    path = find_data("recipes", base)
    raw = member(load_yaml(path), arm, seed, str(base))
    for change in overrides:
        apply_override(raw, change)
    recipe = parse(RecipeConfig, raw, where=str(path))
    check_recipe(recipe, str(path))
    return recipe


def check_recipe(recipe: RecipeConfig, where: str) -> None:
    """Check what a schema cannot: that objective and architecture fit each other, and the warm start is sound.

    Raises:
        ConfigError: The first thing that is wrong.
    """
    architecture = recipe.architecture
    with said_of(where):
        objective = make_objective(recipe.objective)
    fitting = getattr(objective, "architectures", None)
    if fitting is not None and architecture.type not in fitting:
        raise ConfigError(
            f"{where}: objective '{recipe.objective.type}' cannot train '{architecture.type}'; "
            f"set architecture.type to {' or '.join(fitting)}."
        )
    if isinstance(architecture, MedusaArchitecture) and architecture.num_heads != recipe.objective.ttt_steps:
        raise ConfigError(
            f"{where}: objective.ttt_steps is {recipe.objective.ttt_steps}, but every one of the "
            f"{architecture.num_heads} Medusa heads is a step of its own: set both to the same number."
        )
    if recipe.warm_start is not None:
        with said_of(f"{where}: warm_start"):
            warm = load_recipe(recipe.warm_start)
        check_fresh(recipe, warm, where)
        if warm.architecture.type != architecture.type:
            raise ConfigError(
                f"{where}: architecture.type is '{architecture.type}', but the warm start '{warm.name}' trains "
                f"'{warm.architecture.type}': a drafter goes on as what it is."
            )


def make_objective(config: ObjectiveConfig) -> Any:  # noqa: ANN401 - any class that follows the Objective protocol
    """Return the objective that a recipe names.

    Raises:
        ConfigError: Unknown name, an option that it does not take, or a value that is not possible.
    """
    objective = registry.load("vsdbench.objectives", config.type)
    defaults = option_defaults(objective)
    known = None if defaults is None else set(defaults)
    for name, value in config.options.items():
        if name in _OWN_FIELDS:
            raise ConfigError(f"objective.options.{name} is set twice: write it as objective.{name} alone.")
        if known is not None and name not in known:
            taken = did_you_mean(name, known) or " It takes none."
            raise ConfigError(f"objective '{config.type}' has no option '{name}'.{taken}")
        usual = (defaults or {}).get(name)
        if isinstance(usual, int | float) and not isinstance(value, int | float | None):
            raise ConfigError(
                f"objective.options.{name} is {value!r}; it should be like {usual}, which is the default."
            )
    try:
        return objective(ttt_steps=config.ttt_steps, step_weight=config.step_weight, **config.options)
    except TypeError as error:
        fixed = re.search(r"multiple values for keyword argument '(\w+)'", str(error))
        if fixed:
            raise ConfigError(
                f"objective '{config.type}' sets '{fixed[1]}' itself: remove objective.options.{fixed[1]}."
            ) from error
        raise ConfigError(
            f"objective '{config.type}' cannot use these options, {config.options}: {error}; see "
            f"`vsdbench show {config.type}`."
        ) from error


_OWN_FIELDS = ("ttt_steps", "step_weight")
"""Arguments of every objective that a recipe gives beside the options."""


def option_defaults(objective: Callable[..., Any]) -> dict[str, Any] | None:
    """Return the options of an objective with their defaults, those of its base classes too; None: it takes any."""
    makers: list[Callable[..., Any]] = [objective]
    if isinstance(objective, type):
        makers = [vars(cls)["__init__"] for cls in objective.__mro__ if "__init__" in vars(cls)]
    found: dict[str, Any] = {}
    for maker in makers:
        parameters = inspect.signature(maker).parameters.values()
        named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        options = {parameter.name: parameter.default for parameter in parameters if parameter.kind in named}
        found = options | found
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            return {name: default for name, default in found.items() if name not in {"self", *_OWN_FIELDS}}
    return None
