"""A run survives kills, full disks and second writers, and is found again by name."""

import errno
import json
import os
import subprocess
import sys
import time

import pandas as pd
import pytest

from vsdbench.bench.summary import summarise, summary_frame
from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench.store import files
from vsdbench.store.frames import to_frames
from vsdbench.store.records import hash_tokens
from vsdbench.store.store import (
    RunStore,
    find_run,
    list_runs,
    load_manifest,
    load_outputs,
    load_records,
)

STEP = (7, 4, 2, 3, 1.0, 2.0, 0.5)
MANIFEST = {"run_id": "run-1", "device": "cpu"}


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run-1"


def test_write_close_resume(run, make_record):
    first, second = (make_record(steps=[STEP], prompt_id=name) for name in "ab")
    with RunStore.create(run, MANIFEST, config="a: 1\n") as store:
        assert store.notes == []
        store.append(first, token_ids=range(4))
        assert store.done == {first.key}
        assert load_records(run) == [first]  # durable before the run ends
    assert (run / "config.yaml").read_text() == "a: 1\n"
    with RunStore.open(run) as store:
        assert store.done == {first.key}
        assert store.manifest == MANIFEST
        store.append(second, token_ids=range(4))
    assert load_records(run) == [first, second]
    assert load_outputs(run) == {hash_tokens(range(4)): [0, 1, 2, 3]}
    assert (run / "outputs.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_a_torn_last_line_is_dropped_and_said(run, make_record, cut):
    records = [make_record(steps=[STEP], repeat=i) for i in range(3)]
    with RunStore.create(run, MANIFEST) as store:
        for record in records:
            store.append(record)
    path = run / "records.jsonl"
    whole = path.read_bytes()
    last = len(records[-1].to_line())
    kept = whole[: len(whole) - min(cut, last - 1)]
    path.write_bytes(kept)
    assert load_records(run) == records[:2]  # a reader skips it and changes nothing
    assert path.read_bytes() == kept
    with RunStore.open(run) as store:
        assert store.done == {r.key for r in records[:2]}
        assert len(store.notes) == 1
        assert f"torn last line of {len(kept) - (len(whole) - last)} bytes" in store.notes[0]
        store.append(records[2])
    assert path.read_bytes() == whole


def test_a_file_that_is_one_torn_line_becomes_empty(run, make_record):
    RunStore.create(run, MANIFEST).close()
    (run / "records.jsonl").write_bytes(b"x" * 200_000)
    with RunStore.open(run) as store:
        assert store.done == frozenset()
        assert "200000 bytes" in store.notes[0]


def test_torn_outputs_are_repaired_and_written_again(run, make_record):
    RunStore.create(run, MANIFEST).close()
    (run / "outputs.jsonl").write_bytes(b'{"output_sha256": "ab')
    with RunStore.open(run) as store:
        assert store.notes[0].startswith("outputs.jsonl")
        store.append(make_record(steps=[STEP]), token_ids=range(4))
    assert list(load_outputs(run).values()) == [[0, 1, 2, 3]]


def test_a_killed_writer_loses_nothing_that_was_appended(run, make_record):
    """A process is killed by SIGKILL while it appends; what it had acknowledged is there, and nothing is torn."""
    line = make_record(steps=[STEP]).to_line()
    script = (
        "import sys, json, pathlib\n"
        "from vsdbench.store.records import parse_record\n"
        "from vsdbench.store.store import RunStore\n"
        f"base = json.loads({line!r})\n"
        f"store = RunStore.create(pathlib.Path({str(run)!r}), {MANIFEST!r})\n"
        "for i in range(10**6):\n"
        "    store.append(parse_record(json.dumps(base | {'repeat': i}), where='x'))\n"
        "    print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    acknowledged = [int(process.stdout.readline()) for _ in range(5)]
    process.kill()
    acknowledged += [int(number) for number in process.stdout.read().split("\n")[:-1]]
    process.stdout.close()
    process.wait()
    with RunStore.open(run) as store:  # the lock went with the process
        repeats = sorted(key[-1] for key in store.done)
    assert repeats == list(range(len(repeats)))
    assert len(repeats) >= acknowledged[-1] + 1


def test_a_key_is_written_once(run, make_record):
    record = make_record(steps=[STEP])
    with RunStore.create(run, MANIFEST) as store:
        store.append(record)
        with pytest.raises(ValueError, match="already"):
            store.append(make_record(steps=[STEP], decode_s=9.0))
    assert load_records(run) == [record]


def test_repeated_keys_on_disk_are_named(run, make_record):
    with RunStore.create(run, MANIFEST) as store:
        store.append(make_record(num_output_tokens=3))
    path = run / "records.jsonl"
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ConfigError, match=r"records\.jsonl line 2 repeats the record of line 1"):
        load_records(run)


def test_a_corrupt_line_in_the_middle_is_named(run, make_record):
    with RunStore.create(run, MANIFEST) as store:
        for repeat in range(3):
            store.append(make_record(steps=[STEP], repeat=repeat))
    path = run / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:50] + "\n" + lines[2])
    with pytest.raises(ConfigError, match=r"records\.jsonl line 2 is not JSON"):
        RunStore.open(run)
    path.write_text("".join(lines))
    RunStore.open(run).close()  # the failed opening did not keep the lock


def test_another_schema_is_refused(run, make_record):
    RunStore.create(run, MANIFEST).close()
    (run / "records.jsonl").write_text(json.dumps({"schema": 99}) + "\n")
    with pytest.raises(ConfigError, match="schema 99, but this version of vsdbench reads schema 1"):
        load_records(run)


def test_corrupt_outputs_are_named(run):
    RunStore.create(run, MANIFEST).close()
    (run / "outputs.jsonl").write_text('{"token_ids": [1]}\n')
    with pytest.raises(ConfigError, match=r"outputs\.jsonl line 1 is corrupt"):
        load_outputs(run)


def test_records_of_another_run_and_wrong_hashes_are_refused(run, make_record):
    with RunStore.create(run, MANIFEST) as store:
        with pytest.raises(ValueError, match="does not belong"):
            store.append(make_record(run_id="other", num_output_tokens=2))
        with pytest.raises(ValueError, match="is not the hash"):
            store.append(make_record(steps=[STEP]), token_ids=[5])
    assert load_records(run) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(run, make_record, monkeypatch, code):
    first, second = (make_record(steps=[STEP], prompt_id=name) for name in "ab")
    with RunStore.create(run, MANIFEST) as store:
        store.append(first)
        before = (run / "records.jsonl").read_bytes()

        def full(descriptor):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", full)
            with pytest.raises(EnvironmentProblemError, match="is full; free some space and repeat the command"):
                store.append(second)
            with pytest.raises(EnvironmentProblemError, match="is full"):
                store.update_manifest(ended=True)
        assert (run / "records.jsonl").read_bytes() == before
        assert store.done == {first.key}
        assert load_manifest(run) == MANIFEST
        assert not list(run.glob("*.tmp")) + list(run.glob(".*.tmp"))
        store.append(second)
    assert load_records(run) == [first, second]


def test_other_errors_are_not_disguised(tmp_path):
    with pytest.raises(OSError, match="odd") as caught, files.storage_errors(tmp_path):
        raise OSError(errno.EIO, "odd")
    assert not isinstance(caught.value, EnvironmentProblemError)
    with pytest.raises(EnvironmentProblemError, match="may not be written"), files.storage_errors(tmp_path):
        raise PermissionError(errno.EACCES, "denied")


def test_a_log_takes_whole_lines_only(tmp_path):
    log = files.AppendLog(tmp_path / "log")
    for bad in ("a", "a\nb\n", ""):
        with pytest.raises(ValueError, match="one line"):
            log.append(bad)
    log.close()


def test_one_writer_at_a_time(run):
    with RunStore.create(run, MANIFEST):
        script = (
            "import pathlib, sys\nfrom vsdbench.errors import ConfigError\nfrom vsdbench.store.store import RunStore\n"
            f"try:\n    RunStore.open(pathlib.Path({str(run)!r}))\n"
            "except ConfigError as error:\n    print(error)\n"
        )
        said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        assert f"being written by another process (pid {os.getpid()})" in said
        with pytest.raises(ConfigError, match="being written"):
            RunStore.open(run)
    RunStore.open(run).close()


def test_who_waits_for_a_lock_goes_on_when_its_holder_is_killed(tmp_path, held_elsewhere):
    path = tmp_path / "things" / ".lock"
    console = held_elsewhere(path)
    with pytest.raises(
        ConfigError, match=r"^The thing is being made by another process \(pid \d+\); wait for it to end"
    ):
        files.FileLock(path, "The thing is being made")
    with files.FileLock(path, "The thing is being made", console=console):
        assert console.file.getvalue().startswith("The thing is being made by another process (pid ")
        assert path.read_text() == str(os.getpid())
        with pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
            files.FileLock(path, "The thing is being made")
    files.FileLock(path, "The thing is being made").release()


def test_a_lock_that_cannot_be_signed_is_not_kept(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "pwrite", full)
        with pytest.raises(EnvironmentProblemError, match="is full"):
            files.FileLock(tmp_path / ".lock", "The thing is being made")
    files.FileLock(tmp_path / ".lock", "The thing is being made").release()


def test_create_refuses_a_folder_with_a_run(run):
    RunStore.create(run, MANIFEST).close()
    with pytest.raises(ConfigError, match="holds a run already"):
        RunStore.create(run, MANIFEST)
    RunStore.open(run).close()


def test_manifest_changes_are_on_disk_and_keep_the_id(run):
    with RunStore.create(run, MANIFEST) as store:
        store.update_manifest(gpu={"clock": 1})
        assert load_manifest(run) == MANIFEST | {"gpu": {"clock": 1}}
        with pytest.raises(ValueError, match="keeps its run_id"):
            store.update_manifest(run_id="other")
    with pytest.raises(ValueError, match="needs a run_id"):
        RunStore.create(run.with_name("x"), {})


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("{}", "has no run_id"), (None, "is not a run")])
def test_bad_manifests_are_named(run, text, message):
    run.mkdir()
    if text is not None:
        (run / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        RunStore.open(run)


def test_a_folder_without_records_is_not_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"has no records\.jsonl"):
        load_records(tmp_path)


def test_summary_parquet_holds_the_results(run, make_run):
    summary = summarise(make_run(num_prompts=6), manifest=MANIFEST)
    with RunStore.create(run, MANIFEST) as store:
        path = store.write_summary(summary_frame(summary))
    frame = pd.read_parquet(path)
    assert len(frame) == 2 * (1 + 3)  # drafters x (all + categories)
    assert set(frame["device"]) == {"cpu"}
    overall = frame[frame["category"].isna()].set_index("drafter")
    assert overall.loc["eagle3-kl", "tau"] > overall.loc["ngram", "tau"]
    assert overall.loc["ngram", "tau_lo"] < overall.loc["ngram", "tau"] < overall.loc["ngram", "tau_hi"]
    assert overall.loc["ngram", "lossless_equal"] == 12
    assert len(overall.loc["ngram", "acceptance_by_depth"]) == 4


def test_frames(make_record):
    tree = {"kind": "chain", "budget": 7, "depth": 4, "top_k": 1}
    records = [
        make_record(steps=[STEP, STEP], tree=tree),
        make_record(num_output_tokens=7, method="hf-generate"),
        make_record(steps=[(0, 0, 0, 1, 0.0, 2.0, 0.1)], prompt_id="p1"),
    ]
    frame, steps = to_frames(records)
    assert frame["unit"].tolist() == ["tiny/p0", "tiny/p0", "tiny/p1"]
    assert frame["num_steps"].tolist() == [2, 0, 1]
    assert frame["tree_kind"].tolist()[0] == "chain"
    assert frame["tree_min_node_prob"].tolist()[0] == 0
    assert pd.isna(frame["tree_kind"][1])
    assert steps["record"].tolist() == [0, 0, 2]
    assert steps["step"].tolist() == [0, 1, 0]
    assert steps["num_emitted"].tolist() == [3, 3, 1]
    assert steps["verify_ms"].tolist() == [2.0, 2.0, 2.0]
    empty, no_steps = to_frames([])
    assert list(empty.columns) == list(frame.columns)
    assert (len(empty), len(no_steps)) == (0, 0)


@pytest.fixture
def results(tmp_path):
    for number, name in enumerate(["reference/old-1", "2026-01-aaa", "2026-01-abb", "2026-02-ccc"]):
        RunStore.create(tmp_path / name, {"run_id": name}).close()
        stamp = time.time() - 100 + number
        os.utime(tmp_path / name / "manifest.json", (stamp, stamp))
    (tmp_path / "not-a-run").mkdir()
    return tmp_path


def test_runs_are_listed_oldest_first(results):
    assert [run.name for run in list_runs(results)] == ["old-1", "2026-01-aaa", "2026-01-abb", "2026-02-ccc"]


@pytest.mark.parametrize(
    ("name", "found"),
    [("2026-01-aaa", "2026-01-aaa"), ("2026-02", "2026-02-ccc"), ("latest", "2026-02-ccc"), ("old", "old-1")],
)
def test_runs_are_found_by_name(results, name, found):
    assert find_run(results, name).name == found


def test_runs_are_found_by_path(results, tmp_path):
    assert find_run(tmp_path / "elsewhere", str(results / "2026-01-aaa")) == results / "2026-01-aaa"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("2026-01-a", "begins the names of 2 runs"),
        ("2026-02-ccd", "Did you mean '2026-02-ccc'"),
        ("", "No run ''"),
        ("not-a-run", "No run 'not-a-run'"),
    ],
)
def test_names_that_fit_no_run_or_several_are_refused(results, name, message):
    with pytest.raises(ConfigError, match=message):
        find_run(results, name)


def test_latest_of_nothing(tmp_path):
    with pytest.raises(ConfigError, match="There is no run in"):
        find_run(tmp_path, "latest")
