"""A resumable state is whole, belongs to one training, and says so when it is damaged."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors import SafetensorError

from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench_drafters.architectures import checkpoints
from vsdbench_drafters.training.checkpoint import load_state, save_state

GROUPS = {"model": {"a.weight": torch.arange(6.0).view(2, 3)}, "optimiser": {"a.weight/step": torch.tensor(7.0)}}


def test_round_trip(tmp_path):
    path = tmp_path / "deep" / "resume.safetensors"
    save_state(path, GROUPS, step=12, key="k")
    groups, step = load_state(path, key="k")
    assert step == 12
    assert groups.keys() == GROUPS.keys()
    assert torch.equal(groups["model"]["a.weight"], GROUPS["model"]["a.weight"])
    assert groups["optimiser"]["a.weight/step"].shape == ()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_no_state_and_another_trainings_state(tmp_path):
    assert load_state(tmp_path / "none.safetensors", key="k") is None
    save_state(tmp_path / "resume.safetensors", GROUPS, step=1, key="other")
    assert load_state(tmp_path / "resume.safetensors", key="k") is None


def test_a_damaged_state_ends_in_one_sentence(tmp_path):
    path = tmp_path / "resume.safetensors"
    save_state(path, GROUPS, step=1, key="k")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match="damaged; delete it"):
        load_state(path, key="k")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_keeps_the_last_state_and_the_last_drafter(tmp_path, monkeypatch, error):
    path = tmp_path / "resume.safetensors"
    save_state(path, GROUPS, step=1, key="k")
    checkpoints.write_tensors(tmp_path, GROUPS["model"], {})

    def full(_tensors, file, metadata):
        file.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoints, "save_file", full)
    for write in (
        lambda: save_state(path, GROUPS, step=2, key="k"),
        lambda: checkpoints.write_tensors(tmp_path, {}, {}),
    ):
        with pytest.raises(EnvironmentProblemError, match="disk is full"):
            write()
    monkeypatch.undo()
    assert load_state(path, key="k")[1] == 1
    assert checkpoints.read_tensors(tmp_path).keys() == GROUPS["model"].keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", path.name]
