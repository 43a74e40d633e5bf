"""Names of the loss' terms and of SEAD's zones, and divergences that are not over the whole vocabulary. Torch-free."""

from dataclasses import dataclass
from enum import IntEnum


class Term(IntEnum):
    """Column of ``Coefficients.weights``; the order of ``sead_kernels.split_kl.COEFFICIENTS``."""

    FORWARD_KL = 0
    REVERSE_KL = 1
    ENTROPY = 2
    LOGPROB = 3


class Zone(IntEnum):
    """Value of ``Coefficients.zones`` (SEAD, arXiv 2606.28562, section 2.3)."""

    A = 0
    B = 1
    C = 2


@dataclass(frozen=True)
class Pointwise:
    """The divergence of column ``FORWARD_KL`` is a sum over the vocabulary of a function of both log-probabilities.

    ``kind``, ``share`` and ``clip`` are those of ``sead_kernels.split_kl.PointwiseRule``. The other columns are 0.
    """

    kind: str
    share: float | None = None
    clip: float | None = None


@dataclass(frozen=True)
class TopK:
    """The divergences of columns ``FORWARD_KL`` and ``REVERSE_KL`` are those of a rule on few vocabulary entries.

    ``rule`` is a key of ``sead_kernels.split_kl.RULES``; ``support`` says whose ``k`` most likely tokens: ``teacher``,
    ``student``, ``union`` or ``intersection``.
    """

    rule: str
    k: int
    support: str = "teacher"


Divergence = Pointwise | TopK
