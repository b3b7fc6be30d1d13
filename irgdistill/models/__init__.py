"""Networks from timm, from checkpoints and their weights. Importing this package registers the CIFAR networks."""

import lazy_loader

from irgdistill.models import cifar as cifar  # registers its networks with timm

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
