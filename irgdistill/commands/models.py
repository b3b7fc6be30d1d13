"""`irgdistill models`: the networks that can be matched."""

from __future__ import annotations

import json
from fnmatch import fnmatch

from irgdistill.errors import UserError, nearest
from irgdistill.models import build_network, known_models, multiply_adds, parameters


def list_models(pattern: str, as_json: bool) -> None:
    """Print a line for every network whose name matches, as it is measured on the meta device."""
    names = [name for name in known_models() if fnmatch(name, pattern) or pattern in name]
    if not names:
        raise UserError(f"no model matches {pattern!r}{nearest(pattern, known_models())}")
    if not as_json:
        print(f"{'name':44} {'parameters':>14} {'multiply-adds':>16} {'input':>9}  levels")  # noqa: T201
    for name in names:
        network = build_network(name, meta=True)
        try:
            reductions = [2**level.level for level in network.levels()]
        except UserError:
            reductions = []
        size = f"{network.input.size[0]}×{network.input.size[1]}"
        count, macs = parameters(network.model), multiply_adds(network)
        if as_json:
            values = {
                "name": name,
                "params": count,
                "macs": macs,
                "input_size": network.input.size,
                "levels": reductions,
            }
            print(json.dumps(values), flush=True)  # noqa: T201
        else:
            text = " ".join(f"/{reduction}" for reduction in reductions)
            print(f"{name:44} {count:14,} {macs:16,} {size:>9}  {text}", flush=True)  # noqa: T201
