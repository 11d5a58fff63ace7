"""Reading and writing configurations: built-in names, YAML files, `--a.b value` overrides, nearest-name suggestions.

A `ConfigKind` does it for one dataclass; the functions of this module do it for `SearchConfig`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from tfnas.config import ConfigError, SearchConfig
from tfnas.strict_yaml import read_yaml

CONFIG_FOLDER = Path(__file__).parent / "configs"
DEFAULT_CONFIG = "quickstart"
CONFIG_FILE = "config.yaml"  # of a run's folder

C = TypeVar("C")


@dataclass(frozen=True)
class ConfigKind(Generic[C]):
    """What is configured (a dataclass with defaults throughout), by which command, and where its built-in files lie."""

    config_class: type[C]
    command: str
    description: str
    folder: Path
    default: str = DEFAULT_CONFIG

    def names(self) -> list[str]:
        """Names of the built-in configurations."""
        return sorted(path.stem for path in self.folder.glob("*.yaml"))

    def path(self, name_or_path: str | Path) -> Path:
        """The file of a built-in configuration or of a path; `ConfigError` lists the names where neither exists."""
        path = Path(name_or_path)
        built_in = self.folder / f"{name_or_path}.yaml"
        if path.suffix == "" and path.name == str(name_or_path) and built_in.is_file():
            return built_in
        if path.is_file():
            return path
        raise ConfigError(
            f"--config {name_or_path}: neither a file nor a built-in configuration ({', '.join(self.names())})"
        )

    def parser(self) -> ArgumentParser:
        """Command-line parser: one option per key of the dataclass, `--config`, `--print_config`."""
        parser = ArgumentParser(
            prog=self.command, exit_on_error=False, allow_abbrev=False, description=self.description
        )
        parser.add_argument(
            "--config",
            action=ActionConfigFile,
            help=f"built-in name ({', '.join(self.names())}) or YAML file; default {self.default}. "
            "The defaults below are of keys that a file leaves out.",
        )
        parser.add_class_arguments(self.config_class, as_group=False)
        return parser

    def parse(self, arguments: Sequence[str], preset: Mapping[str, Any] | None = None) -> C:
        """A configuration from command-line arguments; without `--config` they override the default one.

        With `--resume` and no `--config`, the configuration stored in the `--output` folder is what they override.
        `preset` are values of keys that come after those of the configuration and before the arguments; a stored
        configuration already has them.
        """
        parser = self.parser()
        resolved = self._resolve(self._complete_switches(self._complete_lists(arguments)), preset or {})
        unprinted = [argument for argument in resolved if argument.partition("=")[0] != "--print_config"]
        try:
            config = self._build(parser, parser.parse_args(unprinted))
            if len(unprinted) < len(resolved):
                parser.parse_args(resolved)  # prints and exits; what cannot be used is refused before
            return config
        except OverflowError as error:
            raise ConfigError(f"a number is too large: {error}") from None
        except ArgumentError as error:
            raise ConfigError(_with_suggestions(str(error), parser, resolved)) from None

    def load(self, name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> C:
        """Read a built-in configuration or a YAML file; `overrides`: keys such as `"weights.lr"` with new values."""
        values = _read_yaml(self.path(name_or_path))
        for key, value in (overrides or {}).items():
            *groups, last = key.split(".")
            target = values
            for group in groups:
                target = target.setdefault(group, {})
            target[last] = value
        try:
            return self.from_dict(values)
        except ConfigError as error:
            if overrides:
                raise
            raise ConfigError(f"{name_or_path}: not a configuration of {self.command}: {error}") from None

    def from_dict(self, values: Mapping[str, Any]) -> C:
        """A validated configuration from nested plain values; missing keys take their defaults."""
        parser = self.parser()
        try:
            return self._build(parser, parser.parse_object(dict(values)))
        except OverflowError as error:
            raise ConfigError(f"a number is too large: {error}") from None
        except ArgumentError as error:
            raise ConfigError(_suggest(str(error), _flatten(values), _known_keys(parser))) from None

    def _build(self, parser: ArgumentParser, namespace: Any) -> C:
        for field in dataclasses.fields(self.config_class):  # type: ignore[arg-type]
            if dataclasses.is_dataclass(field.default_factory) and not hasattr(namespace[field.name], "as_dict"):
                raise ConfigError(f"{field.name} is a group of keys, got {namespace[field.name]!r}")
        values = parser.instantiate(namespace).as_dict()
        values.pop("config", None)
        return self.config_class(**values)

    def _complete_switches(self, arguments: Sequence[str]) -> list[str]:
        """`--resume` alone means `--resume=true`."""
        fields = dataclasses.fields(self.config_class)  # type: ignore[arg-type]
        switches = {f"--{field.name}" for field in fields if field.type == "bool"}
        completed: list[str] = []
        for index, argument in enumerate(arguments):
            follows = arguments[index + 1].lower() if index + 1 < len(arguments) else ""
            bare = argument in switches and follows not in ("true", "false", "yes", "no")
            completed.append(f"{argument}=true" if bare else argument)
        return completed

    def _complete_lists(self, arguments: Sequence[str]) -> list[str]:
        """`--target_latency_ms 10,12` means `--target_latency_ms [10,12]`."""
        fields = dataclasses.fields(self.config_class)  # type: ignore[arg-type]
        names = {f"--{field.name}" for field in fields if "list[float]" in str(field.type)}
        completed: list[str] = []
        before = ""
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if before in names:
                completed.append(_bracketed(argument))
            else:
                completed.append(f"{name}={_bracketed(value)}" if equals and name in names else argument)
            before = argument
        return completed

    def _resolve(self, arguments: list[str], preset: Mapping[str, Any]) -> list[str]:
        """Replace configuration names by paths, put the default one first where none is named, then the preset."""
        files: list[str] = []
        others: list[str] = []
        pending = iter(arguments)
        for argument in pending:
            if argument == "--config":
                value = next(pending, None)
                if value is None:
                    raise ConfigError(f"--config needs a name ({', '.join(self.names())}) or a YAML file")
                argument = f"--config={value}"
            if argument.startswith("--config="):
                path = self.path(argument.removeprefix("--config="))
                _read_yaml(path)
                files.append(f"--config={path}")
            else:
                others.append(argument)
        stored = None if files else _stored_config(arguments)
        if stored is not None:
            self.load(stored)  # names the file where it is of another command
            return [f"--config={stored}", *others]
        if not files and not {"-h", "--help"} & set(arguments):
            files = [f"--config={self.folder / f'{self.default}.yaml'}"]
        values = [f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in preset.items()]
        return [*files, *values, *others]


SEARCH = ConfigKind(SearchConfig, "tfnas search", "Search a network that meets a latency target.", CONFIG_FOLDER)
parse_search_arguments = SEARCH.parse
load_config = SEARCH.load


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, complete: `SEARCH.from_dict(config_to_dict(c)) == c`."""
    values: dict[str, Any] = _with_lists(dataclasses.asdict(config))
    return values


def _with_lists(value: Any) -> Any:
    """Tuples as lists, which is what YAML knows."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, list | tuple) else value


def config_to_yaml(config: Any) -> str:
    """Complete YAML of a configuration; `load_config` of it gives the same configuration."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def _bracketed(text: str) -> str:
    return f"[{text}]" if "," in text and not text.startswith("[") else text


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = read_yaml(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if values is None:
        raise ConfigError(f"{path} holds no keys: it is empty or cut off; --print_config shows what it may hold")
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values at its top level, got {type(values).__name__}")
    return values


def _stored_config(arguments: list[str]) -> Path | None:
    """`config.yaml` of the run to be resumed, where `--resume` and `--output` name one."""
    options = dict(_options(arguments))
    if options.get("resume") not in ("true", "True", "yes") or not options.get("output"):
        return None
    path = Path(options["output"]) / CONFIG_FILE
    return path if path.is_file() else None


def _options(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of each `--name value` or `--name=value`; the value is empty where none follows."""
    for index, argument in enumerate(arguments):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        if not equals and index + 1 < len(arguments) and not arguments[index + 1].startswith("--"):
            value = arguments[index + 1]
        yield name, value


def _known_keys(parser: ArgumentParser) -> list[str]:
    defaults = parser.get_defaults().as_dict()
    defaults.pop("config", None)
    return [*_flatten(defaults), *(key for key, value in defaults.items() if isinstance(value, dict))]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in values.items():
        keys += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}"]
    return keys


def _with_suggestions(message: str, parser: ArgumentParser, arguments: list[str]) -> str:
    used = [name for name, _ in _options(arguments) if name not in ("config", "print_config", "help")]
    for name, value in _options(arguments):
        if name == "config":
            used += _flatten(_read_yaml(Path(value)))
    return _suggest(message, used, _known_keys(parser))


def _suggest(message: str, used: Iterable[str], known: list[str]) -> str:
    """Append the nearest known name of every key that does not exist."""
    lines = [message.strip()]
    leaves = {key.rpartition(".")[2]: key for key in known}
    for key in used:
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, n=1)
        if not near:
            near = [leaves[leaf] for leaf in difflib.get_close_matches(key.rpartition(".")[2], list(leaves), n=1)]
        lines.append(f"unknown key {key!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    return "\n".join(dict.fromkeys(lines))
