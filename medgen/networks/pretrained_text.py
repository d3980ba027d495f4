"""Text encoders of transformers, from a folder or the Hub."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from medgen.networks.text_encoder import check_texts, refuse_or_warn
from medgen.types import BadInputError

_VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# What of a Hub repository is downloaded; a pipeline has more weights, of other networks.
_HUB_FILES = ["*.json", "*.txt", "*.model", "model*.safetensors", "text_encoder/model*.safetensors"]
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_NO_LIMIT = 1_000_000  # transformers writes an absent limit as a huge number


class PretrainedTextEncoder(nn.Module):
    """A text encoder of transformers with its tokenizer: CLIP, BERT and its kin, sentence encoders, encoders of T5.

    It starts frozen, and stays in evaluation mode as long as it is; ``requires_grad_()`` makes it trainable.

    Args:
        model: Encoder that gives a ``last_hidden_state``.
        tokenizer: The one that the encoder was trained with.
        length: Tokens of every embedding; None for all that the encoder takes.
        keep_padding: Neither mask padding nor set it to zeros, as the U-Nets of Stable Diffusion were trained.
    """

    def __init__(self, model: Any, tokenizer: Any, *, length: int | None = None, keep_padding: bool = False) -> None:
        super().__init__()
        self.model, self.tokenizer, self.keep_padding = model, tokenizer, keep_padding
        if tokenizer.pad_token_id is None:
            raise BadInputError("tokenizer: expected one with a padding token, got none. Set its pad_token.")
        largest, rows = max(tokenizer.get_vocab().values(), default=0), model.get_input_embeddings().num_embeddings
        if largest >= rows:
            raise BadInputError(
                f"tokenizer: expected ids below {rows}, for which the encoder has embeddings, got {largest}. Take "
                "tokenizer and weights of one model."
            )
        self.length: int = _checked_length(model, tokenizer, length)
        tokenizer.model_max_length = self.length
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_folder(
        cls, path: str | Path, *, length: int | None = None, keep_padding: bool = False
    ) -> PretrainedTextEncoder:
        """Load an encoder in float32; only a Hub id asks the network.

        Args:
            path: Folder of an encoder and its tokenizer, or of a pipeline with ``text_encoder/`` and ``tokenizer/``, or
                ``owner/name`` on the Hub, which is asked only where no local folder ``owner`` exists.
            length: As for the class.
            keep_padding: As for the class.

        Returns:
            The encoder, frozen.

        Raises:
            BadInputError: If transformers is not installed, a file is missing or damaged, the weights are pickled, or
                the model is no text encoder.
        """
        try:
            import transformers
        except ImportError as error:
            raise BadInputError(
                "text encoder: expected the package transformers for a pretrained one, got none. Run: pip install "
                "'medgen[text]'"
            ) from error
        folder = find_folder(path, "the folder of a text encoder", _HUB_FILES)
        weights, words = folder / "text_encoder", folder / "tokenizer"
        if not (folder / "model_index.json").is_file():  # a pipeline has both, or is not whole
            weights, words = (part if part.is_dir() else folder for part in (weights, words))
        _check_files(weights, words)
        try:
            model, missing = _load_model(transformers, weights)
            tokenizer = transformers.AutoTokenizer.from_pretrained(words, **_LOCAL)
        except BadInputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise BadInputError(
                f"{folder}: expected a text encoder and its tokenizer as transformers saves them, got an error: "
                f"{str(error).strip().partition(chr(10))[0]} Save or download them again, whole."
            ) from error
        if missing:
            raise BadInputError(
                f"{weights}: expected weights of the whole text encoder, got none for {', '.join(missing[:3])}. Save "
                "or download it again."
            )
        return cls(model, tokenizer, length=length, keep_padding=keep_padding)

    @property
    def width(self) -> int:
        """Features of each token."""
        return int(self.model.config.hidden_size)

    def train(self, mode: bool = True) -> PretrainedTextEncoder:
        """Switch to training mode, unless frozen: dropout would change what is not trained."""
        return super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))

    def encode(
        self, texts: Sequence[str], *, device: torch.device | str | None = None, truncate: bool = False
    ) -> torch.Tensor:
        """Embed texts, where the weights are.

        Args:
            texts: At least one; none is empty, unless ``keep_padding`` is set: the embedding of an empty text is what
                Stable Diffusion takes for no text.
            device: Where the embeddings go; None leaves them with the weights.
            truncate: Cut longer texts with a warning, instead of refusing them.

        Returns:
            ``(B, length, width)``, the last hidden state, zeros at padding unless ``keep_padding`` is set.

        Raises:
            BadInputError: If a text is empty or too long.
        """
        for text in check_texts(texts, empty=self.keep_padding):
            if cut := self.cut(text):
                refuse_or_warn(text, cut, self.length, truncate)
        tokens = self.tokenizer(
            list(texts),
            padding="max_length" if self.keep_padding else "longest",
            padding_side="right",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        ).to(next(self.model.parameters()).device)
        mask = tokens["attention_mask"]
        attended = {} if self.keep_padding else {"attention_mask": mask}
        embedded: torch.Tensor = self.model(input_ids=tokens["input_ids"], **attended).last_hidden_state
        if not self.keep_padding:
            embedded = embedded.masked_fill(mask[..., None] == 0, 0.0)
            embedded = F.pad(embedded, (0, 0, 0, self.length - embedded.shape[1]))
        return embedded if device is None else embedded.to(device)

    def cut(self, text: str) -> str:
        """End of a text for which there is no room.

        Args:
            text: Any text.

        Returns:
            Its last tokens as text; empty where all of it is read.
        """
        room = self.length - self.tokenizer.num_special_tokens_to_add()
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return str(self.tokenizer.decode(ids[room:])) if len(ids) > room else ""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights as safetensors, the configuration and the tokenizer, for :meth:`from_folder` and transformers.

        Args:
            folder: Made if absent.
        """
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def find_folder(name: str | Path, kind: str, files: list[str]) -> Path:
    """Folder of that name, or a download of that Hub id.

    Args:
        name: Folder, or ``owner/name`` on the Hub, which is asked only where no local folder ``owner`` exists.
        kind: What it is expected to be, for messages.
        files: Patterns of what is downloaded.

    Returns:
        A folder on this machine.

    Raises:
        BadInputError: If there is neither such a folder nor such a Hub id, or the Hub cannot be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or str(name).count("/") != 1 or folder.parent.is_dir():
        raise BadInputError(
            f"{name}: expected {kind} or a Hub id owner/name, got "
            f"{'a file' if folder.exists() else 'nothing of that name here'}. Check the path."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(name), allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInputError(
            f"{name}: expected {kind} or a reachable Hub id, got neither: there is no such folder here, and the Hub "
            f"answers {type(error).__name__}. Check the spelling, or download it and name its folder."
        ) from error


def _check_files(weights: Path, words: Path) -> None:
    """Refuse what transformers would open as a pickle, or replace by an empty tokenizer."""
    if not (weights / "config.json").is_file():
        raise BadInputError(
            f"{weights / 'config.json'}: expected the text encoder's configuration beside its weights, got no such "
            "file. Copy the folder whole."
        )
    if not any(weights.glob("*.safetensors")):
        pickles = [path.name for pattern in _PICKLES for path in weights.glob(pattern)]
        raise BadInputError(
            f"{weights}: expected weights as .safetensors, got "
            + (
                f"{pickles[0]}, a pickle, which can run code when opened. Convert it where you trust it: load it in "
                "transformers and save it with save_pretrained."
                if pickles
                else "none. Copy or download the folder whole."
            )
        )
    if not any((words / name).is_file() for name in _VOCABULARY_FILES):
        raise BadInputError(
            f"{words}: expected a tokenizer ({', '.join(_VOCABULARY_FILES)}), got none of these files. Copy those of "
            "the encoder there, or save its tokenizer there with save_pretrained."
        )


def _load_model(transformers: Any, folder: Path) -> tuple[Any, list[str]]:
    """Text encoder of a folder, and the names of the weights that it lacks."""
    config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    mappings = (transformers.MODEL_FOR_TEXT_ENCODING_MAPPING, transformers.MODEL_MAPPING)
    kinds = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    kind: Any = transformers.CLIPTextModel if config.model_type == "clip" else next(iter(kinds), None)
    if (
        kind is None
        or isinstance(kind, tuple)
        or kind.main_input_name != "input_ids"
        or (kind is not transformers.CLIPTextModel and hasattr(config, "vision_config"))
        or (config.is_encoder_decoder and "Encoder" not in kind.__name__)
    ):
        raise BadInputError(
            f"{folder}: expected a text encoder (CLIP, BERT or its kin, T5), got a model of type {config.model_type}. "
            "Name the folder of a text encoder."
        )
    # The pooled vector is not used: where it can be left out, its weights need neither be there nor be trained.
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind).parameters else {}
    model, report = kind.from_pretrained(
        folder, **_LOCAL, **options, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    return model, sorted(report["missing_keys"])


def _checked_length(model: Any, tokenizer: Any, length: int | None) -> int:
    """Tokens of an embedding, which the encoder can take."""
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None:
        # RoBERTa and its kin count positions from behind the id of padding.
        tables = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
        most -= sum(part.padding_idx + 1 for part in tables if getattr(part, "padding_idx", None) is not None)
    if length is None:
        known = [value for value in (most, tokenizer.model_max_length) if value is not None and value < _NO_LIMIT]
        if not known:
            raise BadInputError(
                "text encoder: expected a length, because neither the encoder nor its tokenizer has a limit, got None. "
                "Pass for example length=128."
            )
        return int(min(known))
    least = tokenizer.num_special_tokens_to_add() + 1
    if not least <= length <= (most or length):
        raise BadInputError(
            f"length: expected {least} to {most or 'any number of'} tokens, as the text encoder takes, got {length}."
        )
    return length
