"""Pages of HTML that stand by themselves: everything that comes from data or settings is escaped."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from hftl import __version__
from hftl.inert import public_name, visible

#: letters of a name in a table or a legend; the whole of it shows when it is pointed at
_LONGEST_NAME = 40
#: settings that say where files lie, or nothing
_UNSHOWN = {"output_dir", "task", "hub_model_id"}


def render(template: str, **values: Any) -> str:
    """The page of a template in hftl/templates."""
    return _environment().get_template(f"{template}.html.jinja").render(**values, hftl_version=__version__)


@functools.cache
def _environment() -> Environment:
    """One for all pages: to compile the templates takes a fifth of a second."""
    environment = Environment(
        loader=PackageLoader("hftl"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # What would turn the letters around it, or is none; charts are markup, and have seen to it.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["short"] = short_name
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    return environment


def settings(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What a recipe sets, as a person may see it."""
    return {name: shown(value) for name, value in recipe.items() if name not in _UNSHOWN and value is not None}


def shown(value: Any) -> str:
    """A setting without the folders of this machine."""
    return ", ".join(map(public_name, value)) if isinstance(value, list) else public_name(value)


def short_name(name: str) -> Markup:
    """The name of a class, cut where it would fill the page."""
    text = visible(name)
    if len(text) <= _LONGEST_NAME:
        return escape(text)
    return Markup('<span title="{}">{}…</span>').format(text, text[: _LONGEST_NAME - 1])


def row_name(row: str) -> str:
    """The id of a row: a path within the data whole, of any other the last part."""
    return public_name(row) if os.path.isabs(row) else row
