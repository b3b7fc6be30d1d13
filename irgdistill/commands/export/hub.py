"""Writes weights and configuration as timm puts them on the Hugging Face Hub, and uploads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in `__all__`
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf  # the public `save_for_hf` writes weights without their format

from irgdistill.errors import UserError, one_line
from irgdistill.io import own_copies
from irgdistill.models import CheckpointMetadata, Network

WEIGHTS, CARD, RECIPE, CONFIG = "model.safetensors", "README.md", "recipe.yaml", "config.json"
OWN_FILES = (WEIGHTS, CARD, RECIPE, CONFIG)


SOURCE_KEYS = ("license", "origin_url", "paper_ids", "paper_name", "notes", "description")
"""Keys of timm's configuration that describe its own pretrained weights, not these."""


def save_for_timm(network: Network, metadata: CheckpointMetadata, weights: Path, license: str | None) -> None:
    """Write plain safetensors at `weights`, and beside them config.json as `timm.models.push_to_hf_hub` does."""
    try:
        save_file(own_copies(network.model.state_dict()), weights, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{weights.name} cannot be written: {error}") from None
    cfg: Any = network.model.pretrained_cfg
    network.model.pretrained_cfg = {key: value for key, value in cfg.items() if key not in SOURCE_KEYS}  # type: ignore[assignment]
    own = {"tag": metadata.method.replace("+", "_"), **({} if license is None else {"license": license})}
    save_config_for_hf(
        network.model,
        weights.with_name(CONFIG),
        model_config={"label_names": metadata.classes, "pretrained_cfg": own},
        data_config={"input_size": network.input.shape, **network.input.preprocessing},
    )


def check_login(repository: str) -> None:
    """Raises UserError: not the name of a repository, or nobody is logged in."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {one_line(error)}") from None
    if huggingface_hub.get_token() is None:
        raise UserError(f"--push {repository}: not logged in to the Hugging Face Hub; run `hf auth login` first")


def upload(folder: Path, repository: str, overwrite: bool) -> str:
    """Upload a folder to the Hub with the user's login and return its address. Raises UserError; the folder stays.

    A README.md on the Hub is replaced only with `overwrite`.
    """
    try:
        api = huggingface_hub.HfApi(library_name="irgdistill")
        repository = api.create_repo(repository, exist_ok=True).repo_id
        keep = not overwrite and api.file_exists(repository, CARD)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Add a student distilled with irgdistill",
            ignore_patterns=[CARD] if keep else None,
        )
    except Exception as error:  # network, server or login: each library version has its own exceptions
        raise UserError(
            f"--push {repository}: {one_line(error)}; "
            f"the folder is complete, upload it later: hf upload {repository} {folder}"
        ) from None
    return f"https://huggingface.co/{repository}"
