"""Values as text: lists, mappings and negative numbers on a command line and in a recipe's file."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

#: argparse's own takes -1e-05, as Python writes it, for an option.
NEGATIVE = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


def with_yaml_lists(overrides: Sequence[str], lists: Collection[str]) -> list[str]:
    """Command-line arguments in which ``--key '[a, b]'``, of a key in ``lists``, is ``--key a b``."""
    arguments: list[str] = []
    key = ""  # of the last option
    for argument in overrides:
        value = argument
        if argument.startswith("--"):
            key = _key(argument)
            if "=" in argument and key in lists:
                option, _, value = argument.partition("=")
                arguments.append(option)
        arguments += _list_items(key, value) if key in lists and value.startswith("[") else [value]
    return arguments


def given_keys(overrides: Sequence[str]) -> list[str]:
    """The keys of ``["--key", "value", "--key=value", ...]``."""
    return [_key(text) for text in overrides if text.startswith("--")]


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file; raises ValueError, with its name, where it cannot be read or has others."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeysLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    return content


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping, or the one that a text in YAML or JSON says; raises ValueError, with the name, for anything else."""
    try:
        content = yaml.safe_load(value) if isinstance(value, str) else value
    except (yaml.YAMLError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be a mapping, got {value!r}")
    return content


class _UniqueKeysLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's own would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"found the key {twice[0]!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _key(option: str) -> str:
    return option[2:].partition("=")[0].replace("-", "_")


def _list_items(key: str, text: str) -> list[str]:
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"command line: {key} must be a list in YAML, got {text!r}") from error
    if not isinstance(values, list) or any(isinstance(value, (list, dict)) for value in values):
        raise ValueError(f"command line: {key} must be a list of single values, got {text!r}")
    return [str(value) for value in values]
