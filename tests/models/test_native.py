"""Kernels of our own compute what torch does, and a row's numbers do not depend on the rows beside it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from tests.decoding.tiny import make_model, make_prompt, tree_of
from torch.nn.functional import linear, silu

from vsdbench.decoding.engine import Autoregressive, DecodeSettings, decode
from vsdbench.decoding.tree import any_chain, empty_tree
from vsdbench.errors import ConfigError
from vsdbench.models import native, onednn
from vsdbench.models.packed import Packed, Product
from vsdbench.models.target import Target
from vsdbench.models.together import Together

needs_kernels = pytest.mark.skipif(native.library() is None, reason=f"no native kernels: {native.why_not()}")
DTYPES = [torch.float32, torch.bfloat16]
FAMILIES = ["llama", "llama-mha", "qwen2", "qwen2-window", "qwen3", "mistral-window"]
PROMPT = make_prompt(70, seed=3)
TREE = tree_of([5, 6, 7, 8, 9, 10, 11, 12, 13], [-1, 0, 0, -1, 1, 4, 3, -1, 5])


def numbers(*shape, dtype, seed=0, spread=1.0):
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def panels(outputs=70, inputs=40, *, dtype, bias=False):
    weight = numbers(outputs, inputs, dtype=dtype)
    added = numbers(outputs, dtype=dtype, seed=1) if bias else None
    return native.Panels(native.library(), weight, added), weight, added


def close(found, exact, dtype):
    scale = float(exact.abs().max())
    return float((found.double() - exact).abs().max()) <= (2e-6 if dtype is torch.float32 else 8e-3) * scale


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (31, 7), (64, 48), (70, 40), (200, 300)])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 12, 13, 37, 64, 65, 200])
def test_products_are_exact_but_for_rounding(rows, outputs, inputs, bias, dtype):
    made, weight, added = panels(outputs, inputs, dtype=dtype, bias=bias)
    x = numbers(rows, inputs, dtype=dtype, seed=2)
    exact = linear(x.double(), weight.double(), None if added is None else added.double())
    found = made.multiply(x)
    assert found.dtype is dtype
    assert close(found, exact, dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_follows_a_product_is_part_of_it(dtype):
    made, weight, added = panels(dtype=dtype, bias=True)
    x, other = numbers(9, 40, dtype=dtype, seed=2), numbers(9, 70, dtype=dtype, seed=3)
    exact = linear(x.double(), weight.double(), added.double())
    assert close(made.multiply(x, "swish"), silu(exact), dtype)
    assert close(made.multiply(x, "none", "add", other), exact + other.double(), dtype)
    assert close(made.multiply(x, "none", "mul", other), exact * other.double(), dtype)


@needs_kernels
def test_a_narrow_weight_is_rounded_and_the_rows_are_not():
    weight, bias = numbers(70, 40, dtype=torch.float32), numbers(70, dtype=torch.float32, seed=1)
    x = numbers(9, 40, dtype=torch.float32, seed=2)
    found = native.Panels(native.library(), weight, bias, narrow=True).multiply(x)
    assert found.dtype is torch.float32
    assert close(found, linear(x.double(), weight.bfloat16().double(), bias.double()), torch.float32)
    assert not close(found, linear(x.double(), weight.double(), bias.double()), torch.float32)


@needs_kernels
def test_drafts_are_rounded_and_targets_are_not():
    weight, x = numbers(70, 40, dtype=torch.float32), numbers(9, 40, dtype=torch.float32, seed=2)
    exact, rounded = linear(x.double(), weight.double()), linear(x.double(), weight.bfloat16().double())
    assert close(Product(weight)(x), exact, torch.float32)
    assert close(Product(weight, narrow=True)(x), rounded, torch.float32)


@needs_kernels
@pytest.mark.parametrize("width", [1, 5, 16, 31, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_what_is_expected_of_a_draw_is_torchs(width, temperature):
    scores = 4 * numbers(3, width, dtype=torch.float32)
    high = np.random.default_rng(width).integers(0, 2**32, 3 * width, dtype=np.uint32)
    high[:3] = 0, 2**32 - 1, 2**27  # the largest noise, the smallest, and where a series takes over
    ids = torch.arange(width) * 2 % (3 * width)
    uniform = (torch.from_numpy(high.astype(np.float64))[ids] + 0.5) * 2.0**-32
    noise = -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))
    expected = torch.log_softmax(scores.double() / temperature + 0.7 * noise, dim=-1)
    found = native.informed(scores, high, ids, temperature, 0.7)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("width", [1, 5, 255, 256, 257, 1000, 16_384])
@pytest.mark.parametrize("count", [1, 4, 10])
def test_the_largest_are_those_of_a_sort_the_first_of_equals_first(width, count):
    count = min(count, width)
    x = numbers(4, width, dtype=torch.float32)
    x[1] = (4 * x[1]).round()  # many are equal
    x[2] = x[2].sort().values  # each is larger than all before it
    x[3, ::2] = -torch.inf
    values, places = native.top_k(x, count)
    expected = x.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :count])
    if native.library() is not None:
        assert torch.equal(places, expected.indices[:, :count])
    assert torch.equal(x.gather(1, places), values)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9, 64, 65])
def test_norms_are_torchs(rows, dtype):
    x, weight = numbers(rows, 41, dtype=dtype), numbers(41, dtype=dtype, seed=1)
    exact = torch.nn.functional.rms_norm(x.double(), (41,), weight.double(), 1e-5)
    found = native.norm(x, weight, 1e-5)
    assert found.dtype is dtype
    assert close(found, exact, dtype)


@needs_kernels
def test_the_activation_is_right_at_both_ends():
    x = torch.tensor([[-1e4, -200.0, -88.0, -20.0, -1.0, -1e-6, 0.0, 1e-6, 1.0, 20.0, 88.0, 200.0, 1e30]])
    made = native.Panels(native.library(), torch.eye(x.shape[1]), None)
    torch.testing.assert_close(made.multiply(x, "swish"), silu(x.double()).float(), rtol=1e-6, atol=1e-30)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_bits_whatever_is_beside_it(dtype):
    made, _, _ = panels(200, 300, dtype=dtype, bias=True)
    x = numbers(150, 300, dtype=dtype, seed=2)
    alone = torch.cat([made.multiply(row[None], "swish") for row in x])
    for count in (2, 6, 7, 12, 13, 31, 64, 65, 129, 150):
        assert torch.equal(made.multiply(x[:count], "swish"), alone[:count])


@needs_kernels
def test_rows_need_not_lie_together():
    made, weight, _ = panels(dtype=torch.float32)
    wide = numbers(3, 4, 80, dtype=torch.float32, seed=2)
    for x in (wide[..., ::2], wide[:, 1:2, :40], wide[..., :40].transpose(0, 1)):
        found = made.multiply(x)
        assert found.shape == (*x.shape[:-1], 70)
        torch.testing.assert_close(found, linear(x, weight))


def build(family="llama", dtype=torch.float32, **changes):
    changes = {"head_dim": 16, "hidden_size": 40} | changes
    target = Target(make_model(family, dtype=dtype, **changes), None, name=family, fingerprint="0" * 16)
    assert target.layers_are == "native"
    return target


def without(target):
    """The same target, whose fused layers run in the place of the kernels."""
    target.fused_layers.native = None
    assert target.layers_are == "fused"
    return target


def begun(target):
    state = target.prefill(PROMPT, len(PROMPT) + 40)
    state.tokens.append(4)
    return state


def error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_the_fused_ones(family, dtype):
    ours, theirs = build(family, dtype), without(build(family, dtype))
    ours.fused_layers.native.most_rows = len(PROMPT) - 1  # it is read alike: kernels round less often
    states = [begun(ours), begun(theirs)]
    for path in ([], [0, 1], [3]):  # the cache behind a commit too
        if path:
            for state in states:
                state.commit(path, [*(int(TREE.tokens[node]) for node in path), 12])
        found, expected = (
            target.forward_tree(state, TREE) for target, state in zip((ours, theirs), states, strict=True)
        )
        assert found.logits.dtype is found.features.dtype is dtype
        tolerance = 1e-5 if dtype is torch.float32 else 0.04
        assert error(found.features, expected.features) < tolerance
        assert error(found.logits, expected.logits) < tolerance


@needs_kernels
@pytest.mark.parametrize("width", [16, 32, 48, 80, 128])
def test_heads_may_be_of_several_widths(width):
    found, expected = (
        target.forward_tree(begun(target), TREE).logits
        for target in (build(head_dim=width), without(build(head_dim=width)))
    )
    assert error(found, expected) < 1e-5


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_in_a_tree_has_the_bits_that_it_has_alone(family, dtype):
    """What makes greedy answers equal to the last token, and not only up to rounding."""
    target = build(family, dtype)
    for path in ([0, 1, 4, 5, 8], [0, 2], [3, 6], [7]):
        state = begun(target)
        tree = target.forward_tree(state, TREE)
        rows = [0, *(node + 1 for node in path)]
        alone = begun(target)
        for row, node in zip(rows, [*path, None], strict=True):
            output = target.forward_tree(alone, empty_tree(target.device))
            assert torch.equal(output.logits[0], tree.logits[row])
            assert torch.equal(output.features[0], tree.features[row])
            if node is not None:
                alone.commit([], [int(TREE.tokens[node])])
        # And what it leaves in the cache is what decoding alone leaves there.
        state.commit(path, [*(int(TREE.tokens[node]) for node in path), 12])
        alone.commit([], [12])
        after = [target.forward_tree(one, TREE).logits for one in (state, alone)]
        assert torch.equal(*after)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3", "mistral-window"])
@pytest.mark.parametrize("trees", [[0, 0, 0], [9, 0, 4], [9, 9, 9]], ids=["plain", "ragged", "even"])
def test_a_sequence_among_others_has_the_bits_that_it_has_alone(family, dtype, trees, monkeypatch):
    target = build(family, dtype)
    monkeypatch.setattr(target.fused_layers, "run", None)  # the kernels do all of it
    prompts = [PROMPT[:length] for length in (70, 33, 52)]
    trees = [TREE if size == 9 else any_chain(size, target.device) for size in trees]

    def follow(state, tree):
        """Commit the first node, if there is one."""
        path = [0] if len(tree) else []
        state.commit(path, [*(int(tree.tokens[node]) for node in path), 12])

    expected = []
    for prompt, tree in zip(prompts, trees, strict=True):
        state = target.prefill(prompt, 100)
        state.tokens.append(4)
        first = target.forward_tree(state, tree)
        follow(state, tree)
        expected.append((first, target.forward_tree(state, tree)))
    together = Together(target, 3, 100)
    states = [together.prefill(prompt) for prompt in prompts]
    for state in states:
        state.tokens.append(4)
    for step in range(2):
        found = together.forward_trees(states, trees)
        for state, tree, output, own in zip(states, trees, found, expected, strict=True):
            assert torch.equal(output.logits, own[step].logits)
            assert torch.equal(output.features, own[step].features)
            follow(state, tree)


@needs_kernels
def test_threads_share_the_work_and_change_no_bit(monkeypatch):
    found = []
    for count in (1, 2, 3, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        target = build(hidden_size=72, intermediate_size=200)
        found.append(target.forward_tree(begun(target), TREE).logits)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_kernels
def test_more_rows_than_the_kernels_take_run_in_the_fused_layers(monkeypatch):
    target = build()
    calls = []
    plain = target.fused_layers.run
    monkeypatch.setattr(target.fused_layers, "run", lambda *args: calls.append(len(args[0])) or plain(*args))
    monkeypatch.setattr(target.fused_layers.native, "most_rows", 30)
    state = target.prefill(PROMPT[:20], 128)
    state.tokens.append(4)
    limit = 30
    target.forward_tree(state, any_chain(limit - 1, target.device))
    assert not calls
    target.forward_tree(state, any_chain(limit, target.device))
    assert calls == [limit + 1]


@needs_kernels
def test_a_full_cache_is_said_and_not_overwritten():
    target = build()
    state = target.prefill(PROMPT, len(PROMPT) + 3)
    state.tokens.append(4)
    with pytest.raises(ConfigError, match="do not fit into a cache of 73"):
        target.forward_tree(state, TREE)


@needs_kernels
def test_other_widths_keep_the_fused_layers():
    target = Target(make_model("llama", dtype=torch.float32), None, name="narrow", fingerprint="0" * 16)
    assert target.layers_are == "fused"  # heads of 8


@needs_kernels
def test_many_rows_are_multiplied_elsewhere(monkeypatch):
    packed = Packed(numbers(70, 40, dtype=torch.float32))
    monkeypatch.setattr(native.Panels, "multiply", lambda *_: pytest.fail("these are too many rows"))
    rows = numbers(native.most_rows(torch.float32) + 1, 40, dtype=torch.float32)
    torch.testing.assert_close(packed.multiply(rows, "swish"), silu(linear(rows, numbers(70, 40, dtype=torch.float32))))


SAY = """
import torch
from vsdbench.models import native
print(native.most_rows(torch.float32), native.describe(torch.device("cpu"), torch.float32)["not_native"])
"""


def say(**variables):
    environment = {key: value for key, value in os.environ.items() if key != native.VARIABLE} | variables
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


def test_it_is_said_why_there_are_no_kernels(tmp_path):
    assert say(VSDBENCH_NATIVE="0") == "0 VSDBENCH_NATIVE is 0"
    if sys.platform == "linux":
        missing = say(CC="no-such-compiler", VSDBENCH_CACHE=str(tmp_path))
        assert missing == "0 there is no C compiler 'no-such-compiler': install gcc, or name one in CC"
        broken = tmp_path / "cc"
        broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 3\n")
        broken.chmod(0o755)
        assert say(CC=str(broken), VSDBENCH_CACHE=str(tmp_path)) == "0 they cannot be compiled or loaded: it is broken"
        assert not list(tmp_path.rglob("*.so"))


def test_an_unknown_wish_is_refused():
    environment = os.environ | {native.VARIABLE: "off"}
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode
    assert "ConfigError: VSDBENCH_NATIVE is 'off': 0 does without kernels" in done.stderr


@needs_kernels
def test_how_many_rows_pay_is_measured_once_for_a_machine(tmp_path):
    first = say(VSDBENCH_CACHE=str(tmp_path))
    (kept,) = tmp_path.rglob("*.json")
    assert int(first.split()[0]) in {0, 1, 2, 4, 8, 16, 32, 64, 128, 256}
    kept.write_text('{"torch.float32": 16}')
    assert say(VSDBENCH_CACHE=str(tmp_path)) == "16 None"


@needs_kernels
def test_without_kernels_a_target_still_decodes_the_same_tokens(monkeypatch):
    chosen = DecodeSettings(max_new_tokens=20, eos_ids=frozenset())
    with_kernels = decode(build(), Autoregressive(), PROMPT, chosen).token_ids
    monkeypatch.setattr(native, "most_rows", lambda _: 0)
    target = Target(
        make_model("llama", dtype=torch.float32, head_dim=16, hidden_size=40),
        None, name="llama", fingerprint="0" * 16,
    )  # fmt: skip
    assert target.layers_are == ("fused" if onednn.can_pack(torch.float32) else "own")
    assert decode(target, Autoregressive(), PROMPT, chosen).token_ids == with_kernels


@needs_kernels
def test_kernels_that_are_being_compiled_are_waited_for_and_not_compiled_twice(tmp_path, monkeypatch):
    made = native._folder() / f"{native._key()}.so"
    began, compiled = threading.Event(), []

    def compile_slowly(compiler, path):
        began.set()
        time.sleep(0.2)  # the other one comes now
        path.parent.mkdir(parents=True)
        path.write_bytes(made.read_bytes())
        compiled.append(path)

    monkeypatch.setattr(native, "_folder", lambda: tmp_path / "kernels")
    monkeypatch.setattr(native, "_compile", compile_slowly)
    monkeypatch.setattr(native, "library", native._load.__wrapped__)  # without what is known from before
    monkeypatch.delenv(native.VARIABLE, raising=False)
    native.prepare()
    assert began.wait(10)
    assert native.library()[0] is not None
    assert len(compiled) == 1
