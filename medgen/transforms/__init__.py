"""MONAI transforms that bring synthetic scans into a training loop."""

from __future__ import annotations

from medgen.transforms.augmix import RandAugMix, RandAugMixD, RandAugMixd, RandAugMixDict
from medgen.transforms.bank import SyntheticBank
from medgen.transforms.copy_paste import (
    RandBidirectionalCopyPaste,
    RandBidirectionalCopyPasteD,
    RandBidirectionalCopyPasted,
    RandBidirectionalCopyPasteDict,
)
from medgen.transforms.corruption import (
    Corruption,
    RandCorruption,
    RandCorruptionD,
    RandCorruptiond,
    RandCorruptionDict,
    families,
)
from medgen.transforms.cropmix import RandCropMix, RandCropMixD, RandCropMixd, RandCropMixDict
from medgen.transforms.cutmix import RandCutMix, RandCutMixD, RandCutMixd, RandCutMixDict
from medgen.transforms.degradation import (
    LowDose,
    LowResolution,
    RandLowDoseD,
    RandLowDosed,
    RandLowDoseDict,
    RandLowResolutionD,
    RandLowResolutiond,
    RandLowResolutionDict,
)
from medgen.transforms.diffusion_composit import (
    RandDiffusionComposit,
    RandDiffusionCompositD,
    RandDiffusionCompositd,
    RandDiffusionCompositDict,
)
from medgen.transforms.diffusion_variation import (
    RandDiffusionVariation,
    RandDiffusionVariationBatchd,
    RandDiffusionVariationD,
    RandDiffusionVariationd,
    RandDiffusionVariationDict,
)
from medgen.transforms.lesion_insertion import (
    RandLesionInsertion,
    RandLesionInsertionD,
    RandLesionInsertiond,
    RandLesionInsertionDict,
)
from medgen.transforms.mixup import RandMixUp, RandMixUpD, RandMixUpd, RandMixUpDict
from medgen.transforms.snapmix import RandSnapMix, RandSnapMixD, RandSnapMixd, RandSnapMixDict
from medgen.transforms.synthetic_replace import RandSyntheticReplace
from medgen.transforms.synthetic_replaced import (
    RandSyntheticReplaceD,
    RandSyntheticReplaced,
    RandSyntheticReplaceDict,
)
from medgen.transforms.yoco import RandYOCO, RandYOCOD, RandYOCOd, RandYOCODict

__all__ = [
    "Corruption",
    "LowDose",
    "LowResolution",
    "RandAugMix",
    "RandAugMixD",
    "RandAugMixDict",
    "RandAugMixd",
    "RandBidirectionalCopyPaste",
    "RandBidirectionalCopyPasteD",
    "RandBidirectionalCopyPasteDict",
    "RandBidirectionalCopyPasted",
    "RandCorruption",
    "RandCorruptionD",
    "RandCorruptionDict",
    "RandCorruptiond",
    "RandCropMix",
    "RandCropMixD",
    "RandCropMixDict",
    "RandCropMixd",
    "RandCutMix",
    "RandCutMixD",
    "RandCutMixDict",
    "RandCutMixd",
    "RandDiffusionComposit",
    "RandDiffusionCompositD",
    "RandDiffusionCompositDict",
    "RandDiffusionCompositd",
    "RandDiffusionVariation",
    "RandDiffusionVariationBatchd",
    "RandDiffusionVariationD",
    "RandDiffusionVariationDict",
    "RandDiffusionVariationd",
    "RandLesionInsertion",
    "RandLesionInsertionD",
    "RandLesionInsertionDict",
    "RandLesionInsertiond",
    "RandLowDoseD",
    "RandLowDoseDict",
    "RandLowDosed",
    "RandLowResolutionD",
    "RandLowResolutionDict",
    "RandLowResolutiond",
    "RandMixUp",
    "RandMixUpD",
    "RandMixUpDict",
    "RandMixUpd",
    "RandSnapMix",
    "RandSnapMixD",
    "RandSnapMixDict",
    "RandSnapMixd",
    "RandSyntheticReplace",
    "RandSyntheticReplaceD",
    "RandSyntheticReplaceDict",
    "RandSyntheticReplaced",
    "RandYOCO",
    "RandYOCOD",
    "RandYOCODict",
    "RandYOCOd",
    "SyntheticBank",
    "families",
]
