"""Slot-wise decoding must say exactly what one-by-one decoding says, whatever the schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from vsdbench.errors import ConfigError
from vsdbench.models import native
from vsdbench.models.fused import FusedLayers
from vsdbench.models.packed import can_pack, pack
from vsdbench_drafters.training import slots as slots_module
from vsdbench_drafters.training.answers import Request, ends_in_loop
from vsdbench_drafters.training.generate import SlotGenerator
from vsdbench_drafters.training.kept import Keeps
from vsdbench_drafters.training.sampling import pick_tokens

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS = ["full_attention", "sliding_attention", "full_attention"]
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=9),
    "qwen3": Qwen3Config(**SIZES),
    "qwen3-sliding": Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=9, layer_types=KINDS),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=9, layer_types=KINDS),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products gain nothing from threads, and lose much where other processes hold a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(kind: str = "llama", **changes):
    torch.manual_seed(0)
    config = type(CONFIGS[kind])(**CONFIGS[kind].to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    for parameter in model.parameters():  # wide weights: no ties, and text that does not repeat itself at once
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_prompts(count: int, prefix: tuple[int, ...] = (5, 6, 7)) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [[*prefix, *rng.integers(3, VOCABULARY, size=rng.integers(1, 20)).tolist()] for _ in range(count)]


def one_by_one(model, prompt: list[int], max_new_tokens: int, eos: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def slot_wise(model, prompts, *, temperature=0.0, slots=4, max_new_tokens=24, eos=(2,), prefix=(5, 6, 7), **more):
    generator = SlotGenerator(
        model,
        eos_ids=eos,
        slots=slots,
        max_prompt_tokens=32,
        max_new_tokens=max_new_tokens,
        shared_prefix=prefix,
        **more,
    )
    requests = [Request(index, prompt, temperature) for index, prompt in enumerate(prompts)]
    return {response.request.index: response for response in generator.stream(iter(requests))}


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("prefix", [(), (5, 6, 7)], ids=["no-prefix", "prefix"])
def test_greedy_equals_generate(kind, prefix):
    model, prompts = make_model(kind), make_prompts(11, prefix)
    plain = [one_by_one(model, prompt, 24, [96]) for prompt in prompts]
    # An end-of-text token that really occurs in the middle of some answers.
    eos = plain[3][10]
    expected = [one_by_one(model, prompt, 24, [eos]) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 1
    found = slot_wise(model, prompts, eos=(eos,), prefix=prefix)
    assert [found[index].response_ids.tolist() for index in range(11)] == expected
    reasons = ["eos" if answer[-1] == eos else "length" for answer in expected]
    assert [found[index].stop_reason for index in range(11)] == reasons


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="no packed products in this torch")
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "qwen3-sliding"])
@pytest.mark.parametrize("prefix", [(), (5, 6, 7)], ids=["no-prefix", "prefix"])
def test_fused_layers_say_the_same(kind, prefix, monkeypatch):
    model, prompts = make_model(kind), make_prompts(11, prefix)
    expected = [one_by_one(model, prompt, 24, [2]) for prompt in prompts]
    pack(model)
    decoder = model.get_decoder()
    fused = FusedLayers(decoder, decoder.layers, model.config)
    monkeypatch.setattr(decoder, "forward", None)  # the model's own layers take no part
    found = slot_wise(model, prompts, prefix=prefix, fused=fused)
    assert [found[index].response_ids.tolist() for index in range(11)] == expected


@pytest.mark.skipif(native.library() is None, reason="no native kernels")
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("prefix", [(), (5, 6, 7)], ids=["no-prefix", "prefix"])
@pytest.mark.parametrize("most_rows", [256, 30, 3], ids=["all", "some-prompts", "no-step"])
def test_native_layers_say_the_same(kind, prefix, most_rows, monkeypatch):
    model, prompts = make_model(kind, head_dim=16), make_prompts(24, prefix)
    expected = [one_by_one(model, prompt, 40, [2]) for prompt in prompts]
    pack(model)
    decoder = model.get_decoder()
    fused = FusedLayers(decoder, decoder.layers, model.config)
    monkeypatch.setattr(fused.native, "most_rows", most_rows)
    if most_rows == 256 and not prefix:
        monkeypatch.setattr(fused, "run", None)  # the kernels do all of it
    found = slot_wise(model, prompts, prefix=prefix, slots=8, max_new_tokens=40, fused=fused)
    assert [found[index].response_ids.tolist() for index in range(len(prompts))] == expected


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="no packed products in this torch")
@pytest.mark.parametrize("native_rows", [0, 3, 256])
@pytest.mark.parametrize("prefix", [(), (5, 6, 7)], ids=["no-prefix", "prefix"])
def test_kept_features_are_those_of_a_forward(prefix, native_rows, monkeypatch):
    model, prompts = make_model(head_dim=16), make_prompts(24, prefix)
    plain, answers = make_model(head_dim=16), slot_wise(model, prompts, prefix=prefix, slots=8, loop_repeats=2)
    pack(model)
    decoder = model.get_decoder()
    fused = FusedLayers(decoder, decoder.layers, model.config)
    if fused.native is None and native_rows:
        pytest.skip("no native kernels")
    if fused.native is not None:
        monkeypatch.setattr(fused.native, "most_rows", native_rows)
    more = {"prefix": prefix, "slots": 8, "loop_repeats": 2, "fused": fused}
    found = slot_wise(model, prompts, keeps=Keeps((2, 1, 1), keys=True), **more)
    assert slot_wise(model, prompts, keeps=Keeps((2, 1, 1)), **more)[3].features.keys == ()
    assert len(found) == len(prompts)
    for index, response in found.items():
        assert response.response_ids.tolist() == answers[index].response_ids.tolist()
        assert response.stop_reason == answers[index].stop_reason
        ids = torch.tensor([[*prompts[index], *response.response_ids.tolist()]])
        with torch.no_grad():
            output = plain.model(input_ids=ids, output_hidden_states=True, use_cache=True)
        entering = [output.hidden_states[layer] for layer in (2, 1, 1)]
        expected = torch.cat([*entering, output.last_hidden_state], dim=-1)[0]
        torch.testing.assert_close(response.features.states, expected, rtol=1e-3, atol=1e-3)
        for kept, layer in zip(response.features.keys[0], output.past_key_values.layers, strict=True):
            torch.testing.assert_close(kept, torch.stack([layer.keys[0], layer.values[0]]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("slots", [1, 3, 32])
def test_answers_do_not_depend_on_the_number_of_slots(slots):
    model, prompts = make_model(), make_prompts(9)
    for temperature in (0.0, 1.0):
        expected = slot_wise(model, prompts, slots=5, temperature=temperature, seed=3)
        found = slot_wise(model, prompts, slots=slots, temperature=temperature, seed=3)
        assert found.keys() == expected.keys()
        for index, response in found.items():
            assert response.response_ids.tolist() == expected[index].response_ids.tolist()


def test_rows_are_reordered_without_changing_answers():
    model, prompts = make_model(), make_prompts(24)
    found = slot_wise(model, prompts, slots=16, max_new_tokens=100)  # several re-orderings, a long tail
    for index in (0, 7, 23):
        assert found[index].response_ids.tolist() == one_by_one(model, prompts[index], 100, [2])


def test_seed_changes_samples_and_greedy_ignores_it():
    model, prompts = make_model(), make_prompts(4)

    def answers(temperature, seed):
        found = slot_wise(model, prompts, temperature=temperature, seed=seed)
        return [found[index].response_ids.tolist() for index in range(4)]

    assert answers(1.0, 0) == answers(1.0, 0)
    assert answers(1.0, 0) != answers(1.0, 1)
    assert answers(0.0, 0) == answers(0.0, 1)


def test_generator_can_be_used_again_and_restores_the_model():
    model, prompts = make_model(), make_prompts(5)
    before = model.config._attn_implementation
    generator = SlotGenerator(model, eos_ids=[2], slots=2, max_prompt_tokens=32, max_new_tokens=8)
    requests = [Request(index, prompt) for index, prompt in enumerate(prompts)]
    first = {r.request.index: r.response_ids.tolist() for r in generator.stream(requests)}
    again = {r.request.index: r.response_ids.tolist() for r in generator.stream(reversed(requests))}
    assert first == again
    assert model.config._attn_implementation == before
    assert list(generator.stream([])) == []


def test_eager_models_keep_their_own_attention():
    model, prompts = make_model(), make_prompts(5)
    model.set_attn_implementation("eager")
    found = slot_wise(model, prompts)
    assert [found[i].response_ids.tolist() for i in range(5)] == [one_by_one(model, p, 24, [2]) for p in prompts]


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_long_prompts_among_short_ones_find_room(own):
    model = make_model()
    model.set_attn_implementation(own)
    short = [[5, 6, 7, token] for token in range(8, 32)]  # nothing but the prefix and the first token fed
    prompts = [*short[:12], [5, 6, 7, *range(10, 38)], *short[12:], [5, 6, 7, *range(20, 49)]]
    answers = [one_by_one(model, prompt, 24, [2]) for prompt in prompts]
    found = slot_wise(model, prompts, slots=8)
    assert [found[index].response_ids.tolist() for index in range(len(prompts))] == answers


def test_tokens_made_are_counted():
    model, prompts = make_model(), make_prompts(5)
    generator = SlotGenerator(model, eos_ids=[2], slots=2, max_prompt_tokens=32, max_new_tokens=8)
    ended, seen = 0, []

    def tick():
        seen.append((generator.num_made, generator.num_under_way))

    for answer in generator.stream((Request(index, prompt) for index, prompt in enumerate(prompts)), tick=tick):
        ended += len(answer.response_ids)
        made, under_way = seen[-1]
        assert made - under_way >= ended  # of a step that ended several
    assert generator.num_made == ended
    assert seen[0] == (2, 2)
    assert seen[-1] == (ended, 0)


def test_long_prompts_are_attended_to_as_short_ones_are(monkeypatch):
    model, prompts = make_model(), make_prompts(5)
    expected = slot_wise(model, prompts)
    monkeypatch.setattr(slots_module, "_FUSED_FROM", 0)
    found = slot_wise(model, prompts)
    assert all(found[index].response_ids.tolist() == expected[index].response_ids.tolist() for index in range(5))


def test_loops_end_answers():
    model = make_model()
    with torch.no_grad():  # a model that only looks at the last token loops sooner or later
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    prompts = make_prompts(6)
    plain = slot_wise(model, prompts, max_new_tokens=200, eos=())
    cut = slot_wise(model, prompts, max_new_tokens=200, eos=(), loop_repeats=3)
    assert any(response.stop_reason == "loop" for response in cut.values())
    for index, response in cut.items():
        ids = response.response_ids
        assert ids.tolist() == plain[index].response_ids[: len(ids)].tolist()
        assert (response.stop_reason == "loop") == ends_in_loop(ids, 3)


def test_long_dashes_are_no_loop():
    assert not ends_in_loop(np.full(30, 7, dtype=np.int32), 3)
    assert ends_in_loop(np.full(60, 7, dtype=np.int32), 3)


@pytest.mark.parametrize("prompt", [[], [5, 6, 7], [9, 6, 7, 8], [5, 6, 7] + [8] * 40])
def test_unfit_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="prompt 0"):
        slot_wise(make_model(), [prompt])


def test_unknown_layer_types_are_refused():
    model = make_model("qwen3")
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        SlotGenerator(model, eos_ids=[2], slots=2, max_prompt_tokens=8, max_new_tokens=8)


def test_pick_tokens_inverts_the_distribution_function():
    torch.manual_seed(0)
    logits = torch.randn(1, 300) * 3
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature in (1.0, 0.5):
        tokens = pick_tokens(logits.expand(20_000, -1), torch.full((20_000,), temperature), uniforms)
        share = torch.bincount(tokens, minlength=300) / 20_000
        expected = torch.softmax(logits[0] / temperature, dim=-1)
        assert torch.all((share - expected).abs() <= 1.01 / 20_000)
        assert torch.all(tokens[1:] >= tokens[:-1])


def test_pick_tokens_never_picks_what_is_impossible():
    logits = torch.full((3, 260), -torch.inf)
    logits[:, 129:133] = 0.0
    uniforms = torch.tensor([0.0, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    assert pick_tokens(logits, torch.ones(3), uniforms).tolist() == [129, 131, 132]


def test_pick_tokens_takes_the_first_of_equal_maxima():
    torch.manual_seed(0)
    logits = torch.randint(-5, 3, (40, 700)).to(torch.bfloat16)  # every row has many
    tokens = pick_tokens(logits, torch.zeros(40), torch.zeros(40, dtype=torch.float64))
    assert tokens.tolist() == [row.index(max(row)) for row in logits.tolist()]


def test_pick_tokens_mixes_greedy_and_sampled_rows():
    logits = torch.tensor([[0.0, 1.0, 0.9]] * 3, dtype=torch.bfloat16)
    temperatures, uniforms = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.999, 0.999, 0.0], dtype=torch.float64)
    assert pick_tokens(logits, temperatures, uniforms).tolist() == [1, 2, 0]
