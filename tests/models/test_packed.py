"""A packed product is the plain product, is used only where it may be, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from vsdbench.decoding.tree import empty_tree
from vsdbench.models import native, onednn
from vsdbench.models.packed import Packed, PackedLinear, Product, can_pack, pack, unpack
from vsdbench.models.target import Target

CPU = torch.device("cpu")
DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(not can_pack(CPU, dtype), reason=f"no packed {dtype} products here"))
    for dtype in (torch.float32, torch.bfloat16)
]
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 2e-2)}
needs_packing = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="no packed float32 products here")


def make_layer(dtype=torch.float32, *, bias=True, inputs=24, outputs=40):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(requires_grad=False)
    return layer, pack(layer)


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def mislead(layer):
    """Pack twice the weight, so that the packed product can be told from the plain one."""
    object.__setattr__(layer, "packed", Packed(2 * layer.weight.detach(), layer.bias))


def used_packed(layer, inputs) -> bool:
    """Whether a misled layer multiplied with its packed weight."""
    bias = 0 if layer.bias is None else layer.bias
    plain = linear(inputs, layer.weight)
    output = layer(inputs) - bias
    assert torch.allclose(output, plain, atol=1e-4) != torch.allclose(output, 2 * plain, atol=1e-4)
    return torch.allclose(output, 2 * plain, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(24,), (1, 24), (16, 24), (33, 24), (1, 1, 24), (2, 3, 24), (1, 200, 24), (2, 1, 3, 24)]
)
def test_the_packed_product_is_the_plain_one(dtype, bias, shape):
    layer, _ = make_layer(dtype, bias=bias)
    inputs = rows(*shape, dtype=dtype)
    output = layer(inputs)
    assert isinstance(layer, PackedLinear)
    assert output.shape == (*shape[:-1], 40)
    assert output.dtype is dtype
    # The reference is exact: both products may round as they like.
    exact = linear(inputs.double(), layer.weight.double(), layer.bias.double() if bias else None)
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(output.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "cut",
    [
        lambda whole: whole[:, -1:, :],  # what logits_to_keep=1 hands to the head
        lambda whole: whole[:, ::2, :],
        lambda whole: whole[:, :, 4:28],
        lambda whole: whole[..., :24].transpose(0, 1),
        lambda whole: whole[0, 0, :24].expand(5, 24),
    ],
    ids=["last_row", "strided_rows", "columns", "transposed", "expanded"],
)
def test_slices_need_not_be_contiguous(dtype, cut):
    layer, _ = make_layer(dtype)
    inputs = cut(rows(3, 7, 32, dtype=dtype))
    if inputs.shape[-1] != 24:
        layer, _ = make_layer(dtype, inputs=inputs.shape[-1])
    rtol, atol = TOLERANCES[dtype]
    expected = linear(inputs.contiguous(), layer.weight, layer.bias)
    torch.testing.assert_close(layer(inputs), expected, rtol=rtol, atol=atol)


@needs_packing
def test_the_switch_turns_every_layer_of_its_model_off_and_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)).requires_grad_(requires_grad=False)
    other, _ = make_layer()
    switch = pack(model)
    for layer in (model[0], model[2], other):
        mislead(layer)
    inputs = rows(4, 24)
    assert used_packed(model[0], inputs)
    switch.on = False
    assert torch.equal(model[0](inputs), linear(inputs, model[0].weight, model[0].bias))
    assert not used_packed(model[2], inputs)
    assert used_packed(other, inputs)  # another model's switch is another switch
    switch.on = True
    assert used_packed(model[2], inputs)


@needs_packing
def test_a_wanted_gradient_takes_the_plain_product():
    """The packed product has no derivative: gradients must reach inputs, and weights that are trained after all."""
    layer, _ = make_layer()
    mislead(layer)
    inputs = rows(4, 24).requires_grad_()
    assert not used_packed(layer, inputs)
    layer(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, layer.weight.sum(0).expand(4, 24))
    with torch.no_grad():
        assert used_packed(layer, inputs)

    layer.weight.requires_grad_()
    assert not used_packed(layer, rows(4, 24))
    layer(rows(4, 24)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, rows(4, 24).sum(0).expand(40, 24))


@needs_packing
def test_another_input_dtype_takes_the_plain_product():
    layer, _ = make_layer()
    layer.double()
    inputs = rows(4, 24).double()
    torch.testing.assert_close(layer(inputs), linear(inputs, layer.weight, layer.bias))


@needs_packing
def test_packing_changes_nothing_that_is_saved():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    pack(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers  # ties survive
    assert not list(model.buffers())


@needs_packing
def test_only_plain_linear_layers_are_packed():
    """A subclass may compute something else, and its forward must stay its own."""

    class Doubling(nn.Linear):
        def forward(self, input):  # noqa: A002 - nn.Linear's name
            return 2 * super().forward(input)

    model = nn.Sequential(Doubling(8, 8), nn.Linear(8, 8))
    pack(model)
    assert type(model[0]) is Doubling
    assert type(model[1]) is PackedLinear


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.float64), ("cpu", torch.float16), ("cuda", torch.float32), ("meta", torch.float32)],
)
def test_what_cannot_be_packed(device, dtype):
    assert not can_pack(torch.device(device), dtype)


@pytest.mark.skipif(not onednn.can_pack(torch.float32), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("most_rows", [0, 8])
def test_bfloat16_is_packed_where_the_processor_or_a_kernel_has_it(supported, most_rows, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(native, "most_rows", lambda _: most_rows)
    assert can_pack(CPU, torch.bfloat16) is (supported or most_rows > 0)
    assert can_pack(CPU, torch.float32)


def make_target(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype)
    return Target(model, None, name="tiny", fingerprint="0" * 16)


def linears(target):
    return [module for module in target.model.modules() if isinstance(module, nn.Linear)]


@needs_packing
def test_a_target_packs_all_its_products_and_keeps_its_ties():
    target = make_target()
    assert {type(layer) for layer in linears(target)} == {PackedLinear}
    assert target.model.lm_head.weight is target.embed_tokens.weight
    assert not any(isinstance(layer, PackedLinear) for layer in linears(make_target(torch.float64)))


@needs_packing
def test_as_shipped_turns_attention_and_packing_back_and_restores_both():
    target = make_target()
    for layer in linears(target):
        mislead(layer)

    def ours() -> bool:
        packed_layers = {used_packed(layer, rows(3, layer.in_features)) for layer in linears(target)}
        attention = target.model.config._attn_implementation
        assert (packed_layers, attention) in [({True}, "vsdbench"), ({False}, "sdpa")]
        return attention == "vsdbench"

    assert ours()
    with target.as_shipped() as model:
        assert model is target.model
        assert not ours()
    assert ours()
    with pytest.raises(RuntimeError, match="stop"), target.as_shipped():
        raise RuntimeError("stop")
    assert ours()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_target_agrees_with_the_shipped_model(dtype):
    target = make_target(dtype)
    prompt = [3, 9, 27, 1, 3, 9]
    state = target.prefill(prompt, 32)
    state.tokens.append(5)
    output = target.forward_tree(state, empty_tree(CPU))
    with target.as_shipped() as model, torch.no_grad():
        expected = model(torch.tensor([[*prompt, 5]])).logits[0].float()
    scale = float(expected.abs().max())
    assert scale > 0
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    assert float((state.next_logits - expected[-2]).abs().max()) < tolerance * scale
    assert float((output.logits[0] - expected[-1]).abs().max()) < tolerance * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_is_the_linear_map_of_its_weight_packed_or_not(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, generator=generator).to(dtype)
    rows = torch.randn(5, 16, generator=generator).to(dtype)
    result = Product(weight)(rows)
    assert result.shape == (5, 24)
    assert result.dtype == dtype
    torch.testing.assert_close(result, torch.nn.functional.linear(rows, weight), atol=0.05, rtol=0.02)
    assert not torch.allclose(Product(2 * weight)(rows), result)


@needs_packing
def test_unpacked_layers_are_what_they_were():
    layer, _ = make_layer()
    inputs = rows(3, 24)
    mislead(layer)
    assert used_packed(layer, inputs)
    unpack(nn.Sequential(layer))
    assert type(layer) is nn.Linear
    assert not hasattr(layer, "packed")
    assert torch.equal(layer(inputs), linear(inputs, layer.weight, layer.bias))
