"""Settings: their schema, where they come from, and checks that need only settings and files. Imports no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
