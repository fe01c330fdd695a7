"""Distribution matching per partition: several students, each for its own part of the prompts (Multi-student
distillation, arXiv 2410.23274). Every student has a run and a critic of its own."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._check import expect
from .dmd import critic_flow_loss, dmd_loss
from .objective import Batch, Objective


def partition_of(prompts: Sequence[str], students: int) -> Tensor:
    """The student of each prompt, int64 ``[B]``: a hash of its text, the same in every run."""
    return torch.tensor([zlib.crc32(prompt.encode()) % students for prompt in prompts])


@dataclass(frozen=True)
class MultiStudent(Objective):
    """DMD on the samples whose prompt is this student's; the others of a batch have no part in it.

    Args:
        students: how many there are. student: which one this run trains, from 0.
    """

    students: int = 2
    student: int = 0

    def __post_init__(self):
        fits = 0 <= self.student < self.students
        expect(fits, "MultiStudent", "student", f"in [0, students = {self.students})", self.student)

    def mine(self, batch: Batch) -> Tensor:
        return (partition_of(batch.prompts, self.students) == self.student).to(batch.x.device)

    def generator_loss(self, batch: Batch) -> Tensor:
        return dmd_loss(batch.x, **batch.arguments, mask=self.mine(batch))

    def critic_loss(self, batch: Batch) -> Tensor:
        given = {"noise": batch.noise, "t": batch.t, "scheduler": batch.scheduler}
        return critic_flow_loss(batch.fake, batch.x, **given, mask=self.mine(batch))
