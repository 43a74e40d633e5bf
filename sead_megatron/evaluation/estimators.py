"""Pass rates of a benchmark and their 95 % confidence intervals. Torch-free.

With n samples of a problem, c of them right:

    avg@n   = c / n
    pass@k  = 1 - C(n - c, k) / C(n, k)      unbiased for k <= n (Chen et al. 2021, arXiv 2107.03374, Eq. 1)

and a benchmark's value is the mean over its problems.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
RESAMPLES = 10_000
# Resamples at a time: 674 problems need 5 MB.
_CHUNK = 1000

Interval = tuple[float, float]
Floats = npt.NDArray[np.float64]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that one of `k` samples of a problem is right, estimated from `correct` of `samples`.

    Exact in integers up to the division. Raises ValueError unless 1 <= k <= samples and 0 <= correct <= samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"no estimate of pass@{k} from {correct} of {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def pass_ks(samples: int) -> list[int]:
    """The k of pass@k that are reported: 1, 2, 4, ... and `samples`."""
    powers = [1 << i for i in range(samples.bit_length()) if 1 << i < samples]
    return [*powers, samples]


def wilson(correct: int, total: int) -> Interval:
    """Wilson's score interval of a share (Wilson 1927); unlike the normal one it is no point at 0 or 1.

    Raises ValueError unless 0 <= correct <= total and total > 0.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"no interval of {correct} of {total}")
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    share = correct / total
    scale = 1 + z**2 / total
    center = (share + z**2 / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    # At 0 and 1 the bound is exactly there, but for rounding.
    low = 0.0 if correct == 0 else center - half
    return low, 1.0 if correct == total else center + half


def resampled_means(name: str, values: Floats) -> Floats:
    """Means of `RESAMPLES` draws of as many problems with replacement: [problems, M] to [RESAMPLES, M].

    The draws depend on `name` (the benchmark's) and the number of problems alone. Methods that are resampled under
    one name are therefore paired: their differences are those of a paired bootstrap.
    """
    digest = hashlib.sha256(name.encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    problems = len(values)
    means = np.empty((RESAMPLES, values.shape[1]))
    for start in range(0, RESAMPLES, _CHUNK):
        drawn = generator.integers(problems, size=(_CHUNK, problems))
        for column in range(values.shape[1]):
            means[start : start + _CHUNK, column] = values[:, column][drawn].mean(axis=1)
    return means


def percentile_interval(means: Floats) -> Interval:
    """The bootstrap interval of one column of `resampled_means` (Efron 1979, percentile method)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def average_interval(values: Mapping[str, Floats]) -> Interval:
    """Interval of the mean over benchmarks of their means; `values`: name -> one number a problem.

    Problems are drawn within each benchmark, benchmarks are not: the six are the ones that count.
    """
    columns = [resampled_means(name, column[:, None])[:, 0] for name, column in values.items()]
    return percentile_interval(np.mean(columns, axis=0))


def sample_means(flags: Sequence[Sequence[bool]]) -> Floats:
    """Each problem's share of right samples, [problems]."""
    return np.array([sum(row) / len(row) for row in flags], dtype=np.float64)
