"""One sample's condition out of what is known of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from medgen.conditions.attributes import Attribute, encode_attributes
from medgen.conditions.condition import Condition
from medgen.conditions.edge import edge_channels
from medgen.conditions.mask import MaskForm, encode_mask


def assemble(
    *,
    index: torch.Tensor | None = None,
    num_classes: int = 0,
    mask_form: MaskForm = "one_hot",
    valid: torch.Tensor | None = None,
    edge: torch.Tensor | None = None,
    attributes: Mapping[str, Attribute] | None = None,
    facts: Mapping[str, str] | None = None,
    text: torch.Tensor | None = None,
) -> Condition:
    """Condition of one sample; what is None is absent.

    Args:
        index: ``(*spatial)`` class indices of its label map.
        num_classes: Classes of the label map, with background.
        mask_form: How the label map is written as numbers.
        valid: ``(*spatial)`` bool, True inside the field of view; None means everywhere.
        edge: ``(1, *spatial)`` edge strength in [0, 1].
        attributes: What the model knows of attributes.
        facts: Value of each attribute that is known of the sample.
        text: ``(L, E)`` embedded words.

    Returns:
        A batch of one, on the CPU.

    Raises:
        BadInputError: If a value is none that the model knows.
    """
    parts: dict[str, torch.Tensor] = {}
    if index is not None:
        parts["mask"] = encode_mask(index.long(), num_classes, mask_form, valid=valid)
    if edge is not None:
        inside = torch.ones_like(edge) if valid is None else valid[None].to(edge)
        # Outside the field of view there is neither an edge nor the absence of one.
        parts["edge"] = edge_channels(edge[None]) * inside[None]
    if text is not None:
        parts["text"] = text[None]
    parts |= {name: row[None] for name, row in encode_attributes(attributes or {}, facts or {}).items()}
    return Condition(parts)
