"""The words that a small text encoder knows, and texts as their ids."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from medgen.types import BadInputError

PAD, UNKNOWN, FIRST_WORD = 0, 1, 2  # ids of padding, of any unknown word, and of the first word
_WORD = re.compile(r"[^\W_]+")


class Tokens(NamedTuple):
    """A text as a text encoder reads it.

    Attributes:
        ids: ``(length,)`` int64, :data:`PAD` behind the last word.
        unknown: Words that are not in the vocabulary, in their order.
        cut: Words for which there was no room.
    """

    ids: torch.Tensor
    unknown: tuple[str, ...]
    cut: tuple[str, ...]


class Vocabulary:
    """The words that a small text encoder knows; a word is a run of letters and digits, in lower case.

    Args:
        words: Each once, and none that :meth:`split` would cut.
    """

    def __init__(self, words: Sequence[str]) -> None:
        wrong = [word for word in words if self.split(word) != [word]]
        repeated = [word for word, count in Counter(words).items() if count > 1]
        if not words or wrong or repeated:
            raise BadInputError(
                "vocabulary: expected different words of letters and digits in lower case, got "
                f"{', '.join(map(repr, (wrong + repeated)[:3])) or 'none'}. Build it with Vocabulary.build."
            )
        self.words = tuple(words)
        self._ids = {word: index for index, word in enumerate(words, start=FIRST_WORD)}

    @staticmethod
    def split(text: str) -> list[str]:
        """Words of a text.

        Args:
            text: Any text.

        Returns:
            ``["covid", "19", "54", "year", "old"]`` for ``COVID-19, 54-year-old``.
        """
        return _WORD.findall(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower()))

    @classmethod
    def build(cls, texts: Iterable[str], *, min_count: int = 2) -> Vocabulary:
        """Vocabulary of the training texts.

        Args:
            texts: Of the training scans.
            min_count: Times that a word must occur. Rarer ones teach the encoder what an unknown word means.

        Returns:
            The words, the most frequent first.

        Raises:
            BadInputError: If no word occurs so often.
        """
        counts = Counter(word for text in texts for word in cls.split(text))
        words = sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))
        if not words:
            raise BadInputError(
                f"texts: expected words that occur {min_count} times or more, got {len(counts)} that do not. Give the "
                "training texts, or a lower min_count."
            )
        return cls(words)

    def tokenize(self, text: str, length: int) -> Tokens:
        """Ids of the words of a text.

        Args:
            text: Any text; an empty one gives padding only.
            length: Number of ids.

        Returns:
            The ids, and which words are unknown or cut.
        """
        words = self.split(text)
        kept = words[:length]
        ids = [self._ids.get(word, UNKNOWN) for word in kept]
        unknown = tuple(word for word in kept if word not in self._ids)
        return Tokens(torch.tensor(ids + [PAD] * (length - len(ids))), unknown, tuple(words[length:]))
