"""A teacher that follows the student: an exponential moving average of its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sead_megatron.models.build import BuiltModel
from sead_megatron.training.teacher import Teacher


class MovingTeacher:
    """Moves a teacher of the student's architecture and layout: ``decay * teacher + (1 - decay) * student``.

    Averages are float32, also where the teacher computes in bfloat16: a decay of 0.999 would move none of its weights.
    """

    def __init__(self, teacher: Teacher, student: BuiltModel, decay: float) -> None:
        """Raises RuntimeError when a shard of the teacher is not one of the student's."""
        self._decay = decay
        self._student = dict(student.module.named_parameters())
        # Of a tied student the embedding is the output layer too, while a teacher has both.
        self._targets: dict[str, list[Tensor]] = {
            name: [parameter] for name, parameter in teacher.module.named_parameters()
        }
        if teacher.output is not None:
            weight = student.module.output_weight()
            name = next(name for name, parameter in self._student.items() if parameter is weight)
            self._targets.setdefault(name, []).append(teacher.output)
        self.averages: dict[str, Tensor] = {}
        """Float32 shards by the student's names."""
        for name, targets in self._targets.items():
            if name not in self._student or self._student[name].shape != targets[0].shape:
                raise RuntimeError(f"the teacher's {name} is no shard of the student")
            first = targets[0].detach()
            self.averages[name] = first if first.dtype == torch.float32 else first.float()

    @torch.no_grad()
    def follow(self) -> None:
        """One step towards the student as it is now."""
        for name, average in self.averages.items():
            average.mul_(self._decay).add_(self._student[name].float(), alpha=1 - self._decay)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Gives the teacher the averages, in the type it computes in."""
        for name, targets in self._targets.items():
            for target in targets:
                if target.data_ptr() != self.averages[name].data_ptr():
                    target.copy_(self.averages[name])
