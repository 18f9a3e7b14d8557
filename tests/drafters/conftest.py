"""A tiny random target that the tests of training and of EAGLE-3 share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from vsdbench.models import packed
from vsdbench.models.target import Target


@pytest.fixture(autouse=True)
def _exact_drafts(monkeypatch):
    """Drafters that decode with the weights they were trained with, so that both can be compared."""
    monkeypatch.setattr(packed, "ROUND_DRAFTS", False)


@dataclass(frozen=True)
class ToySequence:
    ids: list[int]
    prompt_len: int


def make_target(**changes) -> Target:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = AutoModelForCausalLM.from_config(LlamaConfig(**(shape | changes)), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return Target(model, None, name="toy", fingerprint="toy")


@pytest.fixture(scope="session")
def toy_target() -> Target:
    return make_target()


@pytest.fixture(scope="session")
def toy_sequences() -> list[ToySequence]:
    generator = torch.Generator().manual_seed(5)
    return [
        ToySequence(torch.randint(3, 60, (length,), generator=generator).tolist(), prompt_len)
        for length, prompt_len in [(12, 5), (9, 3), (15, 6), (8, 4), (20, 7), (11, 2), (10, 6), (14, 4)]
    ]
