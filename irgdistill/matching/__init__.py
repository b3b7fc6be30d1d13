"""Finds the blocks to tap in any `nn.Module`, and matches the stages of two networks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
