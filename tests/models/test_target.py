"""The target: a tree forward is one plain forward a path, and a committed cache is a fresh prefill."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import FAMILIES, VOCAB, WINDOW, make_model, make_prompt, make_target, random_tree, tree_of

from vsdbench.decoding.tree import empty_tree
from vsdbench.errors import ConfigError
from vsdbench.models.target import Target

PROMPT = make_prompt(WINDOW + 6, seed=3)
# Root with children 0 and 3; 0 has 1 and 2; 1 has 4; 4 has 5; 3 has 6. Deep enough for a window to slide over it.
TREE = tree_of([5, 6, 7, 8, 9, 10, 11], [-1, 0, 0, -1, 1, 4, 3])
# Weights are float64, but norms and softmax of the models' own code work in float32 inside; faults show above 1e-2.
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def path_of(tree, row):
    nodes = []
    while row > 0:
        nodes.append(row - 1)
        row = tree.parents[row - 1] + 1
    return nodes[::-1]


def stock_forward(family, tokens, features=(0,)):
    """Logits of an untouched model with its own masks; what enters the layers in ``features`` and leaves the last."""
    model = make_model(family).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(torch.tensor([tokens]), output_hidden_states=True)
    return output.logits[0], torch.cat([output.hidden_states[layer][0] for layer in (*features, -1)], dim=-1)


def begun(target, root=4, extra=32):
    state = target.prefill(PROMPT, len(PROMPT) + extra)
    state.tokens.append(root)
    return state


def largest_error(target, family, tree, output, tokens):
    """Largest deviation, over all rows, of logits from a plain forward over that row's path alone."""
    errors = []
    for row in range(len(tree) + 1):
        path = [*tokens, *(int(tree.tokens[node]) for node in path_of(tree, row))]
        logits, _ = stock_forward(family, path)
        errors.append(float((output.logits[row] - logits[-1]).abs().max()))
    return max(errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_forward_is_one_plain_forward_per_path(family):
    target = make_target(family)
    assert target.attention == ("eager" if family == "gemma2" else "vsdbench")
    state = begun(target)
    output = target.forward_tree(state, TREE)
    assert output.logits.shape == (len(TREE) + 1, VOCAB)
    assert output.logits.dtype == target.dtype
    for row in range(len(TREE) + 1):
        path = [*state.tokens, *(int(TREE.tokens[node]) for node in path_of(TREE, row))]
        logits, features = stock_forward(family, path, target.feature_layers)
        torch.testing.assert_close(output.logits[row].double(), logits[-1], **TOLERANCE)
        torch.testing.assert_close(output.features[row], features[-1], **TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_gives_logits_and_features_of_the_prompt(family):
    target = make_target(family)
    state = target.prefill(PROMPT, 40)
    logits, features = stock_forward(family, PROMPT, target.feature_layers)
    torch.testing.assert_close(state.next_logits.double(), logits[-1], **TOLERANCE)
    torch.testing.assert_close(state.features, features, **TOLERANCE)
    assert state.cache.length == len(PROMPT)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fault", ["mask", "positions", "window"])
def test_a_wrong_mask_wrong_positions_or_a_missing_window_is_detected(family, fault, monkeypatch):
    target = make_target(family)
    if fault == "window" and target.window is None:
        pytest.skip("this family has no window")
    state = begun(target)
    if fault == "mask":  # siblings see each other, as in a plain causal forward
        causal = torch.ones(len(TREE) + 1, len(TREE) + 1, dtype=torch.bool).tril()
        monkeypatch.setattr("vsdbench.models.masks.ancestor_mask", lambda *_: causal)
        tree = TREE
    elif fault == "positions":  # nodes stand at their index, not at their depth
        tree = type(TREE)(TREE.tokens, TREE.parents, range(1, len(TREE) + 1), TREE.log_probs)
    else:
        state.cache.reset()
        target.masks.window = 10**6
        state, tree = begun(target), TREE
    output = target.forward_tree(state, tree)
    assert largest_error(target, family, TREE, output, state.tokens) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", [[], [0], [0, 1, 4, 5], [3, 6], [0, 2]], ids=str)
def test_cache_after_commit_is_a_fresh_prefill(family, path):
    target = make_target(family)
    state = begun(target)
    target.forward_tree(state, TREE)
    state.commit(path, [*(int(TREE.tokens[node]) for node in path), 12])
    after = target.forward_tree(state, TREE)
    fresh_target = make_target(family)
    fresh = fresh_target.prefill(state.tokens[:-1], 64)
    fresh.tokens.append(state.tokens[-1])
    expected = fresh_target.forward_tree(fresh, TREE)
    assert state.cache.length == len(PROMPT) + 1 + len(path)
    torch.testing.assert_close(after.logits, expected.logits, **TOLERANCE)
    torch.testing.assert_close(after.features, expected.features, **TOLERANCE)


def test_commit_of_a_wrong_path_is_detected():
    target = make_target()
    state = begun(target)
    target.forward_tree(state, TREE)
    state.commit([0, 2], [5, 6, 12])  # the tokens of nodes 0 and 1, the cache rows of 0 and 2
    after = target.forward_tree(state, TREE)
    assert largest_error(target, "llama", TREE, after, state.tokens) > 1e-2


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_many_random_steps_stay_equal_to_a_plain_forward(family):
    target = make_target(family)
    generator = torch.Generator().manual_seed(1)
    state = begun(target, extra=80)
    for _ in range(6):
        tree = random_tree(generator, 6)
        target.forward_tree(state, tree)
        path = path_of(tree, int(torch.randint(0, 7, (), generator=generator)))
        state.commit(path, [*(int(tree.tokens[node]) for node in path), 9])
    output = target.forward_tree(state, empty_tree(target.device))
    logits, features = stock_forward(family, state.tokens, target.feature_layers)
    torch.testing.assert_close(output.logits[0].double(), logits[-1], **TOLERANCE)
    torch.testing.assert_close(output.features[0], features[-1], **TOLERANCE)


def test_a_cache_is_reused_and_grows_for_a_longer_sequence():
    target = make_target()
    first = target.prefill(PROMPT, 30)
    again = target.prefill(PROMPT[:4], 20)
    assert again.cache is first.cache
    expected = make_target().prefill(PROMPT[:4], 20)
    torch.testing.assert_close(again.next_logits, expected.next_logits)
    assert target.prefill(PROMPT, 60).cache.capacity >= 60


def test_float32_with_packed_weights_agrees_and_hands_back_the_plain_model():
    target = make_target(dtype=torch.float32)
    state = begun(target)
    output = target.forward_tree(state, TREE)
    assert largest_error(target, "llama", TREE, output, state.tokens) < 1e-3
    with target.as_shipped() as model:
        assert model.config._attn_implementation == "sdpa"
    assert target.model.config._attn_implementation == "vsdbench"


@pytest.mark.parametrize(
    ("layers", "expected"), [(30, (2, 15, 27)), (6, (2, 3, 3)), (4, (2, 2, 1)), (2, (1, 1, 0)), (1, (0, 0, 0))]
)
def test_feature_layers(layers, expected):
    target = make_target(num_hidden_layers=layers)
    assert target.feature_layers == expected
    assert target.prefill(PROMPT, 32).features.shape == (len(PROMPT), 4 * target.hidden_size)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_keep_layers_is_the_model_without_its_later_layers(family):
    target, whole = make_target(family), make_model(family).eval()
    target.keep_layers(2)
    whole.model.layers = whole.model.layers[:2]
    whole.config.num_hidden_layers = 2
    positions = torch.arange(len(PROMPT))
    causal = positions[:, None] >= positions[None]
    from vsdbench.models.kv_cache import PreallocatedCache

    logits = target.forward(torch.tensor(PROMPT), positions, causal, positions, PreallocatedCache(2, 32))
    with torch.no_grad():
        expected = whole(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits.double(), expected, **TOLERANCE)


@pytest.mark.parametrize("count", [0, 5])
def test_keep_layers_refuses_what_is_not_there(count):
    with pytest.raises(ConfigError, match=f"num_layers is {count}, but 'llama' has 4 layers"):
        make_target().keep_layers(count)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ConfigError, match="no tokens"):
        make_target().prefill([], 8)


def test_layers_that_cannot_decode_trees_are_refused():
    model = make_model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention", "full_attention"]
    with pytest.raises(ConfigError, match="chunked_attention"):
        Target(model, None, name="chunky", fingerprint="0")


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(ConfigError, match="'nothing' cannot be loaded as a decoder-only model"):
        Target.load(tmp_path, name="nothing", fingerprint="0", device=torch.device("cpu"), dtype=torch.float32)


def test_end_tokens_come_from_the_generation_config_and_the_tokenizer():
    model = make_model()
    model.generation_config.eos_token_id = [7, 9]

    class Tokenizer:
        eos_token_id = 3
        chat_template = None

        def __call__(self, text):
            return {"input_ids": [len(text)]}

    target = Target(model, Tokenizer(), name="x", fingerprint="0")
    assert target.eos_ids == {3, 7, 9}
    assert target.encode_chat([{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}]) == [5]
    assert len(target.template_hash) == 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2"])
def test_tree_forward_on_cuda(family):
    target = make_target(family, dtype=torch.float32, device="cuda")
    state = begun(target)
    tree = tree_of(TREE.tokens.tolist(), TREE.parents, "cuda")
    output = target.forward_tree(state, tree)
    for row in range(len(tree) + 1):
        path = [*state.tokens, *(int(tree.tokens[node]) for node in path_of(tree, row))]
        logits, _ = stock_forward(family, path)
        torch.testing.assert_close(output.logits[row].double().cpu(), logits[-1], rtol=0, atol=0.05)


def test_the_families_are_what_transformers_loads():
    assert {type(make_model(family)).__name__ for family in FAMILIES} == {
        "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM",
        "Olmo2ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
    }  # fmt: skip


def test_a_cut_target_forgets_the_cache_of_the_whole_one():
    target = make_target()
    assert len(target.prefill(PROMPT, 32).cache.layers) == 4
    target.keep_layers(2)
    state = target.prefill(PROMPT, 32)
    assert len(state.cache.layers) == 2
    assert state.features.shape == (len(PROMPT), 4 * target.hidden_size)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gemma3"])
def test_bfloat16_stays_near_the_exact_forward_and_a_wrong_mask_does_not(family, device, monkeypatch):
    target = make_target(family, dtype=torch.bfloat16, device=device)
    tree = tree_of(TREE.tokens.tolist(), TREE.parents, device)
    state = begun(target)

    def worst():
        output = target.forward_tree(state, tree)
        assert output.features.dtype == torch.bfloat16
        scale = float(output.logits.abs().max())
        moved = type(output)(output.logits.cpu(), output.features)
        return largest_error(target, family, TREE, moved, state.tokens) / scale

    right = worst()
    causal = torch.ones(len(TREE) + 1, len(TREE) + 1, dtype=torch.bool, device=device).tril()
    monkeypatch.setattr("vsdbench.models.masks.ancestor_mask", lambda *_: causal)
    wrong = worst()
    assert right < 0.15
    assert wrong > 2 * right
