"""What every text encoder offers, and a small one that is trained with the denoiser, with a vocabulary of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Protocol

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from medgen.networks.vocabulary import FIRST_WORD, PAD, Vocabulary
from medgen.types import BadInputError

_SHOWN = 40  # characters of a text that a message quotes
# A suggestion shares so much with an unknown word (Ratcliff and Metzener 1988); shorter words are all alike.
_ALIKE, _SHORTEST = 0.8, 4


class ReadsText(Protocol):
    """What every text encoder offers."""

    @property
    def width(self) -> int:
        """Features of each token."""

    @property
    def length(self) -> int:
        """Tokens of every embedding, padding included."""

    def encode(
        self, texts: Sequence[str], *, device: torch.device | str | None = None, truncate: bool = False
    ) -> torch.Tensor:
        """Embed texts to ``(B, length, width)``, zeros at padding, as :meth:`TextEncoder.encode`."""

    def cut(self, text: str) -> str:
        """End of a text for which there is no room, as :meth:`TextEncoder.cut`."""


class TextEncoder(ModelMixin, ConfigMixin):
    """A small transformer (Vaswani et al. 2017, arXiv:1706.03762) over whole words, to be trained with the denoiser.

    It is pre-norm (Xiong et al. 2020, arXiv:2002.04745) and reads in both directions; padding is masked.

    Args:
        vocabulary: Words that it knows, as :class:`Vocabulary` takes them.
        width: Features of each word.
        depth: Layers.
        heads: Attention heads; they divide ``width``.
        length: Words of a text, and of every embedding.
    """

    @register_to_config
    def __init__(
        self, vocabulary: Sequence[str], width: int = 128, depth: int = 2, heads: int = 4, length: int = 64
    ) -> None:
        super().__init__()
        if min(width, depth, heads, length) < 1 or width % heads:
            raise BadInputError(
                "text encoder: expected positive sizes and a width that is a multiple of the heads, got width "
                f"{width}, depth {depth}, heads {heads}, length {length}. Take for example 128, 2, 4, 64."
            )
        self.vocabulary = Vocabulary(vocabulary)
        self.words = nn.Embedding(len(vocabulary) + FIRST_WORD, width)
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    @property
    def width(self) -> int:
        """Features of each word."""
        return int(self.config["width"])

    @property
    def length(self) -> int:
        """Words of every embedding, padding included."""
        return int(self.config["length"])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed texts.

        Args:
            ids: ``(B, length)`` int64, as :meth:`Vocabulary.tokenize` gives them; a row of padding is no text.

        Returns:
            ``(B, length, width)``, zeros where the ids are padding.

        Raises:
            ValueError: If the ids have another shape.
        """
        if ids.ndim != 2 or ids.shape[1] != self.length:
            raise ValueError(f"expected ids of shape (B, {self.length}), got {tuple(ids.shape)}")
        padding = ids == PAD
        # A row without any word may not be masked whole: the softmax over nothing is NaN, also in the gradients.
        masked = padding & ~padding.all(dim=1, keepdim=True)
        x = self.words(ids) + self.positions
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=masked)
        return self.norm(x).masked_fill(padding[..., None], 0.0)

    def encode(
        self, texts: Sequence[str], *, device: torch.device | str | None = None, truncate: bool = False
    ) -> torch.Tensor:
        """Embed texts, where the weights are.

        Args:
            texts: At least one; none is empty.
            device: Where the embeddings go; None leaves them with the weights.
            truncate: Cut longer texts with a warning, instead of refusing them.

        Returns:
            ``(B, length, width)``, zeros behind the last word. A warning names words that are not in the vocabulary.

        Raises:
            BadInputError: If a text is empty, too long, or has no known word.
        """
        found = [self.vocabulary.tokenize(text, self.length) for text in check_texts(texts)]
        for text, tokens in zip(texts, found, strict=True):
            if tokens.cut:
                refuse_or_warn(text, " ".join(tokens.cut), self.length, truncate)
            if not (tokens.ids >= FIRST_WORD).any():
                raise BadInputError(
                    f"text {shorten(text)}: expected words that the text encoder knows, got none. "
                    f"It knows {len(self.vocabulary.words)}, such as {', '.join(self.vocabulary.words[:20])}."
                )
        unknown = dict.fromkeys(word for tokens in found for word in tokens.unknown)
        if unknown:
            known = [word for word in self.vocabulary.words if not word.isdecimal()]
            long = [word for word in unknown if len(word) >= _SHORTEST]
            close = {word: get_close_matches(word, known, n=1, cutoff=_ALIKE) for word in long}
            named = [f"{word} (did you mean {close[word][0]}?)" if close.get(word) else word for word in unknown]
            warnings.warn(f"words that the text encoder does not know: {', '.join(named)}", stacklevel=2)
        ids = torch.stack([tokens.ids for tokens in found]).to(self.positions.device)
        embedded: torch.Tensor = self(ids)
        return embedded if device is None else embedded.to(device)

    def cut(self, text: str) -> str:
        """End of a text for which there is no room.

        Args:
            text: Any text.

        Returns:
            Its last words; empty where all of it is read.
        """
        return " ".join(self.vocabulary.tokenize(text, self.length).cut)


@torch.no_grad()
def encode_unique(
    encoder: ReadsText, texts: Iterable[str], batch_size: int = 32, *, truncate: bool = False
) -> dict[str, torch.Tensor]:
    """Embed every different text once; right for as long as the encoder is not trained further.

    Args:
        encoder: Any text encoder.
        texts: With repetitions.
        batch_size: Texts at a time.
        truncate: As for ``encode``.

    Returns:
        ``(length, width)`` by text, without gradients, on the CPU.
    """
    unique = list(dict.fromkeys(texts))
    found: dict[str, torch.Tensor] = {}
    for start in range(0, len(unique), batch_size):
        batch = unique[start : start + batch_size]
        found |= zip(batch, encoder.encode(batch, device="cpu", truncate=truncate), strict=True)
    return found


def check_texts(texts: Sequence[str], *, empty: bool = False) -> Sequence[str]:
    """Refuse what is no list of texts.

    Args:
        texts: As a text encoder takes them.
        empty: Whether a text may be empty.

    Returns:
        The texts, as they are.

    Raises:
        BadInputError: If there is no text, or an empty one that may not be.
    """
    if isinstance(texts, str) or not texts:
        raise BadInputError(f"texts: expected a list of at least one text, got {texts!r}. Put a single one in a list.")
    for index, text in enumerate(texts):
        if not text.strip() and not empty:
            raise BadInputError(
                f"texts: expected words in each, got an empty text at position {index}. Leave the text out where there "
                "is none."
            )
    return texts


def refuse_or_warn(text: str, cut: str, length: int, truncate: bool) -> None:
    """Say what of a text is cut, in the name of the caller of ``encode``.

    Args:
        text: Too long for the text encoder.
        cut: Its end, for which there is no room.
        length: Tokens that the text encoder takes.
        truncate: Warn instead of refusing.

    Raises:
        BadInputError: If the text may not be cut.
    """
    if not truncate:
        raise BadInputError(
            f"text {shorten(text)}: expected at most the {length} tokens that the text encoder takes, got more: "
            f"{shorten(cut)} would be cut. Shorten it, or allow the cut with truncate=True."
        )
    warnings.warn(f"text {shorten(text)} is too long for the text encoder: {shorten(cut)} is cut", stacklevel=3)


def shorten(text: str) -> str:
    """Quote a text in a message.

    Args:
        text: Any text.

    Returns:
        Its beginning in quotation marks.
    """
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
