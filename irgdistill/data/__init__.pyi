from .augmentation import crop_of, padding_of
from .dataset import Images, UnreadableImages
from .decoding import UnreadableImageError, open_image
from .loader import Loader, eval_loader, no_collate, train_images, train_loader
from .one_pass import OnePass
from .open import open_splits
from .sampling import balanced_weights
from .search import ImageSearch
from .shared_loaders import KeptLoader, TurnLoader
from .sources import source
from .splits import Source, Splits, hold_out
from .unlabelled import ImageFiles, PartlyLabelled, Unlabelled

__all__ = [
    "ImageFiles",
    "ImageSearch",
    "Images",
    "KeptLoader",
    "Loader",
    "OnePass",
    "PartlyLabelled",
    "Source",
    "Splits",
    "TurnLoader",
    "Unlabelled",
    "UnreadableImageError",
    "UnreadableImages",
    "balanced_weights",
    "crop_of",
    "eval_loader",
    "hold_out",
    "no_collate",
    "open_image",
    "open_splits",
    "padding_of",
    "source",
    "train_images",
    "train_loader",
]
