"""Two processes train what one does: same steps, same weights, one writer; and when one fails, both end."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.drafters import distributed_work
from tests.drafters.distributed_work import RECIPE, WORK

from vsdbench import processes as processes_module
from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench.processes import Processes, common_dtype, joined, own_device
from vsdbench_drafters.objectives.token import CrossEntropy, ForwardKL
from vsdbench_drafters.training import train as train_module
from vsdbench_drafters.training.compiled import compile_row_losses, wants_compiling
from vsdbench_drafters.training.distributed import check_division
from vsdbench_drafters.training.recipe import RecipeConfig, TrainingConfig

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 240


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of what two processes made, and how each of them ended."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "toy.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    shared |= {"VSDBENCH_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.drafters.distributed_work", str(folder), *free_ports(3)]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=TIMEOUT_S) for process in started]
    finally:
        for process in started:
            process.kill()
    ended = [
        SimpleNamespace(code=process.returncode, out=out, err=err)
        for process, (out, err) in zip(started, said, strict=True)
    ]
    assert (folder / "interrupted-1.pt").exists(), ended[0].err + ended[1].err
    return SimpleNamespace(folder=folder, ended=ended)


@pytest.fixture(scope="module")
def alone_of(tmp_path_factory):
    """A way to what one process makes of each work, which is done once."""

    @functools.cache
    def alone(name):
        return WORK[name](Processes(), tmp_path_factory.mktemp(name))

    return alone


@pytest.mark.parametrize("name", ["kl", "vsd", "sharded"])
def test_two_processes_train_what_one_does(pair, alone_of, name):
    alone = alone_of(name)
    assert alone["odd_step"], "some step leaves a process without a batch"
    for rank in (0, 1):
        found = torch.load(pair.folder / f"{name}-{rank}.pt")
        for parameter, tensor in alone["weights"].items():
            torch.testing.assert_close(found["weights"][parameter], tensor, rtol=1e-4, atol=1e-5)
        assert found["progress"] == alone["progress"]
        assert found["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert found["heldout"] == pytest.approx(alone["heldout"], abs=1e-5)
        assert found["best_step"] == alone["best_step"]
        assert found["target_forwards"] == alone["target_forwards"]


def test_the_log_is_written_once_and_counts_all_batches(pair, alone_of):
    alone = alone_of("kl")["log"]
    found = torch.load(pair.folder / "kl-0.pt")["log"]
    assert len(found) == len(alone) == 3
    for line, expected in zip(found, alone, strict=True):
        assert line == pytest.approx(expected, abs=1e-5)


def test_a_sharded_target_gives_what_the_whole_one_gives(pair, alone_of):
    alone = alone_of("sharded")
    assert alone["share"] == 1
    for rank in (0, 1):
        found = torch.load(pair.folder / f"sharded-{rank}.pt")
        assert found["share"] == pytest.approx(0.5, abs=0.05)
        assert torch.equal(found["head"], alone["head"])
        torch.testing.assert_close(found["states"], alone["states"])
        for states, expected in zip(found["features"], alone["features"], strict=True):
            torch.testing.assert_close(states, expected)


def test_ctrl_c_in_one_process_stops_both_and_both_go_on(tmp_path, pair):
    alone = WORK["interrupted"](Processes(), tmp_path)
    for rank in (0, 1):
        found = torch.load(pair.folder / f"interrupted-{rank}.pt")
        assert found["saved"]
        assert found["steps"] == alone["steps"]
        assert found["steps"][0] == 4
        for parameter, tensor in alone["weights"].items():
            torch.testing.assert_close(found["weights"][parameter], tensor, rtol=1e-4, atol=1e-5)


def test_the_verb_trains_with_two_processes_and_prints_once(tmp_path, pair, monkeypatch):
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(train_module, "ensure_data", train_module.ensure_data)  # put back what is patched next
    monkeypatch.setattr(distributed_work.run_module, "load_target", distributed_work.run_module.load_target)
    distributed_work.patch_training()
    alone = train_module.train(RecipeConfig.model_validate(RECIPE), target=distributed_work.plain_target())
    first, second = pair.ended
    (said,) = json.loads(first.out.splitlines()[0])["drafters"]
    assert Path(said["checkpoint"]).name == alone.path.name
    assert said["tokens"] == alone.tokens
    assert said["target_forwards"] == alone.target_forwards
    assert "Training toy" in first.err
    assert not second.out
    assert "Training toy" not in second.err
    found = load_file(Path(said["checkpoint"]) / "model.safetensors")
    for name, tensor in load_file(alone.path / "model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_when_one_process_fails_both_end(pair):
    first, second = pair.ended
    assert (first.code, second.code) == (3, 2)
    assert second.err.strip() == "error: this loss was not to be."
    assert first.err.strip().endswith("error: another process of this command stopped, and this one with it; "
                                      "its own message says why.")  # fmt: skip


def test_batches_that_do_not_divide_are_refused():
    check_division(1, Processes())
    check_division(4, Processes(1, 2))
    with pytest.raises(ConfigError, match=r"accumulate is 3, but .* 2 processes: make it a multiple of 2\."):
        check_division(3, Processes(0, 2))


def test_processes_that_see_different_caches_are_refused(monkeypatch):
    processes = Processes(0, 2)
    monkeypatch.setattr(processes, "_exchange", lambda item: [item, (False, "other")])
    with pytest.raises(EnvironmentProblemError, match=r"agree on the data \(mine and other\).*VSDBENCH_CACHE"):
        processes.agree("mine", "the data")
    processes.agree("other", "the data")


def test_alone_without_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # some schedulers set it
    with joined("cpu") as processes:
        assert (processes.rank, processes.count, processes.device) == (0, 1, "cpu")
        assert processes.gather("x") == ["x"]
        assert processes.from_first(lambda: 3) == 3
        assert common_dtype("auto", processes) == "auto"


def test_each_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("auto") == own_device("cuda") == torch.device("cuda:1")
    assert own_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="use --device cuda"):
        own_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(EnvironmentProblemError, match="--nproc-per-node=2"):
        own_device("cuda")


def test_a_measured_dtype_is_the_first_ones(monkeypatch):
    processes = Processes(1, 2, device="cpu")
    monkeypatch.setattr(processes, "_exchange", lambda item: [(False, [torch.bfloat16]), item])
    monkeypatch.setattr(processes_module, "choose_dtype", lambda *_: pytest.fail("measured in the second process"))
    assert common_dtype("auto", processes) == "bf16"
    assert common_dtype("fp32", processes) == "fp32"


def test_row_losses_are_compiled_once_for_all_sizes():
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    plain, compiled = ForwardKL(ttt_steps=2), ForwardKL(ttt_steps=2)
    compile_row_losses(compiled, backend=backend)
    for rows in (5, 8, 3, 13):
        logits, targets = torch.randn(rows, 24), torch.rand(rows, 24).softmax(-1)
        with torch.no_grad():
            found, expected = compiled.row_losses(logits.clone(), targets), plain.row_losses(logits.clone(), targets)
        torch.testing.assert_close(found, expected)
    assert len(graphs) == 1
    other = CrossEntropy(ttt_steps=2)
    compile_row_losses(other)  # it has none of its own
    assert vars(other).keys() == vars(CrossEntropy(ttt_steps=2)).keys()


def test_what_is_compiled_by_default():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert TrainingConfig().compile == "auto"
    assert [wants_compiling("auto", cuda), wants_compiling("auto", cpu)] == [True, False]
    assert [wants_compiling(False, cuda), wants_compiling(True, cpu)] == [False, True]
