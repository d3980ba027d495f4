"""Where gates come from: a folder of real scans, or one of gates that an earlier run fitted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medgen.data.case import Dataset, unlike_classes
from medgen.data.dataset import read_dataset
from medgen.data.export import write_json
from medgen.filtering.gates import GATES, Gate, Gates, check_gates, fit_gates
from medgen.filtering.reference import Reference, digest_of, patient_of, training_cases
from medgen.filtering.storage import FACTS, load_reference
from medgen.filtering.survey import measure_reference
from medgen.filtering.tolerance import require_patients
from medgen.types import BadInputError

OPTIONS = "options.json"
REAL_REJECTED = 0.05
STEPS = 1000  # of each segmenter
_NAMES = ("class_names", "channel_names")


@dataclass(frozen=True)
class ReferenceSource:
    """A reference that is found, and not yet measured or loaded.

    Attributes:
        root: Folder that was given.
        folder: Where the fitted gates are, or will be.
        dataset: The real scans; None where the folder that was given holds fitted gates.
        digest: Of all that the gates depend on.
        settings: Of the segmenters.
        patients: How many patients there are.
        class_names: Names by label value.
        channel_names: Names by channel.
        spatial_dims: 2 or 3.
    """

    root: Path
    folder: Path
    dataset: Dataset | None
    digest: str
    settings: dict[str, Any]
    patients: int
    class_names: dict[int, str]
    channel_names: dict[int, str]
    spatial_dims: int

    def require_same_kind(
        self, root: Path, spatial_dims: int, channel_names: Mapping[int, str], class_names: Mapping[int, str]
    ) -> None:
        """Refuse scans that the gates cannot judge.

        Args:
            root: Where the scans are from, for the message.
            spatial_dims: 2 or 3.
            channel_names: Names by channel.
            class_names: Names by label value.

        Raises:
            BadInputError: If dimension, channels or classes differ from those of the reference.
        """
        if spatial_dims != self.spatial_dims:
            raise BadInputError(
                f"{root}: expected {self.spatial_dims}D scans as in the reference {self.root}, got {spatial_dims}D. "
                "Give a reference of the same kind."
            )
        if len(channel_names) != len(self.channel_names):
            raise BadInputError(
                f"{root}: expected {len(self.channel_names)} channel(s) as in the reference {self.root}, got "
                f"{len(channel_names)}. Give a reference of the same channels."
            )
        if unlike_classes(class_names, self.class_names) or len(class_names) < 2:
            shown = ", ".join(f"{value} {name}" for value, name in sorted(class_names.items()) if value) or "none"
            own = ", ".join(f"{value} {name}" for value, name in sorted(self.class_names.items()) if value)
            raise BadInputError(
                f"{root}: expected the classes of the reference {self.root} ({own}), got {shown}. Give a reference "
                "with the same classes, or name them alike in dataset.json or classes.json."
            )

    def choose(self, gates: Sequence[Gate] | None, real_rejected: float | None) -> tuple[tuple[Gate, ...], float]:
        """Which gates judge, and how many real scans they may reject.

        Args:
            gates: What the user asks for; None takes what the fitted gates were made with, else all.
            real_rejected: Likewise; else 0.05.

        Returns:
            Both.

        Raises:
            BadInputError: If a gate is not known, there are too few patients for the share, or fitted gates do not say
                what they were made with.
        """
        kept: dict[str, Any] = {"gates": GATES, "real_rejected": REAL_REJECTED}
        if self.dataset is None and (gates is None or real_rejected is None):
            kept = _read_json(self.folder / OPTIONS) or {}
            if not kept.keys() >= {"gates", "real_rejected"}:
                raise BadInputError(
                    f"{self.folder / OPTIONS}: expected the gates and the share that these gates were fitted with, got "
                    "none or a damaged file. Give both, --gates and --real_rejected, or the folder of the real scans."
                )
        chosen = check_gates(kept["gates"] if gates is None else gates)
        share = float(kept["real_rejected"]) if real_rejected is None else real_rejected
        require_patients(self.patients, share)
        return chosen, share

    def fit(self, gates: Sequence[Gate], real_rejected: float, device: torch.device, *, overwrite: bool) -> Gates:
        """Fit the gates, and keep with what they were made.

        Args:
            gates: Which judge.
            real_rejected: Share of real scans that they may reject.
            device: Where networks run.
            overwrite: As for :meth:`measure`.

        Returns:
            The fitted gates.

        Raises:
            BadInputError: As for :meth:`measure`, and if a gate cannot run.
        """
        fitted = fit_gates(self.measure(device, overwrite=overwrite), chosen=gates, real_rejected=real_rejected)
        if self.dataset is not None:
            write_json(self.folder / OPTIONS, {"gates": list(gates), "real_rejected": real_rejected})
        return fitted

    def measure(self, device: torch.device, *, overwrite: bool) -> Reference:
        """Measure the real scans, or load what was measured.

        Args:
            device: Where networks run.
            overwrite: Replace gates of another reference or other settings that lie where these are to go.

        Returns:
            The measured scans.

        Raises:
            BadInputError: If a scan cannot be used, or the folder holds something else.
            DivergedError: If a segmenter came to no finite loss.
        """
        if self.dataset is None:
            return load_reference(self.folder, device)
        if self.folder.exists() and not self.folder.is_dir():
            raise BadInputError(f"{self.folder}: expected a folder for the gates, got a file. Choose another output.")
        found = _read_json(self.folder / FACTS)
        own = ("reference.", "segmenter_", OPTIONS, ".")
        other = [path.name for path in self.folder.glob("*") if not path.name.startswith(own)]
        if (found and found.get("digest") != self.digest and not overwrite) or (other and not found):
            raise BadInputError(
                f"{self.folder}: expected an empty folder for the gates, or gates of this reference and these "
                "settings, got others. Choose another output folder, or pass --overwrite to replace them"
                + (f"; to use them, give --reference {self.folder}." if (self.folder / OPTIONS).exists() else ".")
            )
        return measure_reference(self.dataset, self.folder, device=device, **self.settings)


def find_reference(
    path: Path, output: Path, *, steps: int = STEPS, seed: int = 0, consistency: bool = True
) -> ReferenceSource:
    """Look at a reference, without measuring it.

    Args:
        path: Folder of real scans, or of fitted gates, which keep their own settings.
        output: Output folder; what is fitted goes beside it.
        steps: Of each segmenter.
        seed: Of the segmenters.
        consistency: Whether segmenters are needed.

    Returns:
        What was found.

    Raises:
        BadInputError: If the folder holds neither, steps are fewer than 1, no training scan has a label, or a file is
            missing.
    """
    if steps < 1:
        raise BadInputError(f"steps: expected at least 1, got {steps}.")
    if (facts := _read_json(path / FACTS)) is not None:
        try:
            names = [{int(value): str(name) for value, name in facts[key].items()} for key in _NAMES]
            return ReferenceSource(
                root=path,
                folder=path,
                dataset=None,
                digest=facts["digest"],
                settings=facts["settings"],
                patients=len({row["patient"] for row in facts["scans"]}),
                class_names=names[0],
                channel_names=names[1],
                spatial_dims=int(facts["spatial_dims"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInputError(
                f"{path / FACTS}: expected the facts of fitted gates, got a file without {error}. Give the folder of "
                "the real scans in its place."
            ) from error
    dataset = read_dataset(path)
    settings = {"steps": steps if consistency else None, "seed": seed}
    return ReferenceSource(
        root=path,
        folder=output.with_name(f"{output.resolve().name}_gates"),
        dataset=dataset,
        digest=digest_of(dataset, settings),
        settings=settings,
        patients=len({patient_of(case) for case in training_cases(dataset)[0]}),
        class_names=dict(dataset.class_names),
        channel_names=dict(dataset.channel_names),
        spatial_dims=dataset.spatial_dims,
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    """What a file of a folder of gates says; None where there is none, nothing where it is damaged."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        facts = {}
    return facts if isinstance(facts, dict) else {}
