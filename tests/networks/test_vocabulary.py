"""Vocabularies: words are counted and found again, and no list that is none is taken."""

from __future__ import annotations

import pytest

from medgen.networks.vocabulary import PAD, UNKNOWN, Vocabulary
from medgen.types import BadInputError


def test_words_are_counted_and_sorted_by_frequency_then_name() -> None:
    texts = ["COVID-19, 54-year-old", "Old covid; b", "b c_d", "Ｂ"]
    assert Vocabulary.split(texts[0]) == ["covid", "19", "54", "year", "old"]
    assert Vocabulary.build(texts).words == ("b", "covid", "old")
    assert Vocabulary.build(reversed(texts), min_count=1).words[:5] == ("b", "covid", "old", "19", "54")


def test_every_letter_of_unicode_gives_words_that_are_words() -> None:
    for number in [*range(0xD800), *range(0xE000, 0x20000)]:
        assert all(Vocabulary.split(word) == [word] for word in Vocabulary.split(chr(number))), hex(number)


def test_tokens_tell_what_is_unknown_and_what_is_cut() -> None:
    ids, unknown, cut = Vocabulary(["chest", "view"]).tokenize("Chest (lateral) view, 2 views", 4)
    assert ids.tolist() == [2, UNKNOWN, 3, UNKNOWN]
    assert (unknown, cut) == (("lateral", "2"), ("views",))
    assert Vocabulary(["chest"]).tokenize("chest", 3).ids.tolist() == [2, PAD, PAD]


@pytest.mark.parametrize("words", [[], ["Chest"], ["a b"], ["a", "a"], [""]])
def test_lists_that_are_no_vocabulary_are_refused(words: list[str]) -> None:
    with pytest.raises(BadInputError, match=r"vocabulary: expected different words .* Build it with"):
        Vocabulary(words)


def test_rare_words_alone_are_no_vocabulary() -> None:
    with pytest.raises(BadInputError, match=r"expected words that occur 2 times or more, got 2 that do not\. Give"):
        Vocabulary.build(["one two"])
