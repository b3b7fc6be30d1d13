"""The Hugging Face Hub: weights and configuration in the form timm gives them there, and the upload."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf

from irgdistill.errors import UserError
from irgdistill.io import own_copies
from irgdistill.models import Network

WEIGHTS, CARD, RECIPE, CONFIG = "model.safetensors", "README.md", "recipe.yaml", "config.json"


OWN_FILES = (WEIGHTS, CARD, RECIPE, CONFIG)


OTHERS = ("license", "origin_url", "paper_ids", "paper_name", "notes", "description")
"""What timm's configuration says of the weights it would fetch, and is not true of these."""


def save_for_timm(network: Network, metadata: Mapping[str, Any], weights: Path, license: str | None) -> None:
    """Plain safetensors at `weights`, and beside them config.json as `timm.models.push_to_hf_hub` writes it."""
    try:
        save_file(own_copies(network.model.state_dict()), weights, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{weights.name} cannot be written: {error}") from None
    cfg: Any = network.model.pretrained_cfg
    network.model.pretrained_cfg = {key: value for key, value in cfg.items() if key not in OTHERS}  # type: ignore[assignment]
    own = {"tag": str(metadata["method"]).replace("+", "_"), **({} if license is None else {"license": license})}
    save_config_for_hf(
        network.model,
        weights.with_name(CONFIG),
        model_config={"label_names": metadata["classes"], "pretrained_cfg": own},
        data_config={"input_size": network.input.shape, **network.input.preprocessing},
    )


def check_login(repository: str) -> None:
    """Raises UserError: no name of a repository, or nobody is logged in here."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {textwrap.shorten(str(error), 160, placeholder=' …')}") from None
    if huggingface_hub.get_token() is None:
        raise UserError(f"--push {repository}: not logged in to the Hugging Face Hub; run `hf auth login` first")


def upload(folder: Path, repository: str, overwrite: bool) -> str:
    """Send a folder to the Hub, with the user's own login -> its address. Raises UserError; the folder stays.

    A README.md that is there already is replaced only with `overwrite`.
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
    except Exception as error:  # of the network, the server, the login: each library version has its own
        why = textwrap.shorten(str(error), 160, placeholder=" …") or type(error).__name__
        raise UserError(
            f"--push {repository}: {why}; the folder is whole, send it later: hf upload {repository} {folder}"
        ) from None
    return f"https://huggingface.co/{repository}"
