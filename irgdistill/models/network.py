"""A network with its preprocessing, and the module that applies it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from irgdistill.config import (
    CropShare,
    InputSpec,
    Interpolation,
    Mean,
    Pixels,
    PluginConfig,
    Pooling,
    Std,
    architecture_of,
    join_function,
)
from irgdistill.errors import UserError, nearest, one_line
from irgdistill.io import Record
from irgdistill.matching import Level, LevelsError, Tap, Tapped, find_levels, first_output

DEFAULT_SIZE = (224, 224)
"""Input size of a module that timm did not make."""


class NetworkRecord(Record):
    """Everything but the weights that rebuilds and feeds a network: the values of `Network.describe`."""

    code: PluginConfig | None = None
    """The Python file whose function makes the network, by its name and checksum; None: timm makes it."""
    architecture: str
    """A registered name: a file cannot make the tool look elsewhere, in a folder or on a server. With `code`
    FILE.FUNCTION, which runs only if the user names the file."""
    args: dict[str, Any]
    """Arguments of `timm.create_model`, or of the function."""
    num_classes: Annotated[int, Field(ge=0, lt=2**31)]
    input_size: tuple[Pixels, Pixels]
    """Height and width in pixels."""
    mean: Mean
    std: Std
    interpolation: Interpolation
    crop_pct: CropShare

    @field_validator("architecture")
    @classmethod
    def _is_known(cls, name: str, info: ValidationInfo) -> str:
        code = info.data.get("code")
        if code is not None:
            file, _, function = name.rpartition(".")
            if file != code.path.stem or not function.isidentifier():
                raise ValueError(f"expected {code.path.stem}.FUNCTION, got {name!r}")
        elif not timm.is_model(name):
            known = [model.split(".")[0] for model in timm.list_models()]
            raise ValueError(f"expected a network that timm registers, got {name!r}{nearest(name, known)}")
        return name

    @property
    def file(self) -> Path | None:
        """The Python file whose function makes the network, as far as its place is known."""
        return None if self.code is None else self.code.path

    @property
    def name(self) -> str:
        """The name to build it by."""
        return self.architecture if self.file is None else join_function(self.file, self.architecture.split(".")[-1])

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
    """A model of timm, or another that returns logits (B, K), with its input size and preprocessing."""

    name: str
    model: nn.Module
    args: dict[str, Any]
    """Arguments of `timm.create_model` beside the name and the number of classes, or of the function `code`."""
    input: InputSpec
    classes: list[str] | None = None
    """Class names in label order, if a checkpoint records them."""
    pooling: Pooling = "auto"
    """How its embedding is made."""
    foreign: bool = False
    """Its weights are from a file that does not say how images are normalised."""
    note: str = ""
    """A line for the log: what was taken of a file that holds several weights."""
    code: PluginConfig | None = None
    """The Python file whose function made the model, by its name and checksum."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        name: str | None = None,
        args: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> Network:
        """Wrap a model: its own input size and preprocessing, unless others are given.

        Those of a module that timm did not make are 224 pixels and ImageNet's normalisation.
        """
        data = {**resolve_model_data_config(model), **(preprocessing or {})}
        return cls(
            name=name or str(pretrained_cfg(model).get("architecture", type(model).__name__)),
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
    def from_timm(self) -> bool:
        """Whether timm made the model."""
        return bool(self.cfg)

    @property
    def cfg(self) -> Mapping[str, Any]:
        """timm's configuration of the model; empty if timm did not make it."""
        return pretrained_cfg(self.model)

    @property
    def num_classes(self) -> int:
        """Width of the logits; 0 for a network that returns its embedding, or a module whose `num_classes` is 0."""
        own = getattr(self.model, "num_classes", None)
        return int(own) if self.from_timm or own == 0 else self._width  # type: ignore[arg-type]

    @cached_property
    def _width(self) -> int:
        return int(first_output(self.check_output()).shape[1])

    def check_output(self) -> Any:
        """The output for one image on the meta device. Raises UserError if it is not of shape (1, K)."""
        image = f"images {self.input.shape}"
        try:
            output = self.run_on_meta(self.model)
        except Exception as error:  # of the module's own code
            raise UserError(f"{self.name} does not run on {image}: {one_line(error, 300)}") from None
        logits = first_output(output)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            found = f"{tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"{self.name} returns {found} for one of {image}: expected logits (1, K)")
        return output

    def embedding_width(self) -> int:
        """Width of the embedding, found on the meta device. Raises UserError if the network has none of this kind."""
        tapped = Tapped(self.model, None, embedding=self.pooling)
        try:
            return int(self.run_on_meta(tapped).embedding.shape[1])
        finally:
            tapped.release()

    def run_on_meta(self, module: nn.Module) -> Any:
        """The output of `module`, the model or what wraps it, for one image on the meta device, in eval mode."""
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        meta = {key: value.detach().to("meta") for key, value in tensors.items()}
        flags = {part: part.training for part in module.modules()}
        self.model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                image = torch.empty(1, *self.input.shape, device="meta")
                return torch.func.functional_call(module, meta, (image,))
        finally:
            for part, flag in flags.items():
                part.training = flag

    @property
    def architecture(self) -> str:
        """The registered name, without a source or a weight tag; FILE.FUNCTION, or the class of any other module."""
        if self.code is not None:
            return architecture_of(self.name)
        return str(self.cfg.get("architecture", type(self.model).__name__))

    def describe(self) -> dict[str, Any]:
        """Everything but the weights, in plain values: the fields of `NetworkRecord`."""
        code = {} if self.code is None else {"code": self.code.model_dump(mode="json")}
        return {
            **code,
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

        A module that timm did not make and that does not run at 224 pixels is read at its input size. Raises UserError
        if there are none.
        """
        default = tuple(self.cfg.get("input_size", (len(self.input.mean), *DEFAULT_SIZE)))
        sizes = [(default[0], *self.input.size)] if self.cfg.get("fixed_input_size") else [default]
        if not self.from_timm and self.input.shape != default:
            sizes.append(self.input.shape)
        for size in sizes:
            try:
                return find_levels(self.model, size)
            except LevelsError as error:
                problem = error
        raise UserError(f"{self.name} cannot be matched: {problem}")

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


def pretrained_cfg(model: nn.Module) -> Mapping[str, Any]:
    """timm's configuration of a model; empty for a module that timm did not make."""
    cfg = getattr(model, "pretrained_cfg", None)
    return cfg if isinstance(cfg, dict) else {}


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
