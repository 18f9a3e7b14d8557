"""Model folders that are broken, incomplete or put together from two models are refused in one sentence."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.e2e.workspace import save_model
from transformers import AutoTokenizer

from vsdbench.errors import ConfigError
from vsdbench.models.encoding import TextEncoder
from vsdbench.models.target import Target

SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The fox?"}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def load(folder):
    return Target.load(folder, name="odd", fingerprint="0", device=torch.device("cpu"), dtype=torch.float32)


def encoder(folder, vocab_size=10**6):
    config = SimpleNamespace(vocab_size=vocab_size)
    config.get_text_config = lambda: config
    return TextEncoder(AutoTokenizer.from_pretrained(folder), name="odd", config=config)


def test_a_model_without_its_head_does_not_get_a_random_one(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"'odd' lacks 1 of the weights of a LlamaForCausalLM \(lm_head.weight"):
        load(folder)


@pytest.mark.parametrize("fault", ["torn", "shape"])
def test_weights_that_cannot_be_read_are_one_sentence(folder, fault):
    file = folder / "model.safetensors"
    if fault == "torn":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 48'))
    with pytest.raises(ConfigError, match="'odd' cannot be loaded as a decoder-only model: ") as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_a_conversation_that_the_template_refuses_is_one_sentence(whole):
    refusing = encoder(whole)
    refusing.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ConfigError, match=r"of system, user \(System role not supported\).*generation.chat=false"):
        refusing.chat(SYSTEM)


def test_a_prompt_is_the_same_on_every_day(whole):
    dated = encoder(whole)
    dated.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    assert dated.tokenizer.decode(dated.chat(SYSTEM)) == "26 Jul 2024: Be brief."


def test_of_several_templates_it_is_the_default(whole):
    several = encoder(whole)
    several.tokenizer.chat_template = {"default": "> {{ messages[0].content }}", "rag": "{{ documents }}"}
    assert several.template == "> {{ messages[0].content }}"
    assert several.tokenizer.decode(several.chat(SYSTEM)) == "> Be brief."


@pytest.mark.parametrize("encode", [lambda e: e.chat(SYSTEM), lambda e: e.text("The fox?")], ids=["chat", "text"])
def test_a_tokenizer_of_another_model_is_refused(whole, encode):
    ids = encode(encoder(whole))
    largest = max(ids)
    assert encode(encoder(whole, largest + 1)) == ids
    with pytest.raises(ConfigError, match=f"gives token {largest}, but the model has {largest} tokens"):
        encode(encoder(whole, largest))
