"""What the torchmetrics metrics over a real and a synthetic set share: states that meet across processes, and reset."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torchmetrics import Metric


class SetMetric(Metric):
    """Base of the metrics that gather real and synthetic scans, batch by batch, and then compare the two sets.

    A subclass adds its states under names that begin with ``real_`` or ``synthetic_``. Each process may hold any number
    of scans of either set, or none.

    Args:
        reset_real_features: Whether :meth:`reset` forgets the real scans too; False keeps them through training.
        **kwargs: Passed to ``torchmetrics.Metric``.

    Attributes:
        is_differentiable: False.
        full_state_update: False; an update needs only its own batch.
        kind: ``(2,)`` spatial dimensions and channels of the scans; zeros until a scan was added.
    """

    is_differentiable = False
    full_state_update = False

    kind: torch.Tensor

    def __init__(self, *, reset_real_features: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reset_real_features = reset_real_features
        self._flat_types: dict[str, torch.dtype] = {}
        self.add_state("kind", default=torch.zeros(2, dtype=torch.int64), dist_reduce_fx="max")

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: one batch holds one set only, so there is no value for it.

        Args:
            *args: Not used.
            **kwargs: Not used.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"{type(self).__name__}: expected update(images, real=...) and then compute(), got a call of the metric. "
            "A batch holds scans of one set only, so it has no value of its own."
        )

    def reset(self) -> None:
        """Forget the scans; the real ones only if ``reset_real_features``."""
        states = {name: getattr(self, name) for name in self._defaults}
        kept: dict[str, Any] = {}
        if not self.reset_real_features and any(_holds(states[name]) for name in states if name.startswith("real_")):
            kept = {name: state for name, state in states.items() if not name.startswith("synthetic_")}
        # A list is emptied in place.
        kept = {name: list(state) if isinstance(state, list) else state for name, state in kept.items()}
        super().reset()
        for name, state in kept.items():
            setattr(self, name, state)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes; called by ``compute``.

        Args:
            *args: As for ``torchmetrics.Metric.sync``.
            **kwargs: As for ``torchmetrics.Metric.sync``.
        """
        for name, dtype in self._flat_types.items():
            state = getattr(self, name)
            if isinstance(state, list) and not state:  # it would be gathered as float32, which the others do not hold
                setattr(self, name, [torch.zeros(0, dtype=dtype, device=self.device)])
        super().sync(*args, **kwargs)

    def _add_flat_state(self, name: str, dtype: torch.dtype) -> None:
        """Add a state that a batch appends a vector ``(n,)`` to: flat, so that processes without scans can join."""
        self._flat_types[name] = dtype
        self.add_state(name, default=[], dist_reduce_fx="cat")

    def _flat(self, name: str) -> torch.Tensor:
        """All of such a state ``(sum of n,)``, empty before any batch."""
        state = getattr(self, name)
        if isinstance(state, torch.Tensor):  # gathered from all processes
            return state
        return torch.cat([torch.zeros(0, dtype=self._flat_types[name], device=self.device), *state])

    def _check_kind(self, images: torch.Tensor, name: str) -> torch.Tensor:
        """The kind of scans of the set `name`, or an error if those before were of another."""
        if images.ndim not in (4, 5):
            raise ValueError(f"images: expected (B, C, H, W) or (B, C, H, W, D), got shape {tuple(images.shape)}.")
        kind = torch.tensor([images.ndim - 2, images.shape[1]], device=self.kind.device)
        if bool(self.kind.any()) and not torch.equal(kind, self.kind):
            (dims, channels), (new_dims, new_channels) = self.kind.tolist(), kind.tolist()
            raise ValueError(
                f"images: expected {name} scans in {dims}D with {channels} channel(s) as those before, "
                f"got {new_dims}D with {new_channels}. Compare sets of one kind, or call reset."
            )
        return kind


def _holds(state: list[torch.Tensor] | torch.Tensor) -> bool:
    """Whether scans have entered a state."""
    return bool(state.any()) if isinstance(state, torch.Tensor) else any(part.numel() for part in state)
