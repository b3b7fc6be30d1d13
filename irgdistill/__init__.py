"""Distil any timm teacher into any timm student with Instance Relationship Graphs (Liu et al., CVPR 2019)."""

import lazy_loader

from irgdistill.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
