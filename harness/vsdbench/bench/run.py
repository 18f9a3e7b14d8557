"""One suite from its name to its summary: resolve, load, train what is missing, decode, store, summarise."""

from __future__ import annotations

import secrets
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vsdbench.bars import counting_bars
from vsdbench.bench.batch_runner import check_batches, run_batches
from vsdbench.bench.calibration import calibration_prompts
from vsdbench.bench.conversation import check_prompts
from vsdbench.bench.examples import keep_examples
from vsdbench.bench.exchange import Misled, exchanged_prompts
from vsdbench.bench.methods import Method, build_methods, check_fork
from vsdbench.bench.runner import Progress as Done
from vsdbench.bench.runner import Runner
from vsdbench.bench.summary import Summary, summarise, summary_frame
from vsdbench.config import content_hash
from vsdbench.errors import ConfigError, VsdbenchError
from vsdbench.models import native
from vsdbench.models.compiled import describe
from vsdbench.models.device import choose_device, choose_dtype, dtype_name
from vsdbench.models.source import fetch_model
from vsdbench.models.target import Target
from vsdbench.models.together import check_together
from vsdbench.paths import results_dir
from vsdbench.provenance import differences, machine
from vsdbench.store.batches import load_batches
from vsdbench.store.store import RunStore, find_run, list_runs, load_manifest, load_records
from vsdbench.suites.loaders import Suite, load_suite
from vsdbench.suites.schema import check_plugins

if TYPE_CHECKING:
    from rich.console import Console


class InterruptedRunError(VsdbenchError):
    """The user stopped a run; what was measured is on disk."""

    exit_code = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What the command line says about a run, beside the suite.

    Attributes:
        overrides: ``key=value`` changes to the suite.
        target: Another target than the suite's.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``bf16``, ``fp16``, ``fp32`` or ``fp64``.
        limit: Prompts to take, stratified by category.
        resume: Continue the newest unfinished run of the same suite and settings.
        run: Continue this run (an id, a unique beginning of it, or ``latest``).
        results: Folder of runs.
        trust_remote_code: Whether a hub model may bring code.
        compiled: Numbers of rows for which the target's steps shall run compiled.
        load_on_cpu: The target is loaded there, since the device cannot hold it until it is sharded.
    """

    overrides: Sequence[str] = ()
    target: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    limit: int | None = None
    resume: bool = False
    run: str | None = None
    results: Path | None = None
    trust_remote_code: bool = False
    compiled: Sequence[int] = ()
    load_on_cpu: bool = False


def load_target(name: str, options: RunOptions, console: Console) -> Target:
    """Return the target on its device, fetched first if need be, and say what it runs as.

    Raises:
        ConfigError: No such model, device or dtype.
        EnvironmentProblemError: It cannot be fetched, or the device is not there.
    """
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    if device.type == "cpu":
        native.prepare()
    files = fetch_model(name, progress=not console.quiet, trust_remote_code=options.trust_remote_code)
    if files.note:
        console.print(f"[yellow]note:[/] {files.note}")
    target = Target.load(
        files.path,
        name=name,
        fingerprint=files.fingerprint,
        device=choose_device("cpu") if options.load_on_cpu else device,
        dtype=dtype,
        trust_remote_code=options.trust_remote_code,
        packed=not options.load_on_cpu,
        compiled=options.compiled,
    )
    if options.compiled and target.compiled_layers is not None:
        console.print(f"compiled its steps in {target.compiled_layers.graphs.seconds:.0f} s")
    elif options.compiled:
        console.print(f"[yellow]note:[/] its steps run as they are, not compiled: {target.not_compiled}")
    console.print(f"target {name} ({files.fingerprint}) on {device}, {dtype_name(dtype)}")
    return target


def open_suite(name: str | Suite, options: RunOptions, console: Console) -> Suite:
    """Return the suite with the command line's changes applied; downloads show their progress unless it is quiet.

    One that was made ready before is taken as it is.

    Raises:
        ConfigError: Unknown suite, key or value, or a suite without prompts.
        EnvironmentProblemError: Its data cannot be fetched.
    """
    if isinstance(name, Suite):
        return name
    overrides = [*options.overrides, *([f"target={options.target}"] if options.target else [])]
    return load_suite(name, overrides, limit=options.limit, progress=not console.quiet)


def run_suite(
    name: str | Suite,
    options: RunOptions,
    console: Console,
    *,
    extra: Callable[[Sequence[Method]], Mapping[str, Any]] | None = None,
) -> tuple[Path, Summary]:
    """Run a suite and return its folder and its summary.

    Args:
        name: Suite name or path, or a suite that is ready.
        options: From the command line.
        console: Where notes and progress go (stderr).
        extra: Gives further keys of a new run's manifest, once its drafters are trained.

    Raises:
        InterruptedRunError: Ctrl-C; everything measured so far is kept.
    """
    suite = open_suite(name, options, console)
    check_plugins(suite.config, str(suite.path))
    check_batches(suite)
    for note in suite.notes:
        console.print(f"[yellow]note:[/] {note}")
    target = load_target(suite.config.target, replace(options, compiled=suite.config.compiled_rows), console)
    check_prompts(target, suite)  # before anything is trained
    check_together(target, max(suite.config.batch_sizes))
    if any(entry.images == "shuffled" for entry in suite.config.drafters):
        exchanged_prompts(suite)  # likewise
    key = run_key(suite, target)
    found = _find_resumable(key, options, console)
    methods = build_methods(
        suite.config,
        target,
        console=console,
        calibration=calibration_prompts(suite, target),
        chosen=_chosen_trees(found),
    )
    for method in methods:
        if method.drafter is not None:
            check_fork(method.drafter, max(suite.config.batch_sizes))
    more = extra(methods) if extra and not found else {}
    store = RunStore.open(found) if found else _create(suite, target, methods, key, options, more)
    with store:
        _check_same_drafters(store, methods)
        if found:
            _note_going_on(store, console)
        for note in store.notes:
            console.print(f"[yellow]note:[/] {note}")
        with _display(console) as (on_progress, on_batch):
            runner = Runner(suite, target, methods, store, on_progress)
            try:
                runner.run()
                run_batches(runner, store, on_batch)
            except KeyboardInterrupt as error:
                kept = len(load_records(store.directory))  # Ctrl-C may fall between writing a record and noting it
                raise InterruptedRunError(
                    f"Interrupted: {kept} of {runner.total} decodes are kept in {store.directory}; "
                    "the same command with --resume goes on from there."
                ) from error
        keep_examples(store.directory, suite, partial(target.tokenizer.decode, clean_up_tokenization_spaces=False))
        graphs = describe(target) | {"graphs_while_timed": runner.num_late_graphs} if suite.config.compile else None
        store.update_manifest(status="complete", finished=_now(), machine_after=machine(), compiled=graphs)
        if runner.num_late_graphs:
            console.print(
                f"[yellow]note:[/] {runner.num_late_graphs} graphs were compiled while times were taken, and those "
                "times hold it: the manifest has the count."
            )
        records, batches = load_records(store.directory), load_batches(store.directory)
        summary = summarise(records, manifest=store.manifest, batches=batches)
        store.write_summary(summary_frame(summary))
    return store.directory, summary


def run_key(suite: Suite, target: Target) -> str:
    """Return the hash of everything that makes two runs the same run: what may be continued by ``--resume``."""
    config = suite.config.model_dump(mode="json")
    if config["batch_sizes"] == [1]:
        del config["batch_sizes"]  # runs from before there were batches go on
    if not config["compile"]:
        del config["compile"]  # likewise
    return content_hash(
        {
            "suite": config,
            "prompts": suite.prompts_sha256,
            "target": target.fingerprint,
            "dtype": str(target.dtype),
            "device": str(target.device),
        }
    )


def _find_resumable(key: str, options: RunOptions, console: Console) -> Path | None:
    folder = results_dir(options.results)
    if options.run is not None:
        run = find_run(folder, options.run)
        if load_manifest(run).get("run_key") != key:
            raise ConfigError(
                f"Run '{run.name}' was made with another suite, target, dtype or device: repeat the command that "
                "made it (its manifest.json has it), or leave --run out."
            )
        return run
    open_runs = [run for run in list_runs(folder) if _is_unfinished(run, key, console)]
    if not open_runs:
        return None
    if options.resume:
        console.print(f"resuming {open_runs[-1].name}")
        return open_runs[-1]
    console.print(f"[yellow]note:[/] {open_runs[-1].name} was left unfinished; --resume would have continued it.")
    return None


def _is_unfinished(run: Path, key: str, console: Console) -> bool:
    """Whether a run is this one and not complete; one that cannot be read is named and left alone."""
    try:
        manifest = load_manifest(run)
    except ConfigError as error:
        console.print(f"[yellow]note:[/] {error}")
        return False
    return manifest.get("run_key") == key and manifest.get("status") != "complete"


def _create(  # noqa: PLR0917 - what a manifest is made of
    suite: Suite, target: Target, methods: Sequence[Method], key: str, options: RunOptions, extra: Mapping[str, Any]
) -> RunStore:
    run_id = f"{suite.config.name}-{datetime.now(tz=UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    config = suite.config.model_dump(mode="json")
    manifest = {
        "run_id": run_id,
        "status": "running",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": _now(),
        "run_key": key,
        "suite": suite.config.name,
        "suite_version": suite.config.version,
        "prompts_sha256": suite.prompts_sha256,
        "num_prompts": len(suite.prompts),
        "notes": list(suite.notes),
        "target": target.name,
        "target_fingerprint": target.fingerprint,
        "device": target.device.type,
        "dtype": dtype_name(target.dtype),
        "attention": target.attention,
        "layers": target.layers_are,
        "kernels": native.describe(target.device, target.dtype),
        "compiled": describe(target) if suite.config.compile else None,
        "methods": _describe(methods),
        "machine": machine(),
        **extra,
    }
    return RunStore.create(
        results_dir(options.results) / run_id, manifest, config=yaml.safe_dump(config, sort_keys=False)
    )


def _describe(methods: Sequence[Method]) -> list[dict[str, Any]]:
    return [
        {
            "name": method.name,
            "kind": method.kind,
            "objective": method.objective,
            "drafter_fingerprint": method.drafter_fingerprint,
            "training": method.training,
            "trees": dict(method.trees),
            **_compiling(method),
            **({"images": "shuffled", "control_of": method.control_of} if isinstance(method.drafter, Misled) else {}),
        }
        for method in methods
    ]


def _compiling(method: Method) -> dict[str, Any]:
    """Return what is said of a method's compiled steps, if they were asked for."""
    found = {} if method.graphs is None else method.graphs.describe()
    told = found | ({} if method.not_compiled is None else {"not_compiled": method.not_compiled})
    return {"compiled": told} if told else {}


def _chosen_trees(run: Path | None) -> dict[str, dict[str, Any]]:
    """Return the trees that a run which goes on was started with."""
    methods = load_manifest(run)["methods"] if run else []
    return {entry["name"]: entry.get("trees", {}) for entry in methods}


def _check_same_drafters(store: RunStore, methods: Sequence[Method]) -> None:
    """Refuse to mix two drafters' measurements under one name."""
    before = {entry["name"]: entry["drafter_fingerprint"] for entry in store.manifest["methods"]}
    for method in methods:
        if before.get(method.name) != method.drafter_fingerprint:
            raise ConfigError(
                f"Drafter '{method.name}' has other weights ({method.drafter_fingerprint}) than when "
                f"{store.directory.name} was started ({before.get(method.name)}): start a new run without --resume."
            )


def _note_going_on(store: RunStore, console: Console) -> None:
    """Keep in the manifest where and when a run goes on; say so if its times will not be of one machine."""
    manifest, here = store.manifest, machine()
    if manifest.get("status") == "complete":
        return  # nothing of it will be measured
    store.update_manifest(resumed=[*manifest.get("resumed", []), {"at": _now(), "machine": here}])
    if changed := differences(manifest.get("machine") or here, here):
        console.print(
            f"[yellow]note:[/] {store.directory.name} goes on with another machine or other software than it began "
            f"with ({'; '.join(changed)}): its times are of both; for speedups to trust, start a new run."
        )


@contextmanager
def _display(console: Console) -> Iterator[Any]:
    """Show a bar with the time left, and yield the callbacks that move it, for single answers and for batches."""
    with counting_bars(console) as progress:
        task = progress.add_task("decoding", total=None)

        def on_progress(done: Done) -> None:
            record = done.record
            text = f"{record.method} · {record.mode} · {record.prompt_id}"
            progress.update(task, description=f"{text[:44]:<44}", completed=done.done, total=done.total)

        def on_batch(done: int, total: int, text: str) -> None:
            progress.update(task, description=f"{text[:44]:<44}", completed=done, total=total)

        yield on_progress, on_batch


def _now() -> str:
    return datetime.now(tz=UTC).isoformat(timespec="seconds")
