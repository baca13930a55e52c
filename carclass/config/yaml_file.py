"""Reader of config files: YAML with `${NAME}` and `${NAME:-default}` from the environment.

Values stay text, but for `null`: the type of the setting decides, so that `no`, `012`, `1e3` and dates are names where
a name is expected. A key given twice, a key without a value and a tag are errors with their lines.
"""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from carclass.errors import UserError, suggest_beside

NULLS = ("", "~", "null", "Null", "NULL")
"""Plain values that stand for null; a key without a value is an error, but a variable may be empty."""
MAX_VALUES = 100_000
"""Limit of the values of a file after its aliases are expanded."""
PLAIN, TEXT = "plain", "tag:yaml.org,2002:str"
"""Tags of unquoted values and of quoted ones."""
VARIABLE = re.compile(r"\$?\$\{([^}\n]*)\}")
REFERENCE = re.compile(r"(\w+)(?::-(.*))?", re.ASCII)
PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")
"""Stand-in for a variable while the text is parsed, which no other character of YAML can be confused with."""


class MalformedError(UserError):
    """Text that is not YAML."""


class FileValues(dict[str, Any]):
    """Keys and values of a file."""

    empty_variables: Mapping[str, str]
    """Values that are empty because of their variables: dotted key → `${NAME}`."""


def read(path: str | Path) -> FileValues:
    """Return the file's keys and values, with `${NAME}` replaced. Raise UserError if it is not a YAML mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        hint = suggest_beside(os.path.abspath(path))
        remedy = f"{hint[:1].upper()}{hint[1:]}" if hint else "Give an existing file."
        raise UserError(f"config file {path}: {error.strerror or error}. {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path} is not UTF-8 text ({error}). Check that it is the right file.") from error
    builder = _Builder(f"config file {path}", null_or_text)
    content = builder.parse(text)
    if not isinstance(content, dict):
        raise UserError(f"config file {path} holds no settings. See docs/configuration.md.")
    values = FileValues(content)
    values.empty_variables = builder.empty
    return values


def null_or_text(text: str) -> str | None:
    """Return None for an unquoted value that stands for null, and any other as it is."""
    return None if text in NULLS else text


def parse(text: str, source: str, plain: Callable[[str], Any] = null_or_text) -> Any:
    """Return the value of a YAML text; None if there is none.

    source: file or origin, for messages. plain: type of unquoted values. Raise MalformedError if the text is not YAML,
    and UserError for ambiguous YAML and unset variables.
    """
    return _Builder(source, plain).parse(text)


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place, creating missing sections."""
    *steps, last = key.split(".")
    for step in steps:
        if not isinstance(values.get(step), dict):
            values[step] = {}
        values = values[step]
    values[last] = value


def dump(values: dict[str, Any]) -> bytes:
    """Return values as YAML that `parse` reads again: `${` is written as `$${`."""
    return yaml.safe_dump(values, sort_keys=False).replace("${", "$${").encode()


class _Loader(yaml.SafeLoader):
    """Parser that gives unquoted values the tag PLAIN, as their type is decided after variables are replaced."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return PLAIN if implicit[0] else TEXT
        return str(super().resolve(kind, value, implicit))


class _Builder:
    """Conversion of parsed YAML to Python values, with checks of keys, tags and aliases."""

    def __init__(self, source: str, plain: Callable[[str], Any]) -> None:
        self.source, self.plain = source, plain
        self.variables: list[str] = []
        self.empty: dict[str, str] = {}
        self.num_values = 0

    def parse(self, text: str) -> Any:
        """Return the value of a YAML text, as the function `parse` does."""
        try:
            node = yaml.compose(VARIABLE.sub(self._hide, PLACEHOLDER.sub("", text)), _Loader)
            return None if node is None else self.build(node, "")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f"line {mark.line + 1}: " if mark else ""
            hint = " Indent with spaces, not with tabs." if "'\\t'" in str(error.problem) else ""
            cause = f"{line}{error.problem or error.context}.{hint}"
            raise MalformedError(f"{self.source} is not valid YAML: {cause}") from error
        except (yaml.YAMLError, RecursionError) as error:
            cause = (
                "it is nested too deeply, or an alias contains itself"
                if isinstance(error, RecursionError)
                else " ".join(str(error).split())
            )
            raise MalformedError(f"{self.source} is not valid YAML: {cause}") from error

    def _hide(self, variable: re.Match[str]) -> str:
        self.variables.append(variable[0])
        return f"\ue000{len(self.variables) - 1}\ue001"

    def build(self, node: yaml.Node, path: str) -> Any:
        """Return the value of a node. path: its dotted key."""
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            self._refuse(node, path, f"has an alias that expands to more than {MAX_VALUES} values. Write them out")
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._build_mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.build(item, f"{path}.{i}" if path else str(i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or node.tag not in (PLAIN, TEXT):
            self._refuse(node, path, f"has the tag `{node.tag}`, which is not supported. Leave the tag out")
        if node.tag == TEXT:
            return self._replace_variables(node, path)
        if node.value == "":
            remedy = "Write one, `null` for none, or `{}` for the defaults of a section"
            if path == "root":
                remedy = "Write the folder or s3:// prefix for all results, such as `root: results`"
            self._refuse(node, path, f"has no value. {remedy}")
        text = self._replace_variables(node, path)
        # Text around a variable makes a text; alone, it has the type of its value.
        return self.plain(text) if text == node.value or PLACEHOLDER.fullmatch(node.value) else text

    def _build_mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        merged, values, lines = {}, {}, dict[str, int]()
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (PLAIN, TEXT) or not key_node.value:
                self._refuse(key_node, path, "has a key that is not text. Write it as `key: value`")
            key = self._replace_variables(key_node, path)
            place = f"{path}.{key}" if path else key
            if key in lines:
                both = f"lines {lines[key]} and {_line(key_node)}"
                raise UserError(f"{self.source}: `{place}` is given twice, in {both}. Join the two, or delete one.")
            lines[key] = _line(key_node)
            if key == "<<" and key_node.tag == PLAIN:
                merged = self._merge(value_node, place)
            else:
                values[key] = self.build(value_node, place)
        return {**merged, **values}

    def _merge(self, node: yaml.Node, path: str) -> dict[str, Any]:
        """Return the values of a merge key: one mapping, or a list of mappings of which the first takes precedence."""
        value, merged = self.build(node, path), dict[str, Any]()
        for item in reversed(value if isinstance(value, list) else [value]):
            if not isinstance(item, dict):
                self._refuse(node, path, "merges a value that is not a mapping. Give the alias of a mapping")
            merged |= item
        return merged

    def _replace_variables(self, node: yaml.ScalarNode, path: str) -> str:
        def value(match: re.Match[str]) -> str:
            text = self.variables[int(match[1])]
            return text[1:] if text.startswith("$$") else self._environment(text, node, path)

        if "${" in node.value:
            self._refuse(node, path, "has `${` without `}`. Close it, or write `$${…}` for the text itself")
        text = PLACEHOLDER.sub(value, node.value)
        if not text.strip() and node.value.strip():
            self.empty[path] = PLACEHOLDER.sub(lambda match: self.variables[int(match[1])], node.value).strip()
        return text

    def _environment(self, text: str, node: yaml.Node, path: str) -> str:
        match = REFERENCE.fullmatch(text[2:-1])
        if match is None:
            self._refuse(node, path, f"has `{text}`. Write `${{NAME}}`, `${{NAME:-default}}`, or `$${{…}}` for text")
        name, default = match.groups()
        value = os.environ.get(name)
        if default is not None and not value:  # as in the shell, `:-` replaces an empty value too
            value = default
        if value is None:
            raise UserError(f"{self.source} uses ${{{name}}}, which is not set. Run `export {name}=…` first.")
        return value

    def _refuse(self, node: yaml.Node, path: str, problem: str) -> NoReturn:
        place = f"`{path}`" if path else "the file"
        raise UserError(f"{self.source}: line {_line(node)}: {place} {problem}.")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
