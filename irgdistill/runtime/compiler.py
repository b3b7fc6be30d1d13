"""Settings of `torch.compile` that training needs. They are private to torch, so each is set only if it exists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

DYNAMO: dict[str, Any] = {
    # Otherwise two networks of one architecture with different hooks would share compiled code.
    "skip_nnmodule_hook_guards": False,
    # Student and teacher run the same function, and so do further runs of this process; the default of 8 is too few.
    "recompile_limit": 256,
}
"""Settings in `torch._dynamo.config`."""


FUNCTORCH: dict[str, Any] = {
    # Gradient shares run backward through one graph more than once.
    "donated_buffer": False,
}
"""Settings in `torch._functorch.config`."""


@contextmanager
def compiler_settings(wanted: bool = True) -> Iterator[None]:
    """Apply the settings while compiled networks train, and restore the caller's. Compiled code is kept."""
    if not wanted:
        yield
        return
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    with ExitStack() as stack:
        for module, values in ((dynamo, DYNAMO), (functorch, FUNCTORCH)):
            known = {name: value for name, value in values.items() if hasattr(module, name)}
            stack.enter_context(module.patch(known))
        yield
