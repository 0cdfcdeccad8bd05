"""What is kept beside a model is bounded, and the longest unused goes first."""

from cntlora_core.model.memo import Memo


def test_the_longest_unused_makes_room():
    memo = Memo(limit=10)
    for key in "abc":
        memo.put(key, key.upper(), 4)
    assert memo.get("a") is None
    assert memo.get("b") == "B"
    memo.put("d", "D", 4)
    assert [memo.get(key) for key in "bcd"] == ["B", None, "D"]


def test_what_is_larger_than_the_limit_is_not_kept():
    memo = Memo(limit=10)
    memo.put("a", "A", 11)
    assert memo.get("a") is None


def test_a_key_kept_twice_counts_once():
    memo = Memo(limit=10)
    memo.put("a", 1, 6)
    memo.put("a", 2, 6)
    assert memo.get("a") == 2
