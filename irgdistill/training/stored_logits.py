"""Logits as a teacher cache stores them: all, or the largest with the mass of the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def pack_logits(logits: Tensor, largest: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """(B, K) -> all logits, or the `largest` with their classes and the log of the others' summed exponentials."""
    logits = logits.float()
    if largest is None:
        return {"logits": logits.to(dtype)}
    values, classes = logits.topk(largest, dim=1)
    rest = logits.scatter(1, classes, -torch.inf).logsumexp(1)
    return {"largest": values.to(dtype), "classes": classes.int(), "rest": rest}


def unpack_logits(rows: Mapping[str, Tensor], classes: int) -> Tensor:
    """(B, K) float32; logits that were not stored share the mass of the rest evenly."""
    if "logits" in rows:
        return rows["logits"].float()
    values = rows["largest"].float()
    share = rows["rest"] - math.log(classes - values.shape[1])
    return share[:, None].repeat(1, classes).scatter(1, rows["classes"].long(), values)
