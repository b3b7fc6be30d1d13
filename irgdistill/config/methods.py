"""Methods: named sets of loss weights. Imports no torch."""

from __future__ import annotations

METHODS: dict[str, dict[str, float]] = {
    "none": {},
    "kd": {"kd": 1.0},
    "irg": {"logits": 0.5, "edges": 5.0},
    "mtk": {"logits": 0.5, "edges": 5.0, "transform": 1.0},
    "irg+kd": {"logits": 0.1, "edges": 5.0, "transform": 1.0, "kd": 1.0},
    "kd+at": {"kd": 1.0, "attention": 100.0},
    "irg+kd+at": {"edges": 2.5, "transform": 0.5, "kd": 1.0, "attention": 100.0},
    "logits": {"logits": 0.5},
    "dkd": {"dkd": 1.0},
    "fitnet": {"fitnet": 100.0},
    "at": {"at": 3000.0},
    "fsp": {"fsp": 150.0},
    "rocket": {"rocket": 0.3},
    "rkd": {"rkd": 25.0},
    "sp": {"sp": 3000.0},
    "pkt": {"pkt": 470.0},
}
"""A method is a set of hint weights beside cross-entropy. Every term is a mean: weights do not depend on the batch.

Those of other papers are theirs, or common practice, converted to means: see the terms. `logits`: half of the mean is
what soft targets of weight 1 tend to as their temperature grows (Hinton et al. 2015, equation 4).
"""


FADES: dict[str, dict[str, tuple[float, float]]] = {"irg+kd+at": {"attention": (0.3, 0.6)}}
"""Hints of a method that fade out, and between which shares of the training."""
