"""Radiomic features of scans as PyRadiomics defines and names them, from numba kernels."""

from __future__ import annotations

from medgen.radiomics.extractor import extract, extract_labels, luminance
from medgen.radiomics.parameters import Parameters

__all__ = ["Parameters", "extract", "extract_labels", "luminance"]
