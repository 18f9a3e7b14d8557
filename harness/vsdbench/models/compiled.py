"""The fused layers as one graph of ``torch.compile``: small operations become few kernels, Python leaves the step.

Every tree size that was asked for has a graph of its own, and smaller trees are filled up to the next one, so that
nothing is compiled while times are taken. On a CPU the context's length is a symbol, so that a growing context compiles
nothing again; on CUDA a graph is of the whole cache, and is replayed as a CUDA graph. The eager fused layers stay the
reference: both must say the same over a small tree, or those run.

What was compiled is counted, because a step that compiles is not a step to be timed. Drafters compile their own steps
with the same ``Graphs``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vsdbench.decoding.interfaces import TokenTree
from vsdbench.decoding.structure import extended
from vsdbench.decoding.tree import any_chain
from vsdbench.models.fused import agree
from vsdbench.paths import cache_dir

if TYPE_CHECKING:
    from vsdbench.models.fused import FusedLayers
    from vsdbench.models.kv_cache import PreallocatedCache
    from vsdbench.models.target import Target

CAPACITY_STEP = 512
"""On CUDA a cache has a multiple of so many rows, so that graphs are not made again for every length of answer."""

NOT_THE_SAME = "compiled layers do not say what the eager ones say"
_SPARE_ROWS = 32
_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_MOST_GRAPHS = 1024
"""Sizes of all drafters and targets of one process together: the compiler would stop at a few."""

Backend: TypeAlias = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class Graphs:
    """Compiles functions, and counts.

    Args:
        static: Whether no shape depends on how much is cached, as CUDA graphs must have it.
        backend: Compiles a graph, given it and its example inputs; None means the inductor.

    Attributes:
        learning: Whether a call may compile for another number of rows.
        count: Graphs compiled so far.
        seconds: What calls that compiled took.
    """

    def __init__(self, *, static: bool, backend: Backend | None = None) -> None:
        self.static = static
        self._backend = self._inductor if backend is None else backend
        self.learning = False
        self.count = 0
        self.seconds = 0.0

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function as one graph for each shape of its arguments, for ``run``."""
        return torch.compile(function, backend=self._build, dynamic=False, fullgraph=True)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401 - whatever it takes
        """Return what a compiled function does; on CUDA it is overwritten by the next run of any."""
        if self.static and torch.cuda.is_available():
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        before, started = self.count, time.perf_counter()
        result = function(*arguments)
        if self.count > before:
            self.seconds += time.perf_counter() - started
        return result

    def capacity(self, rows: int) -> int:
        """Return how many rows a cache should have that is to hold so many."""
        return -(-rows // CAPACITY_STEP) * CAPACITY_STEP if self.static else rows

    def keep_in_place(self, tensors: Iterable[Tensor]) -> None:
        """Say that arguments stay where they are: a CUDA graph copies all others, and may write into none of them."""
        if self.static:
            from torch._dynamo import mark_static_address  # noqa: PLC0415 - seconds, for those who compile

            for tensor in tensors:
                mark_static_address(tensor)

    def let_vary(self, tensors: Iterable[Tensor], dimension: int) -> None:
        """Tell the compiler, while it learns, which sizes differ from call to call; all others are fixed."""
        if self.learning and not self.static:
            from torch._dynamo import mark_dynamic  # noqa: PLC0415 - likewise

            for tensor in tensors:
                mark_dynamic(tensor, dimension)

    @contextmanager
    def learn(self) -> Iterator[None]:
        """Let calls compile, more graphs than the compiler usually does, and without its advice."""
        from torch._dynamo import config  # noqa: PLC0415 - likewise

        config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS)
        config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, _MOST_GRAPHS)
        self.learning = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, about what it does not fuse
                yield
        finally:
            self.learning = False

    def describe(self) -> dict[str, Any]:
        """Return, for a manifest, how many graphs were compiled in how many seconds."""
        return {"graphs": self.count, "seconds": self.seconds}

    def _build(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.count += 1
        return self._backend(graph, inputs)

    def _inductor(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415 - a second, for those who compile

        patches = {"triton.cudagraphs": True} if self.static else {}
        compiled: Callable[..., Any] = compile_fx(graph, inputs, config_patches=patches)  # type: ignore[assignment]
        return compiled


class CompiledLayers:
    """Runs what ``FusedLayers`` does, compiled; only behind a prompt, whose prefill has made the cache's buffers.

    Args:
        fused: The layers.
        feature_layers: Those whose inputs are kept.
        dtype: Of the layers.
        graphs: Compiles.

    Attributes:
        rows: Numbers of rows that graphs were made for; more than the largest are for the eager layers.
    """

    def __init__(
        self, fused: FusedLayers, feature_layers: Sequence[int], *, dtype: torch.dtype, graphs: Graphs
    ) -> None:
        self._fused = fused
        self._features = sorted(set(feature_layers))
        self._hidden = torch.finfo(dtype).min
        self.graphs = graphs
        self.rows: set[int] = set()
        graphs.keep_in_place(fused.weights())
        self._step = graphs.compiled(self._over_all_rows if graphs.static else self._over_what_is_there)

    def __call__(
        self,
        embedded: Tensor,
        positions: Tensor,
        masks: Tensor | dict[str, Tensor],
        cache: PreallocatedCache,
        kept: dict[int, Tensor],
    ) -> Tensor:
        """Return the ``[n, H]`` last normed states; arguments as those of ``FusedLayers``."""
        fits = cache.length + len(embedded) <= cache.capacity  # otherwise the eager layers say what is wrong
        if not fits or (len(embedded) not in self.rows and not self.graphs.learning):
            return self._fused(embedded, positions, masks, cache, kept)
        keys = [layer.keys for layer in cache.layers]
        values = [layer.values for layer in cache.layers]
        arguments: tuple[Any, ...] = embedded, positions, masks, keys, values
        if self.graphs.static:
            rows = torch.arange(cache.length, cache.length + len(embedded), device=embedded.device)
            self.graphs.keep_in_place([*keys, *values])
            arguments = embedded, positions, self._widened(masks, cache), keys, values, rows
        self.graphs.let_vary([masks] if isinstance(masks, Tensor) else masks.values(), 3)
        self.graphs.let_vary([*keys, *values], 2)
        last: Tensor
        last, entered = self.graphs.run(self._step, *arguments)
        kept.update(zip(self._features, (states[None] for states in entered), strict=True))
        return last

    def fill(self, tree: TokenTree, room: int) -> TokenTree:
        """Return a tree filled up to the next size that there is a graph for, if that fits into ``room`` cache rows."""
        num_rows = len(tree) + 1
        size = min((size for size in self.rows if num_rows <= size <= room), default=num_rows)
        if self.graphs.learning or (more := size - num_rows) == 0:
            return tree
        tokens = torch.cat([tree.tokens, tree.tokens.new_zeros(more)])
        return TokenTree(tokens, extended(tree.parents, more, -1), extended(tree.depths, more, 1), tokens.float())

    def _over_what_is_there(
        self,
        embedded: Tensor,
        positions: Tensor,
        masks: Tensor | dict[str, Tensor],
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """Attend to views of the cache that end with the new rows; how many there are, the mask says."""
        fused, count = self._fused, len(embedded)

        def attend(index: int, queries: Tensor, new_keys: Tensor, new_values: Tensor) -> Tensor:
            mask = fused.mask_of(index, masks)
            stop = mask.shape[-1]
            keys[index][:, :, stop - count : stop] = new_keys.transpose(0, 1)[None]
            values[index][:, :, stop - count : stop] = new_values.transpose(0, 1)[None]
            return fused.attend(queries, keys[index][:, :, :stop], values[index][:, :, :stop], mask)

        return self._run(embedded, positions, attend)

    def _over_all_rows(  # noqa: PLR0917 - the compiler knows them by place
        self,
        embedded: Tensor,
        positions: Tensor,
        masks: Tensor | dict[str, Tensor],
        keys: list[Tensor],
        values: list[Tensor],
        rows: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Attend to the whole cache under a mask, so that no shape depends on the context; ``rows`` are written."""
        fused = self._fused

        def attend(index: int, queries: Tensor, new_keys: Tensor, new_values: Tensor) -> Tensor:
            keys[index].index_copy_(2, rows, new_keys.transpose(0, 1)[None])
            values[index].index_copy_(2, rows, new_values.transpose(0, 1)[None])
            return fused.attend(queries, keys[index], values[index], fused.mask_of(index, masks))

        return self._run(embedded, positions, attend)

    def _run(self, embedded: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
        kept: dict[int, Tensor] = dict.fromkeys(self._features, embedded)
        last = self._fused.run(embedded, positions, attend, kept)
        return last, [kept[index][0] for index in self._features]

    def _widened(self, masks: Tensor | dict[str, Tensor], cache: PreallocatedCache) -> Tensor | dict[str, Tensor]:
        """Return masks over all rows of the cache: those behind the new ones are hidden."""
        if isinstance(masks, Tensor):
            return F.pad(masks, (0, cache.capacity - masks.shape[-1]), value=self._hidden)
        return {
            name: F.pad(mask, (0, cache.capacity - mask.shape[-1]), value=self._hidden) for name, mask in masks.items()
        }


def compile_layers(target: Target, rows: Collection[int], probe: Sequence[int]) -> str | None:
    """Let the target's tree forwards run compiled, if they then say what its fused layers say; return why not, if not.

    Args:
        target: It has fused layers.
        rows: Numbers of rows to compile for: root and draft tokens.
        probe: A prompt to compare both behind.
    """
    assert target.fused_layers is not None
    if reason := why_not(target.device):
        return reason
    graphs = Graphs(static=target.device.type == "cuda")
    compiled = CompiledLayers(target.fused_layers, target.feature_layers, dtype=target.dtype, graphs=graphs)
    return learn(target, compiled, rows, probe)


def learn(target: Target, compiled: CompiledLayers, rows: Collection[int], probe: Sequence[int]) -> str | None:
    """Do it, with layers that may have compiled something before."""
    for count in sorted(rows):
        found = []
        # Sizes that are equal here are taken for equal for ever. So the number of keys and that of the cache's rows are
        # odd, since strides are not, and differ.
        prompt = probe[: len(probe) - 1 + (len(probe) + count) % 2]
        for target.compiled_layers in (None, compiled):
            state = target.prefill(prompt, len(prompt) + count + _SPARE_ROWS)
            state.tokens.append(probe[0])
            with compiled.graphs.learn():
                found.append(target.forward_tree(state, any_chain(count - 1, target.device)).features)
        if not agree(found[1], found[0]):
            target.compiled_layers = None
            return NOT_THE_SAME
        compiled.rows.add(count)
    return None


def num_graphs(target: Target) -> int:
    """Return the graphs that were compiled for a target so far."""
    return 0 if target.compiled_layers is None else target.compiled_layers.graphs.count


def describe(target: Target) -> dict[str, Any]:
    """Return, for a manifest, how many graphs were compiled for a target, in how many seconds, or why none was."""
    layers = target.compiled_layers
    found = {"graphs": 0, "seconds": 0.0} if layers is None else layers.graphs.describe()
    return found | {"not_compiled": target.not_compiled}


def why_not(device: torch.device) -> str | None:
    """Return why nothing can be compiled for a device here, and what to do; None where it can.

    Compiled code is kept in the cache folder from now on, so that later processes find it.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # noqa: PLC0415 - as below

    if os.environ.get(_FOLDER, default_cache_dir()) == default_cache_dir():  # torch sets it itself on import
        os.environ[_FOLDER] = str(cache_dir() / "inductor")
    if device.type == "cuda":
        found = importlib.util.find_spec("triton") is not None
        return None if found else "triton is not installed: pip install triton"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler '{compiler}': install g++, or name one in CXX"
    return None
