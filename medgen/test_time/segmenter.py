"""Any trained segmenter as a function from a scan to the probabilities of its classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn

from medgen.precision import is_out_of_memory
from medgen.types import BadInputError

Output = Literal["logits", "probabilities", "sigmoid"]
Network = Callable[[torch.Tensor], Any]


class Segmenter:
    """Calls a network and holds what it gives to what was asked.

    Args:
        network: From ``(1, C, H, W[, D])`` to ``(1, K, H, W[, D])``: a module, TorchScript, exported program or
            any function. A list or tuple of outputs (deep supervision) counts by its first.
        output: ``logits`` of K exclusive classes; their ``probabilities``; or ``sigmoid``, the logit of one class
            against the background, which becomes two classes.
        inferer: Called as ``inferer(inputs, network)``, such as MONAI's SlidingWindowInferer or SliceInferer, where the
            network takes patches or slices.
        device: Where scans are sent; None is where the weights of a module are, and the CPU for a function.

    Its ``calls`` counts the scans that it was asked for.

    Raises:
        BadInputError: If the output is not one of those, or the network is none.
    """

    def __init__(
        self,
        network: Network,
        *,
        output: Output = "logits",
        inferer: Callable[..., Any] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if output not in get_args(Output):
            raise BadInputError(f"output: expected one of {', '.join(get_args(Output))}, got {output!r}.")
        if not callable(network):
            raise BadInputError(f"segmenter: expected a network or function, got {type(network).__name__}.")
        self.network, self.output, self.inferer = network, output, inferer
        self.device = device
        self.calls = 0
        # Exported programs stay in the mode in which they were made, and refuse another.
        if isinstance(network, nn.Module) and not isinstance(network, torch.fx.GraphModule):
            network.eval()

    @torch.inference_mode()
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Probabilities of the classes.

        Args:
            image: ``(C, H, W[, D])`` float.

        Returns:
            ``(K, H, W[, D])`` float32 on the CPU, sums of 1.

        Raises:
            BadInputError: If the network does not take the scan, or what it gives does not fit it or is no such output.
            MemoryError: If the scan is too large for the network and there is no inferer.
        """
        self.calls += 1
        inputs = image[None].to(self._device())
        try:
            given = self.network(inputs) if self.inferer is None else self.inferer(inputs, self.network)
        except BadInputError:
            raise
        except (MemoryError, RuntimeError, ValueError) as error:
            if not is_out_of_memory(error):
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise BadInputError(
                    f"segmenter: expected a network that takes inputs of shape {tuple(inputs.shape)}, batch and "
                    f"channels first, got from it: {reason} Give one of these channels and dimensions, or an inferer "
                    "(medgen predict: --patch_size)."
                ) from error
            raise MemoryError(
                f"segmenter: expected memory for a scan of {tuple(image.shape[1:])} voxels, got too little. Give an "
                "inferer, such as monai.inferers.SlidingWindowInferer(roi_size=...) (medgen predict: --patch_size)."
            ) from error
        if isinstance(given, (list, tuple)):
            given = given[0]
        if isinstance(given, dict):
            given = next(iter(given.values()))
        scores = torch.as_tensor(given).detach().float().cpu()
        if scores.ndim != image.ndim + 1 or len(scores) != 1 or scores.shape[2:] != image.shape[1:]:
            raise BadInputError(
                f"segmenter: expected an output (1, K, {', '.join(map(str, image.shape[1:]))}) for this scan, got "
                f"{tuple(scores.shape)}. Give a network that keeps the grid, or an inferer, such as "
                "monai.inferers.SlidingWindowInferer(roi_size=...) (medgen predict: --patch_size)."
            )
        return self._probabilities(scores[0])

    def _probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(scores).all()):
            raise BadInputError("segmenter: expected finite outputs, got NaN or infinity. Check the scan and weights.")
        low, high, off = float(scores.min()), float(scores.max()), float((scores.sum(dim=0) - 1).abs().max())
        shares = low >= -1e-4 and high <= 1 + 1e-4
        if self.output == "sigmoid":
            if len(scores) != 1:
                raise BadInputError(
                    f"segmenter: expected one channel for output 'sigmoid', got {len(scores)}. Classes that overlap "
                    "are not supported: wrap the network so that it gives one of them."
                )
            if shares:
                raise BadInputError(
                    f"segmenter: expected logits for output 'sigmoid', got numbers from {low:.3g} to {high:.3g} only, "
                    "as after a sigmoid. Take it off, or wrap the network so that it gives cat([1 - p, p], dim=1) and "
                    "say output='probabilities'."
                )
            p = scores.sigmoid()
            return torch.cat([1 - p, p])
        if len(scores) < 2:
            raise BadInputError(
                "segmenter: expected two classes or more, the background included, got one channel. For the logit of "
                "one class say output='sigmoid' (medgen predict: --segmenter_output sigmoid)."
            )
        if self.output == "logits":
            if shares and off <= 1e-3:
                raise BadInputError(
                    "segmenter: expected logits, got numbers in [0, 1] that sum to 1 over the classes. Say "
                    "output='probabilities' (medgen predict: --segmenter_output probabilities)."
                )
            return scores.softmax(dim=0)
        if not shares or off > 1e-2:
            raise BadInputError(
                "segmenter: expected probabilities that sum to 1 over the classes, got others. Say output='logits' or "
                "'sigmoid'."
            )
        return scores

    def _device(self) -> str | torch.device:
        if self.device is not None:
            return self.device
        if isinstance(self.network, nn.Module):
            weights = next(self.network.parameters(), None)
            if weights is not None:
                return weights.device
        return torch.device("cpu")
