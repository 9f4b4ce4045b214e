"""Pages of HTML that stand by themselves: everything that comes from data or settings is escaped."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hftl import __version__

#: settings that say where files lie, or nothing
_UNSHOWN = {"output_dir", "task", "hub_model_id", "logging_dir"}


def render(template: str, **values: Any) -> str:
    """The page of a template in hftl/templates."""
    environment = Environment(
        loader=PackageLoader("hftl"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    return environment.get_template(f"{template}.html.jinja").render(**values, versions=_versions())


def settings(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What a recipe sets, as a person may see it."""
    return {name: _shown(value) for name, value in recipe.items() if name not in _UNSHOWN and value is not None}


def _shown(value: Any) -> str:
    """Of a path the last part, since the folders around it are nobody's business."""
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def _versions() -> dict[str, str]:
    """Of what may make a difference."""
    names = ("torch", "transformers", "timm", "peft", "accelerate", "datasets", "scikit-learn")
    return {"hftl": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }
