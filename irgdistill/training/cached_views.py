"""The views of the images that teacher caches hold, and a run that trains on them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from irgdistill.config import Config
from irgdistill.errors import UserError
from irgdistill.training.cache_manifest import Manifest
from irgdistill.training.teacher_cache import TeacherCache, shortened


def with_cached_orientation(config: Config, manifest: Manifest | None, folder: Path) -> Config:
    """The same run with photos turned as in the cache in `folder`, if any. Raises UserError if the run asks otherwise.

    Caches of older versions hold photos as they were stored.
    """
    if manifest is None:
        return config
    asked, cached = config.data.exif_orientation, manifest.views.exif_orientation
    if asked != cached and "exif_orientation" in config.data.model_fields_set:
        raise UserError(f"data.exif_orientation = {asked}, but the teacher cache {folder} was made with {cached}")
    return config.replaced({"data.exif_orientation": cached})


def with_cached_views(config: Config, caches: Sequence[TeacherCache | None]) -> Config:
    """The same run on the views of its caches. Raises UserError if they differ, or the run asks for others."""
    known = [cache for cache in caches if cache is not None]
    for first, other in pairwise(known):
        ours, theirs = (cache.manifest.values["views"] for cache in (first, other))
        for key in {**ours, **theirs}:
            here, there = ours.get(key), theirs.get(key)
            if here != there:
                differ = f"{key} {shortened(here)} and {shortened(there)}"
                raise UserError(
                    f"the teacher caches {first.folder} and {other.folder} hold different views: {differ}; "
                    "make both with the same options, and each with all teachers "
                    "(cache-teacher --teacher A --teacher B caches A)"
                )
    for cache in known[:1]:
        for name, key in (("views", "views"), ("view_seed", "seed")):
            asked, cached = getattr(config.data, name), getattr(cache.views, key)
            if asked not in (None, cached):
                raise UserError(f"data.{name} = {asked}, but the teacher cache {cache.folder} was made with {cached}")
        second, cached = config.data.second_view, cache.views.second_view
        if second != cached:
            raise UserError(f"data.second_view = {second}, but the teacher cache {cache.folder} was made with {cached}")
        config = with_cached_orientation(config, cache.manifest, cache.folder)
        config = config.replaced({"data.views": cache.views.views, "data.view_seed": cache.views.seed})
    return config
