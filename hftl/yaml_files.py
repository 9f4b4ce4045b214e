"""Files of settings."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from hftl.errors import UsageError


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        json.dumps(content, ensure_ascii=False, default=str).encode()  # half a character could be written nowhere
    except FileNotFoundError:
        raise UsageError(f"Configuration file {str(path)!r} does not exist.") from None
    except RecursionError:
        raise UsageError(f"Configuration file {str(path)!r} is nested too deeply to be settings.") from None
    except (yaml.YAMLError, ValueError, OSError) as error:  # ValueError: another encoding, or 2020-13-45
        raise UsageError(f"Configuration file {str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UsageError(f"Configuration file {str(path)!r} must hold `name: value` lines.")
    return content


class _Loader(yaml.SafeLoader):
    """PyYAML takes `1e-5` for a string, and the last of two equal keys; here it is a number, and they are an error.

    So are aliases, of which a few lines can stand for more than any memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A part of the file, written out where it stands."""
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"the alias *{event.anchor} is no setting", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        other = next((key for key, _ in node.value if not isinstance(key, yaml.ScalarNode)), None)
        if other is not None:
            raise yaml.constructor.ConstructorError(None, None, "a key must be a name", other.start_mark)
        twice = [name for name, count in Counter(key.value for key, _ in node.value).items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands there twice")
        mapping = super().construct_mapping(node, deep)
        unnamed = [key for key in mapping if not isinstance(key, str)]
        if unnamed:
            raise yaml.constructor.ConstructorError(None, None, f"the key {unnamed[0]!r} is no name", node.start_mark)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
