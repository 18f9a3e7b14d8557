"""The most likely token, in blocks, is the first of the highest, whatever the width and however many are tied."""

from __future__ import annotations

import pytest
import torch

from vsdbench_drafters.largest import largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 5, 256, 257, 300, 512, 1000])
@pytest.mark.parametrize("levels", [2, 5, 10_000])  # with few of them, most rows have ties
def test_it_is_the_first_of_the_highest(vocab, levels, dtype):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randint(-levels, levels, (40, vocab), generator=generator).to(dtype)
    values, indices = largest(logits)
    assert values.tolist() == logits.amax(-1).tolist()
    assert indices.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert largest(logits[:, : vocab // 2 + 1])[1].max() <= vocab // 2  # a slice of wider rows
