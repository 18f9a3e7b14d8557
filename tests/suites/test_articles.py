"""Who may use an article is a matter of its title alone, and cut texts end where a sentence does."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsdbench.suites.articles import part_of, whole_sentences


def test_parts_have_their_shares() -> None:
    found = Counter(part_of(f"Title {number}") for number in range(40_000))
    assert found["train"] == pytest.approx(39_000, abs=150)
    assert found["heldout"] == pytest.approx(500, abs=90)
    assert found["suite"] == pytest.approx(500, abs=90)


def test_parts_of_known_titles_never_change() -> None:
    """Drafters that were trained on one part must not be measured on it in a later version."""
    titles = ("Apple", "Gamelan", "Hip-hop", "Encyclopedia", "Hamster", "The Great Gatsby", "Tao Yuanming")
    parts = ("train", "heldout", "heldout", "suite", "suite", "suite", "suite")
    assert tuple(map(part_of, titles)) == parts


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("One is here. Two is there. Three.", 27, "One is here. Two is there."),
        ("One is here. Two is there. Three.", 26, "One is here. Two is there."),
        ("One is here. Two is there. Three.", 25, "One is here."),
        ("Short \n enough.", 80, "Short enough."),
        ("By J. R. R. Tolkien in the U.S. Navy. He said so.", 40, "By J. R. R. Tolkien in the U.S. Navy."),
        ("It is 3.5 m long (12 ft). It swims.", 30, "It is 3.5 m long (12 ft)."),
        ('He said "come here." She came. They left.', 24, 'He said "come here."'),
        ("One sentence that is longer than that", 14, "One sentence"),
        ("Supercalifragilistic", 5, "Super"),
    ],
)
def test_whole_sentences_by_hand(text: str, limit: int, expected: str) -> None:
    assert whole_sentences(text, limit) == expected


@given(st.text(alphabet='ab .A\n"', max_size=80), st.integers(1, 60))
def test_a_cut_text_is_a_beginning_that_fits(text: str, limit: int) -> None:
    cut = whole_sentences(text, limit)
    assert len(cut) <= limit
    assert " ".join(text.split()).startswith(cut)
    assert bool(cut) == bool(text.strip())
