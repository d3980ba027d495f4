"""The training loop on one small network: what a checkpoint gives back, and what a full disk says."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from medgen.training.loop import run_stage
from medgen.types import BadInputError


class Stage:
    """A 3D convolution in the layout that training uses, under the optimizer that it uses."""

    name, steps, learning_rate, ema_decay, can_save_memory = "tiny", 6, 0.1, 0.9, False

    def __init__(self, log: Path | None = None) -> None:
        torch.manual_seed(0)
        self.averaged = nn.Conv3d(3, 4, 3).to(memory_format=torch.channels_last_3d)
        self.networks = {"tiny": self.averaged}
        self.optimizers = {"tiny": torch.optim.AdamW(self.averaged.parameters(), fused=True)}
        self.log, self.stop_at = log, self.steps

    def update(self, step: int, positions: list[int]) -> dict[str, torch.Tensor]:
        if step == self.stop_at:
            raise KeyboardInterrupt
        if self.log is not None and step == 1:
            self.log.unlink()
            self.log.symlink_to("/dev/full")
        draw = torch.Generator().manual_seed(step)
        loss = (self.averaged(torch.randn(2, 3, 5, 5, 5, generator=draw)) - 1).square().mean()
        loss.backward()
        self.optimizers["tiny"].step()
        self.optimizers["tiny"].zero_grad()
        return {"loss": loss}

    def validate(self, step: int, picture: Path) -> dict[str, float]:
        return {}


def run(stage: Stage, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    run_stage(stage, Accelerator(cpu=True), folder, batch_size=2, checkpoint_every=2, validate_every=6)


def test_a_resumed_run_gives_every_weight_its_own_moments(tmp_path):
    whole, stopped, resumed = Stage(), Stage(), Stage()
    run(whole, tmp_path / "whole")
    stopped.stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path / "stopped")
    run(resumed, tmp_path / "stopped")
    for name, value in whole.averaged.state_dict().items():
        assert torch.equal(value, resumed.averaged.state_dict()[name]), name


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full for a real full disk")
def test_a_disk_that_is_full_for_the_log_is_named_by_the_file(tmp_path):
    log = tmp_path / "run" / "logs" / "tiny.jsonl"
    with pytest.raises(BadInputError, match=r"tiny\.jsonl: expected free disk space, got a full disk"):
        run(Stage(log), tmp_path / "run")
