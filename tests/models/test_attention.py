"""Grouped attention is attention: equal to the naive formula with repeated keys and values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vsdbench.models.attention import grouped_attention


def tensors(heads, kv_heads, num_queries, num_keys, batch=2, width=8, value_width=8):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query = normal(batch, heads, num_queries, width)
    key, value = normal(batch, kv_heads, num_keys, width), normal(batch, kv_heads, num_keys, value_width)
    keep = torch.rand((num_queries, num_keys), generator=generator) < 0.5
    keep[:, 0] = True
    mask = torch.zeros(1, 1, num_queries, num_keys, dtype=torch.float64).masked_fill_(~keep, -1e300)
    return query, key, value, mask


def naive(query, key, value, mask, scaling):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = torch.softmax(query @ key.transpose(-1, -2) * scaling + mask, dim=-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 1), (4, 4)])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 9), (5, 9), (9, 9)])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_equals_the_naive_formula(heads, kv_heads, num_queries, num_keys, scaling):
    query, key, value, mask = tensors(heads, kv_heads, num_queries, num_keys)
    output, weights = grouped_attention(None, query, key, value, mask, scaling=scaling)
    torch.testing.assert_close(output, naive(query, key, value, mask, scaling or 8**-0.5))
    assert weights is None
    assert output.is_contiguous()


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4)])
@pytest.mark.parametrize("num_queries", [1, 6])
def test_no_mask_is_causal(heads, kv_heads, num_queries):
    query, key, value, _ = tensors(heads, kv_heads, num_queries, num_queries)
    causal = torch.full((num_queries, num_queries), -torch.inf, dtype=torch.float64).triu(1)
    output, _ = grouped_attention(None, query, key, value, None)
    torch.testing.assert_close(output, naive(query, key, value, causal, 8**-0.5))


def test_values_may_have_another_width():
    query, key, value, mask = tensors(6, 2, 5, 9, value_width=4)
    output, _ = grouped_attention(None, query, key, value, mask)
    assert output.shape == (2, 5, 6, 4)
    torch.testing.assert_close(output, naive(query, key, value, mask, 8**-0.5))


@pytest.mark.parametrize("what", ["softcap", "s_aux"])
def test_what_it_cannot_do_is_refused(what):
    query, key, value, mask = tensors(4, 2, 2, 3)
    with pytest.raises(ValueError, match="soft-capping"):
        grouped_attention(None, query, key, value, mask, **{what: 30.0})


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_without_a_mask_the_layer_or_the_caller_says_whether_it_is_causal(heads, kv_heads):
    query, key, value, _ = tensors(heads, kv_heads, 5, 5)
    open_mask = torch.zeros(5, 5, dtype=torch.float64)
    causal_mask = torch.full((5, 5), -1e300, dtype=torch.float64).triu(1)

    def attend(module=None, **said):
        return grouped_attention(module, query, key, value, None, **said)[0]

    seeing_all, seeing_back = (naive(query, key, value, mask, 8**-0.5) for mask in (open_mask, causal_mask))
    torch.testing.assert_close(attend(), seeing_back)
    torch.testing.assert_close(attend(SimpleNamespace(is_causal=True), is_causal=None), seeing_back)
    torch.testing.assert_close(attend(SimpleNamespace(is_causal=False)), seeing_all)
    torch.testing.assert_close(attend(SimpleNamespace(is_causal=True), is_causal=False), seeing_all)
