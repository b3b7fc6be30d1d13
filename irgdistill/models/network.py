"""A timm model with its preprocessing, and the module that applies it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from irgdistill.config import CropShare, InputSpec, Interpolation, Mean, Pixels, Pooling, Std
from irgdistill.errors import UserError, nearest
from irgdistill.io import Record
from irgdistill.matching import Level, LevelsError, Tap, Tapped, find_levels


class NetworkRecord(Record):
    """Everything but the weights that rebuilds and feeds a network: the values of `Network.describe`."""

    architecture: str
    """A registered name: a file cannot make the tool look elsewhere, in a folder or on a server."""
    args: dict[str, Any]
    """Arguments of `timm.create_model`."""
    num_classes: Annotated[int, Field(ge=0, lt=2**31)]
    input_size: tuple[Pixels, Pixels]
    """Height and width in pixels."""
    mean: Mean
    std: Std
    interpolation: Interpolation
    crop_pct: CropShare

    @field_validator("architecture")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        if not timm.is_model(name):
            known = [model.split(".")[0] for model in timm.list_models()]
            raise ValueError(f"expected a network that timm registers, got {name!r}{nearest(name, known)}")
        return name

    @property
    def args_without_size(self) -> dict[str, Any]:
        """`args` without the input size, which `build_network` sets again."""
        return {key: value for key, value in self.args.items() if key != "img_size"}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Mean, std, interpolation and crop_pct."""
        return self.model_dump(include={"mean", "std", "interpolation", "crop_pct"})


@dataclass
class Network:
    """A timm model with its input size and preprocessing."""

    name: str
    model: nn.Module
    args: dict[str, Any]
    """Arguments of `timm.create_model` beside the name and the number of classes."""
    input: InputSpec
    classes: list[str] | None = None
    """Class names in label order, if a checkpoint records them."""
    pooling: Pooling = "auto"
    """How its embedding is made."""
    foreign: bool = False
    """Its weights are from a file that does not say how images are normalised."""
    note: str = ""
    """A line for the log: what was taken of a file that holds several weights."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        name: str | None = None,
        args: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> Network:
        """Wrap a timm model: its own input size and preprocessing, unless others are given."""
        data = {**resolve_model_data_config(model), **(preprocessing or {})}
        return cls(
            name=name or str(model.pretrained_cfg["architecture"]),  # type: ignore[index]
            model=model,
            args=dict(args or {}),
            input=InputSpec(
                size=tuple(size or data["input_size"][-2:]),
                mean=tuple(data["mean"]),
                std=tuple(data["std"]),
                interpolation=str(data["interpolation"]),
                crop_pct=float(data["crop_pct"]),
            ),
        )

    @property
    def num_classes(self) -> int:
        return int(self.model.num_classes)  # type: ignore[arg-type]

    def embedding_width(self) -> int:
        """Width of the embedding, found on the meta device. Raises UserError if the network has none of this kind."""
        tapped = Tapped(self.model, None, embedding=self.pooling)
        tensors = {**dict(tapped.named_parameters()), **dict(tapped.named_buffers())}
        meta = {key: value.detach().to("meta") for key, value in tensors.items()}
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = torch.func.functional_call(tapped, meta, (torch.empty(1, *self.input.shape, device="meta"),))
        self.model.train(training)
        tapped.release()
        return int(output.embedding.shape[1])

    @property
    def architecture(self) -> str:
        """The registered name, without a source or a weight tag."""
        return str(self.model.pretrained_cfg["architecture"])  # type: ignore[index]

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, in plain values: the fields of `NetworkRecord`."""
        return {
            "architecture": self.architecture,
            "args": self.args,
            "num_classes": self.num_classes,
            "input_size": list(self.input.size),
            **self.input.preprocessing,
        }

    def preprocess(self) -> Preprocess:
        """A module that prepares raw images for this network."""
        return Preprocess(self.input.size, self.input.mean, self.input.std)

    def tapped(self, device: torch.device, taps: Iterable[Tap] = (), grids: Iterable[Tap] = ()) -> Tapped:
        """This network on a device in eval mode, behind its preprocessing and with taps."""
        return Tapped(self.model.to(device), self.preprocess().to(device), taps, grids=grids).eval()

    def levels(self) -> list[Level]:
        """The stages that can be tapped, found at the network's default size, where no map has shrunk to a point.

        Raises UserError if there are none.
        """
        own = tuple(self.model.pretrained_cfg["input_size"])  # type: ignore[index]
        size = own if not self._fixed else (own[0], *self.input.size)
        try:
            return find_levels(self.model, size)
        except LevelsError as error:
            raise UserError(f"{self.name} cannot be matched: {error}") from None

    def map_size(self, tap: Tap, size: tuple[int, int]) -> tuple[int, int] | None:
        """Height and width of the map at `tap` for images of another size; None if the network does not run on them."""
        try:
            for level in find_levels(self.model, (len(self.input.mean), *size)):
                for other in level.blocks:
                    if other.module == tap.module:
                        return other.height, other.width
        except LevelsError:
            pass
        return None

    @property
    def _fixed(self) -> bool:
        return bool(self.model.pretrained_cfg.get("fixed_input_size"))  # type: ignore[union-attr,operator]


class Preprocess(nn.Module):
    """Resize and normalise raw images for one network, with its own size, mean and standard deviation.

    Input (B, 3, H, W) in 0…255, uint8 or float; output (B, 3, *size) float32. Teacher and student each have one and
    take the same augmented crop.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: tuple[int, int], mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", 255 * torch.tensor(tuple(mean)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(tuple(std)).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        return (x - self.mean) / self.std
