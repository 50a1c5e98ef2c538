"""YAML files and command-line overrides into one checked `schema.Config`, and back into YAML.

Layers, the later one wins: the chain of `extends`, the file itself, `key=value` from the command line. A layer that changes
`policy.mode` drops a `policy.tau` of an earlier layer, because a temperature belongs to its mode: `policy.mode=fuzzy` on top of
a soft recipe means the paper's fuzzy, not soft under another name.

Every mistake is one InputError line: `FILE:LINE: key = value: expected ...; nearest valid name`.
"""

import hashlib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import InputError
from configs.schema import TAU_OF_MODE, Config
from configs.validate import show, validate

COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Setting:
    """One `key: value` as the user wrote it."""

    key: str  # dotted, as in YAML: "async.max_staleness"
    value: Any
    where: str  # "demo.yaml:12" or "command line"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, what it extends, and `key=value` overrides; fill `policy.tau`; check everything.

    Raises InputError for a missing file, bad YAML, an unknown key, a wrong type or an impossible value.
    """
    layers = [*_file_layers(Path(path), ()), [_parse_override(text) for text in overrides]]
    tree = OmegaConf.structured(Config)
    origin: dict[str, str] = {}
    for layer in layers:
        if _changes_mode(tree, layer):
            tree.policy.tau = None
        for setting in layer:
            _apply(tree, setting)
            origin[setting.key] = setting.where
    config = _resolve(tree, origin)
    if config.policy.tau is None:
        config.policy.tau = TAU_OF_MODE[config.policy.mode]
    validate(config, origin)
    return config


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back into an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(asdict(config))))


def config_hash(config: Config) -> str:
    """12 hexadecimal digits that change whenever any value does."""
    return hashlib.sha256(dump_config(config).encode()).hexdigest()[:12]


# What keys there are


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted YAML key, type) of every field below a dataclass; nested dataclasses are sections."""
    for name, hint in get_type_hints(cls).items():
        key = prefix + name.rstrip("_")  # async_ is `async` to the user
        if is_dataclass(hint):
            yield from _leaves(hint, key + ".")  # type: ignore[arg-type]
        else:
            yield key, hint


LEAVES: dict[str, Any] = dict(_leaves(Config))
SECTIONS: dict[str, list[str]] = {}
for _key in LEAVES:
    SECTIONS.setdefault(_key.split(".")[0], []).append(_key.split(".")[1])


def _unknown(key: str, where: str) -> InputError:
    """An unknown key with the nearest valid one: the same name in another section, else a neighbour, else all neighbours."""
    section, _, name = key.rpartition(".")
    neighbours = SECTIONS.get(section, []) if section else [*SECTIONS, "extends"]
    near = get_close_matches(name, neighbours, n=1)
    elsewhere = [leaf for leaf in LEAVES if leaf.split(".")[1] == name.lower()]
    if elsewhere:
        hint = f"did you mean {' or '.join(elsewhere)}?"
    elif near:
        hint = f"did you mean {section + '.' if section else ''}{near[0]}?"
    elif neighbours:
        hint = f"expected one of {', '.join(neighbours)}"
    else:  # below a value, or below an unknown section
        nearest = get_close_matches(key, LEAVES, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"expected a key of {', '.join(SECTIONS)}"
    return InputError(f"{where}: unknown key {key}: {hint}")


# Reading files


def _file_layers(path: Path, children: tuple[Path, ...], where: str = "") -> list[list[Setting]]:
    """The settings of the file's ancestors, oldest first, then its own. `children` are the files that led here."""
    if path.resolve() in [child.resolve() for child in children]:
        cycle = " -> ".join(str(p) for p in (*children, path))
        raise InputError(f"{where}: extends = {path.name}: expected a chain that ends, found {cycle}")
    content, lines = _read_yaml(path, where)
    base = content.pop("extends", None)
    layer = list(_settings(content, path, lines))
    if base is None:
        return [layer]
    base_where = _place(path, lines, "extends")
    if not isinstance(base, str):
        raise InputError(f"{base_where}: extends = {base!r}: expected the name of one YAML file")
    return [*_file_layers(path.parent / base, (*children, path), base_where), layer]


def _read_yaml(path: Path, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's mapping, interpolations untouched, and the line (from 1) of each dotted key."""
    text = _read_text(path, where)
    lines: dict[str, int] = {}
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return {}, lines
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{path}:{root.start_mark.line + 1}: expected `key: value` lines, found {root.id} {show(text)}")
        _locate(root, "", path, lines)
        content = OmegaConf.to_container(OmegaConf.create(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {_first_line(error)}") from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}, lines


def _read_text(path: Path, where: str) -> str:
    prefix = f"{where}: extends = " if where else ""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if not path.parent.is_dir():
            raise InputError(f"{prefix}{path}: no such file, and no folder {path.parent}") from error
        present = {p.stem: p.name for p in sorted(path.parent.iterdir()) if p.suffix in (".yaml", ".yml")}
        near = [present[stem] for stem in get_close_matches(path.stem, present, n=3, cutoff=0.5)]
        found = f"did you mean {' or '.join(near)}?" if near else f"YAML files there: {', '.join(present.values()) or 'none'}"
        raise InputError(f"{prefix}{path}: no such file; {found}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{prefix}{path}: expected a YAML file in UTF-8, byte {error.start} is not") from error
    except OSError as error:
        raise InputError(f"{prefix}{path}: cannot be read: {error.strerror}; expected a YAML file") from error


def _locate(node: yaml.MappingNode, prefix: str, path: Path, lines: dict[str, int]) -> None:
    """Note the line of each key; a key that stands twice is an error, because one of the two would be silently lost."""
    for key_node, value_node in node.value:
        key, line = prefix + str(key_node.value), key_node.start_mark.line + 1
        if key in lines:
            raise InputError(f"{path}:{line}: {key} stands twice, first on line {lines[key]}: expected one of them")
        lines[key] = line
        if isinstance(value_node, yaml.MappingNode) and key in SECTIONS:
            _locate(value_node, key + ".", path, lines)


def _settings(content: Mapping[Any, Any], path: Path, lines: dict[str, int], prefix: str = "") -> Iterator[Setting]:
    """Flatten nested YAML into settings; every key is known afterwards."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        where = _place(path, lines, key)
        if key in LEAVES:
            yield Setting(key, value, where)
        elif key not in SECTIONS:
            raise _unknown(key, where)
        elif isinstance(value, dict):
            yield from _settings(value, path, lines, key + ".")
        elif value is not None:  # a section whose keys are all commented out sets nothing
            raise InputError(f"{where}: {key} = {show(value)}: expected a section with keys {', '.join(SECTIONS[key])}")


def _place(path: Path, lines: dict[str, int], key: str) -> str:
    return f"{path}:{lines[key]}" if key in lines else str(path)


def _parse_override(text: str) -> Setting:
    """`key=value`. Text stays as typed (a prompt may hold colons and braces); lists and mappings are YAML's one-line form."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals:
        raise InputError(f"{COMMAND_LINE}: {text!r}: expected key=value, such as policy.mode=fuzzy")
    if key in SECTIONS:
        raise InputError(f"{COMMAND_LINE}: {key} = {raw}: expected one of its keys, such as {key}.{SECTIONS[key][0]}={raw}")
    if key not in LEAVES:
        raise _unknown(key, COMMAND_LINE)
    if raw in ("null", "~") and _is_optional(LEAVES[key]):
        return Setting(key, None, COMMAND_LINE)
    if (LEAVES[key] is Any and raw.startswith("{")) or get_origin(LEAVES[key]) is list:
        try:
            return Setting(key, yaml.safe_load(raw), COMMAND_LINE)
        except yaml.YAMLError as error:
            raise InputError(f"{COMMAND_LINE}: {key} = {raw}: expected {_expected(LEAVES[key])}") from error
    return Setting(key, raw, COMMAND_LINE)


# Applying settings


def _field_path(key: str) -> str:
    return key.replace("async.", "async_.", 1)


def _changes_mode(tree: DictConfig, layer: list[Setting]) -> bool:
    last = {setting.key: setting.value for setting in layer}
    return "policy.mode" in last and "policy.tau" not in last and last["policy.mode"] != tree.policy.mode


def _apply(tree: DictConfig, setting: Setting) -> None:
    try:
        OmegaConf.update(tree, _field_path(setting.key), setting.value, merge=False)
    except OmegaConfBaseException as error:
        hint = _nearest_choice(LEAVES[setting.key], setting.value)
        expected = _expected(LEAVES[setting.key])
        raise InputError(f"{setting.where}: {setting.key} = {show(setting.value)}: expected {expected}{hint}") from error


def _resolve(tree: DictConfig, origin: Mapping[str, str]) -> Config:
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "").replace("async_.", "async.")
        place = f"{origin.get(key, 'default')}: {key} = " if key else ""
        raise InputError(f"{place}{_first_line(error)}; expected ${{section.key}} of an existing key") from error
    assert isinstance(config, Config)
    return config


def _plain(value: Any) -> Any:
    """Dataclass contents as YAML values: enums by name, `async_` as `async`, a literal `${` escaped from interpolation."""
    if isinstance(value, dict):
        return {name.rstrip("_"): _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    # before a literal `${` OmegaConf reads two backslashes as one, and one more as "not an interpolation"
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


# Words for messages


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _expected(hint: Any) -> str:
    if _is_optional(hint):
        return " or ".join([*(_expected(a) for a in get_args(hint) if a is not type(None)), "null"])
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.value for member in hint)
    if get_origin(hint) is list:
        return "a list of names, such as [hard_greedy, soft_sample]"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, "a name or {path: ..., question: ..., answer: ...}")


def _nearest_choice(hint: Any, value: Any) -> str:
    if not (isinstance(hint, type) and issubclass(hint, Enum)):
        return ""
    near = get_close_matches(str(value).lower(), [member.value for member in hint], n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
