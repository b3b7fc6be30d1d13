"""Means and confidence intervals over few seeds. scipy.stats has both; it is 100 MB for the 30 numbers below."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""97.5 % points of Student's t with 1 to 30 degrees of freedom."""


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1); none of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean of two or more paired differences and the half width of its 95 % confidence interval (Student's t)."""
    count = len(differences)
    half = t_975(count - 1) * statistics.stdev(differences) / count**0.5
    return statistics.fmean(differences), half


def t_975(freedom: int) -> float:
    """97.5 % point of Student's t; beyond the table by the first two terms of its expansion in 1/freedom."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
