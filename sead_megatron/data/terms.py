"""Names of the loss' terms and of SEAD's zones. Torch-free."""

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
