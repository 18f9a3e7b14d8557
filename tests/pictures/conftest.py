"""A language model of a few thousand weights whose tokenizer knows the words of scenes, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vsdbench.pictures.llava import SPARE_TOKEN, assemble, make_processor
from vsdbench.pictures.patches import WORDS
from vsdbench.pictures.scenes import Scene
from vsdbench.pictures.settings import BuildSettings, StageSettings, TowerShape

SHAPE = TowerShape(hidden_size=16, num_layers=1, num_heads=2)


def tiny_settings(**changes: object) -> BuildSettings:
    """A build of a second."""
    settings: dict[str, object] = {
        "description": "Tiny",
        "language_model": "tiny-language-model",
        "language_model_sha256": "0" * 64,
        "licence": "Apache-2.0",
        "tower": SHAPE,
        "naming": StageSettings(num_steps=3, batch_size=2, learning_rate=1e-2),
        "answering": StageSettings(num_steps=2, batch_size=2, learning_rate=1e-2, language_learning_rate=1e-2),
        "num_scored": 3,
        "minutes": 1,
    }
    return BuildSettings(**(settings | changes))


@pytest.fixture(scope="session")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny language model and its tokenizer, whose words are one token each."""
    folder = tmp_path_factory.mktemp("language-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{question}\nuser\nassistant\n{answer}" for index in range(20)
             for _, question, answer in Scene(index, "train").questions()]  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", SPARE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([*texts, *(" ".join(["", *WORDS]) for _ in range(20))], trainer)
    tokenizer.add_special_tokens([AddedToken(SPARE_TOKEN, special=True)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processor(language_model, tmp_path_factory):
    """The processor of what is made of it."""
    return make_processor(language_model, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def model(language_model):
    """A new model that sees, with random tower and projector."""
    torch.manual_seed(1)
    return assemble(language_model, SHAPE).eval()
