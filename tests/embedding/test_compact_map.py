"""The compact map behaves as a dictionary."""

from hypothesis import given
from hypothesis import strategies as st

from distil_rank.embedding.compact_map import CompactMap


@given(st.lists(st.tuples(st.text(max_size=4), st.integers(0, 2**63)), max_size=60))
def test_it_is_a_dictionary(entries):
    ours, theirs = CompactMap(), {}
    for text, number in entries:
        assert ours.get(text) == theirs.get(text)
        assert ours.setdefault(text, number) == theirs.setdefault(text, number)
        assert len(ours) == len(theirs)


def test_it_grows():
    texts = [f"protein {i}" for i in range(20_000)]
    ours = CompactMap()
    for number, text in enumerate(texts):
        ours.setdefault(text, number)
    assert [ours.get(text) for text in texts] == list(range(20_000))
    assert ours.get("another") is None


def test_odd_texts_are_keys_too():
    ours = CompactMap()
    for number, text in enumerate(["", "\0", "\udc80", "é"]):
        assert ours.setdefault(text, number) == number
