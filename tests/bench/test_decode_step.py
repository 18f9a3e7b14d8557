"""The floor under a decode step is its linear layers, each once, and measuring leaves the target as it was."""

from __future__ import annotations

import pytest
import torch
from tests.decoding.tiny import make_target

from vsdbench.bench.decode_step import measure_steps
from vsdbench.models.packed import PackedLinear, can_pack

pytestmark = pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="no packed products here")


def test_all_variants_are_timed_and_the_fused_layers_are_put_back():
    target = make_target(dtype=torch.float32)
    fused = target.fused_layers
    lines = measure_steps(target, [1, 4], context=8, repeats=3)
    assert target.fused_layers is fused is not None
    assert [line["rows"] for line in lines] == [1, 4]
    for line in lines:
        assert line["own_over_products"] == pytest.approx(line["own_ms"] / line["products_ms"])
        assert line["fused_over_products"] == pytest.approx(line["fused_ms"] / line["products_ms"])
        assert min(line["products_ms"], line["own_ms"], line["fused_ms"]) > 0


def test_a_target_with_its_own_layers_has_no_fused_times():
    (line,) = measure_steps(make_target("phi3-window", dtype=torch.float32), [2], context=8, repeats=1)
    assert line["fused_ms"] is line["fused_over_products"] is None


def test_the_floor_has_every_product_once(monkeypatch):
    target = make_target(dtype=torch.float32)
    calls: list[tuple[int, int]] = []
    plain = PackedLinear.forward

    def forward(self, rows):
        if rows.dim() == 2:  # the model's own layers have a batch axis
            calls.append((self.in_features, self.out_features))
        return plain(self, rows)

    target.fused_layers = None
    monkeypatch.setattr(PackedLinear, "forward", forward)
    measure_steps(target, [1], context=4, repeats=1)
    layers = [m for m in target.model.modules() if isinstance(m, PackedLinear)]
    assert sorted(calls) == sorted(4 * [(layer.in_features, layer.out_features) for layer in layers])
