"""The command line: help without torch, data on stdout, and one sentence with the right exit code for each mistake."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import vsdbench
from vsdbench.cli import app, verb
from vsdbench.cli.common import output, print_json
from vsdbench.errors import EnvironmentProblemError
from vsdbench.models import device as devices

VERBS = ("run", "train", "ablate", "compare", "report", "list", "models", "show", "cp", "validate", "schema", "doctor")
SUITE = """\
name: tiny
version: 1
description: Two prompts from a local file.
licence: Apache-2.0
target: smollm2-135m-q4
sources:
  - {name: local, loader: jsonl, path: prompts.jsonl, licence: Apache-2.0, fields: {prompt: prompt}}
generation: {max_new_tokens: 4, chat: false}
modes:
  - {name: greedy, temperature: 0, rule: greedy}
drafters:
  - {name: ngram, type: ngram}
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call the command line from an empty folder with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "cache"))
    for variable in ("VSDBENCH_DATA", "VSDBENCH_RESULTS"):
        monkeypatch.delenv(variable, raising=False)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def suite(tmp_path):
    """A suite that needs no network for its prompts."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "One"}\n{"prompt": "Two"}\n', encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(SUITE, encoding="utf-8")
    return path


def fails(result, code, *words):
    """One line on stderr that has the words, nothing on stdout, and the exit code."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    return True


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom vsdbench.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "print('heavy', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy []"
    assert all(name in done.stdout for name in VERBS)


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help(call, name):
    result = call(name, "--help")
    assert result.exit_code == 0
    assert f"vsdbench {name}" in result.output.replace("root", "vsdbench")


def test_the_verbs_are_those_tested_here():
    assert {info.name or info.callback.__name__ for info in app.registered_commands} == set(VERBS)


def test_version(call):
    assert call("--version").stdout == f"vsdbench {vsdbench.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "mtbanch"], ["'mtbanch'", "Did you mean 'mtbench'?"]),
        (["run", "nowhere/at_all.yaml"], ["nowhere/at_all.yaml"]),
        (["run", "seed=1"], ["No suite was named"]),
        (["run", "smoke", "mtbanch"], ["'mtbanch'", "Did you mean 'mtbench'?"]),
        (["run", "smoke", "repeets=3"], ["unknown key 'repeets'", "Did you mean 'repeats'?"]),
        (["run", "smoke", "repeats=many"], ["repeats", "'many'"]),
        (["run", "smoke", "drafters.ngrm.type=ngram"], ["'ngrm'", "Did you mean 'ngram'?"]),
        (["train", "eagle3-kl-quikstart"], ["Did you mean 'eagle3-kl-quickstart'?"]),
        (["train", "eagle3-kl-quickstart", "objective.type=kll"], ["'kll'", "kl"]),
        (["train", ""], ["'' names no recipe"]),
        (["list", "suits"], ["'suits'", "Did you mean 'suites'?"]),
        (["show", "mtbanch"], ["'mtbanch'", "Did you mean 'mtbench'?"]),
        (["cp", "ngram"], ["only suites and recipes can be copied"]),
        (["validate", "missing.yaml"], ["missing.yaml"]),
        (["schema", "suit"], ["'suit'", "Did you mean 'suite'?"]),
        (["doctor", "--device", "tpu9"], ["'tpu9'", "auto, cpu, cuda"]),
    ],
)
def test_a_mistake_is_one_sentence(call, arguments, words):
    assert fails(call(*arguments), 2, *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "fp12"], ["'fp12'", "bf16"]),
        (["--device", "abacus"], ["'abacus'", "cpu"]),
        (["--target", "smollm2"], ["'smollm2'", "smollm2-135m-q4"]),
        (["--dry-run", "drafters.ngram.type=ngrm"], ["'ngrm'", "Did you mean 'ngram'?"]),
        (
            ["drafters=[{name: b, type: eagle3, recipe: eagle3-kl-quikstart}]"],
            ["drafter 'b'", "Did you mean 'eagle3-kl-quickstart'?"],
        ),
    ],
)
def test_a_wrong_option_of_a_run_is_one_sentence(call, suite, arguments, words):
    assert fails(call("run", str(suite), *arguments), 2, *words)


def test_validate_names_file_key_and_remedy(call, suite):
    suite.write_text(SUITE.replace("description:", "descripton:"), encoding="utf-8")
    assert fails(call("validate", str(suite)), 2, "tiny.yaml", "'descripton'", "'description'")
    suite.write_text(SUITE.replace("type: ngram", "type: ngrm"), encoding="utf-8")
    assert fails(call("validate", str(suite)), 2, "'ngrm'", "'ngram'")


def test_unreachable_hub_ends_with_3(tmp_path, suite):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"  # nobody listens there
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "0",
            "VSDBENCH_CACHE": str(tmp_path / "cache"),
            "VSDBENCH_RESULTS": str(tmp_path / "results"),
        }
        arguments = ["run", str(suite), "--target", "someone/model", "--dtype", "fp32", "--quiet", "--device", "cpu"]
        done = subprocess.run(
            [sys.executable, "-c", "from vsdbench.cli import main; main()", *arguments],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "smollm2-135m-q4" in line
    assert not list((tmp_path / "results").glob("*"))


def test_list_has_a_line_an_entry(call):
    plain, as_json = call("list", "suites"), json.loads(call("list", "suites", "--json").stdout)
    assert as_json["schema"] == 1
    names = [entry["name"] for entry in as_json["suites"]]
    assert {"smoke", "quickstart", "mtbench"} <= set(names)
    assert [line.split()[0] for line in plain.stdout.splitlines()] == names


def test_show_prints_the_file_as_it_is(call):
    shown = json.loads(call("show", "smoke", "--json").stdout)
    assert shown["kind"] == "suite"
    assert shown["text"].startswith("# Does everything work?")
    plain = call("show", "smoke").stdout
    assert plain == f"# suite: {shown['path']}\n{shown['text'].rstrip()}\n"
    assert json.loads(call("show", "ngram", "--json").stdout)["path"] is None


def test_cp_copies_once_and_validate_accepts_the_copy(call, tmp_path):
    result = call("cp", "smoke", "mine.yaml")
    assert result.stdout == "mine.yaml\n"
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == json.loads(call("show", "smoke", "--json").stdout)[
        "text"
    ]
    assert call("validate", "mine.yaml").stdout == "mine.yaml: valid suite\n"
    assert fails(call("cp", "smoke", "mine.yaml"), 2, "exists already")
    assert call("cp", "smoke", "new/folder/").stdout == "new/folder/smoke.yaml\n"
    below = call("cp", "smoke", "mine.yaml/folder/")
    assert fails(below, 3, "'mine.yaml/folder' cannot be written or read (Not a directory)")


@pytest.mark.parametrize(("kind", "key"), [("suite", "sources"), ("recipe", "objective")])
def test_schema_is_a_json_schema(call, kind, key):
    schema = json.loads(call("schema", kind).stdout)
    assert schema["type"] == "object"
    assert key in schema["required"]
    assert schema["additionalProperties"] is False


def test_dry_run_of_train_prints_one_object_for_this_machine(call, monkeypatch):
    seconds = []
    for flops in (1e11, 2e11):
        monkeypatch.setattr(devices, "product_flops", lambda _device, _dtype, flops=flops: flops)
        result = call("train", "eagle3-kl-quickstart", "--dry-run", "--json", "--target", "smollm2-135m-q4")
        printed = json.loads(result.stdout)
        [drafter] = printed["drafters"]
        assert (printed["schema"], drafter["recipe"]) == (1, "eagle3-kl-quickstart")
        assert not drafter["cached"]
        seconds.append(drafter["seconds"])
    assert seconds[0] == pytest.approx(2 * seconds[1])
    assert seconds[1] > 0


@pytest.mark.parametrize(
    ("raised", "code", "word"),
    [
        (EnvironmentProblemError("No such thing: get one."), 3, "No such thing"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (OSError(28, "No space left on device"), 3, "disk is full"),
        (PermissionError(13, "Permission denied", "/some/place"), 3, "'/some/place' cannot be written or read"),
        (RuntimeError("CUDA out of memory.\nTried to allocate"), 3, "Out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you asked for 9 bytes"), 3, "smaller target"),
        (MemoryError(), 3, "Out of memory"),
    ],
)
def test_guard_turns_errors_into_exit_codes(capsys, raised, code, word):
    def fail():
        raise raised

    with pytest.raises(BaseException) as caught:  # noqa: PT011 - typer's Exit, whose class is private
        verb(fail)()
    assert caught.value.exit_code == code
    out, err = capsys.readouterr()
    assert out == ""
    assert word in err
    assert len(err.splitlines()) == 1


def test_where_nobody_reads_on_the_verb_goes_on(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        output().print("a table")
        output().print("another")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print_json({"runs": []})


@pytest.mark.parametrize("raised", [RuntimeError("a bug"), OSError(2, "No such file"), ValueError("a bug")])
def test_guard_lets_bugs_through(raised):
    def fail():
        raise raised

    with pytest.raises(type(raised), match=str(raised.args[-1])):
        verb(fail)()


def test_run_is_not_for_torchrun(call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = call("run", "smoke")
    assert result.exit_code == 2
    assert "without torchrun" in result.output
