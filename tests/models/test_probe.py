"""Models that cannot verify a tree are refused when they are loaded; those that change with the length are held."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import AdversarialDrafter, make_prompt, plain, settings
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from vsdbench.decoding.baseline import hf_generate
from vsdbench.decoding.engine import decode
from vsdbench.errors import ConfigError
from vsdbench.models.target import Target

VOCAB = 48
BEFORE = 24
"""Tokens of the first training, after which some rotary embeddings turn by other angles."""
_SIZE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": BEFORE}
_LONG |= {"short_factor": [1.0] * 4, "long_factor": [3.0, 4.0, 5.0, 6.0]}
GROWING = {
    "llama": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "phi3": {"rope_parameters": _LONG, "original_max_position_embeddings": BEFORE},
}


def make_model(kind, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **changes), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = GenerationConfig()
    return model


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 3, "vocab_size": VOCAB}, "other guesses stand beside it"),
        ("bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 3, "vocab_size": VOCAB}, "its own code stops over one"),
        ("rwkv", _SIZE | {"attention_hidden_size": 32}, "other guesses stand beside it"),
        ("gpt_neo", {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "vocab_size": VOCAB}, "layers of local"),
    ],
)
def test_models_that_go_by_anything_but_mask_and_position_are_refused(kind, changes, why):
    special = {"attention_types": [[["global", "local"], 1]]} if kind == "gpt_neo" else {}
    with pytest.raises(ConfigError, match=f"'odd'.*{why}"):
        Target(make_model(kind, **changes, **special), None, name="odd", fingerprint="0" * 16)


def test_a_model_that_computes_no_numbers_is_refused():
    model = make_model("llama", **_SIZE, **_HEADS)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ConfigError, match="'odd' computes no numbers in float32: use --dtype bf16 or fp32"):
        Target(model, None, name="odd", fingerprint="0" * 16)


@pytest.mark.parametrize("kind", GROWING)
def test_guesses_beyond_the_first_training_change_nothing_before_it(kind):
    longest = 8 * BEFORE if kind == "phi3" else BEFORE
    model = make_model(kind, **_SIZE, **_HEADS, **GROWING[kind], max_position_embeddings=longest)
    target = Target(model, None, name=kind, fingerprint="0" * 16)
    assert target.max_positions == BEFORE
    prompt = make_prompt(BEFORE - 12, seed=1, vocab=VOCAB)
    chosen = settings(12)
    expected = plain(target, prompt, chosen)
    assert len(expected) == 12
    assert hf_generate(target, prompt, chosen).token_ids == expected
    for seed in range(4):
        drafter = AdversarialDrafter(expected, len(prompt), seed, vocab=VOCAB)
        assert decode(target, drafter, prompt, chosen).token_ids == expected
    with pytest.raises(ConfigError, match=f"has {BEFORE} tokens and the target holds {BEFORE}"):
        plain(target, make_prompt(BEFORE, vocab=VOCAB), chosen)
