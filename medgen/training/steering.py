"""What steers each training sample, read from what was cached of its scan."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from medgen.conditions.assemble import assemble
from medgen.conditions.condition import Condition, join
from medgen.networks import PretrainedTextEncoder, TextEncoder, Vocabulary, encode_unique
from medgen.networks.text_encoder import shorten
from medgen.planning import SMALL_ENCODER, ConditionsPlan, TextPlan
from medgen.seeding import derive_seed, stream
from medgen.training.cache import CachedScan
from medgen.types import BadInputError

AnyTextEncoder = TextEncoder | PretrainedTextEncoder


class Steering:
    """Conditions of the training samples of one denoiser.

    Args:
        plan: What steers it; None for the label generator, which sees the field of view.
        num_classes: Classes of the label map, with background.
        scans: All that it may be asked for.
        text_encoder: Reads their texts; None where texts do not steer.
    """

    def __init__(
        self,
        plan: ConditionsPlan | None,
        num_classes: int,
        scans: Sequence[CachedScan],
        text_encoder: AnyTextEncoder | None = None,
    ) -> None:
        self.plan, self.num_classes, self.text_encoder = plan, num_classes, text_encoder
        self.scans = {scan.case: scan for scan in scans}
        texts = [scan.text for scan in scans if scan.text] if text_encoder else []
        _tell_cut(text_encoder, texts)
        self.ids: dict[str, torch.Tensor] = {}
        self.frozen: dict[str, torch.Tensor] = {}
        if isinstance(text_encoder, TextEncoder):
            self.ids = {text: text_encoder.vocabulary.tokenize(text, text_encoder.length).ids for text in set(texts)}
        elif text_encoder is not None and not is_trained(text_encoder):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is cut is told
                self.frozen = encode_unique(text_encoder, sorted(texts), truncate=True)

    def read(self, case: str, tensors: Mapping[str, torch.Tensor], seed: int | None) -> tuple[Condition, str]:
        """What is known of one version of a scan.

        Args:
            case: Of the scan.
            tensors: ``label (*size)``, ``valid (*size)`` and, where edges steer, ``edge (*size)`` uint8.
            seed: Decides which classes are left unsaid; None says all.

        Returns:
            Its condition, with ``text (1, 1, 1)`` telling whether it has one, and the text.
        """
        scan, valid = self.scans[case], tensors["valid"]
        if self.plan is None:
            return Condition({"mask": valid[None, None].float()}), ""
        label = tensors["label"]
        if self.plan.class_dropout and seed is not None:
            # Left out as a map of few classes leaves them out: what is not named may be anything.
            said = torch.rand(self.num_classes, generator=stream(seed, "classes")) >= self.plan.class_dropout
            said[0] = True
            label = label * said[label.long()]
        facts = {name: value for name, value in scan.facts.items() if name in self.plan.attributes}
        condition = assemble(
            index=label if self.plan.mask and scan.labelled else None,
            num_classes=self.num_classes,
            mask_form=self.plan.mask_form,
            valid=valid,
            edge=tensors["edge"][None].float() / 255 if self.plan.edge is not None else None,
            attributes=self.plan.attributes,
            facts=facts,
            text=torch.ones(1, 1) if self.text_encoder is not None and scan.text else None,
        )
        return condition, scan.text

    def batch(self, rows: Sequence[Condition], texts: Sequence[str], device: torch.device) -> Condition:
        """One condition of several samples, with their words embedded.

        Args:
            rows: As :meth:`read` gives them, after some were dropped.
            texts: Of each sample.
            device: Where it goes.

        Returns:
            The batch; gradients flow into a text encoder that is trained.
        """
        batch = join(rows).to(device)
        present = batch.parts.get("text")
        if present is None:
            return batch
        shown = [index for index in range(len(texts)) if present[index].any()]
        if not shown:
            return batch.only([name for name in batch if name != "text"])
        embedded = self._embed([texts[index] for index in shown], device)
        whole = embedded.new_zeros((len(texts), *embedded.shape[1:]))
        whole = whole.index_copy(0, torch.tensor(shown, device=device), embedded)
        return Condition({**batch.parts, "text": whole})

    def _embed(self, texts: Sequence[str], device: torch.device) -> torch.Tensor:
        if self.ids and isinstance(self.text_encoder, TextEncoder):
            return self.text_encoder(torch.stack([self.ids[text] for text in texts]).to(device))
        if self.frozen:
            return torch.stack([self.frozen[text] for text in texts]).to(device)
        if self.text_encoder is None:
            raise ValueError("expected a text encoder, got none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is cut is told
            return self.text_encoder.encode(texts, device=device, truncate=True)


def _tell_cut(encoder: AnyTextEncoder | None, texts: Sequence[str]) -> None:
    """Warn once of all texts of which only the beginning is learned from."""
    cut = [text for text in texts if encoder is not None and encoder.cut(text)]
    if encoder is not None and cut:
        warnings.warn(
            f"{len(cut)} of {len(texts)} texts are longer than the {encoder.length} tokens that the text encoder takes "
            f"and are cut; e.g. {shorten(cut[0])}",
            stacklevel=3,
        )


def is_trained(encoder: nn.Module) -> bool:
    """Whether a network has anything to learn.

    Args:
        encoder: The network.

    Returns:
        True if a weight takes gradients.
    """
    return any(parameter.requires_grad for parameter in encoder.parameters())


def build_text_encoder(plan: TextPlan, scans: Sequence[CachedScan], seed: int) -> AnyTextEncoder:
    """The text encoder that a plan asks for.

    Args:
        plan: Of the texts.
        scans: The training scans, whose words a small encoder learns.
        seed: Of the run.

    Returns:
        The encoder; its first weights depend on the seed alone, unless they are pretrained.

    Raises:
        BadInputError: If no scan has a text, or a pretrained encoder cannot be read or is not as wide as planned.
    """
    texts = [scan.text for scan in scans if scan.text]
    if not texts:
        raise BadInputError("denoiser.conditions.text: expected training scans with texts, got none. Set it to null.")
    if plan.encoder == SMALL_ENCODER:
        vocabulary = Vocabulary.build(texts, min_count=plan.min_count)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "text encoder", "weights"))
            return TextEncoder(vocabulary=vocabulary.words, width=plan.width, depth=plan.depth, length=plan.length)
    encoder = PretrainedTextEncoder.from_folder(plan.encoder, length=plan.length)
    if encoder.width != plan.width:
        raise BadInputError(
            f"denoiser.conditions.text.width: expected {encoder.width}, the width of {plan.encoder}, got {plan.width}. "
            "Correct it."
        )
    encoder.requires_grad_(plan.trainable)
    return encoder
