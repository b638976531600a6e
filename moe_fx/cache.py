"""Where measurements are kept between processes.  Imports nothing of ours."""

from __future__ import annotations

import os
from pathlib import Path


def folder(name: str) -> Path:
    """A folder of ours of that name: in ``MOE_FX_CACHE_DIR``, else in Inductor's cache.  It need not exist."""
    place = os.environ.get("MOE_FX_CACHE_DIR")
    if not place:
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        place = cache_dir()
    return Path(place) / "moe_fx" / name
