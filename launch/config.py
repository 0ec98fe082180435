"""From YAML files and overrides to a checked `JobConfig`: the only place that parses YAML.

Layers, later ones win: defaults of the dataclasses <- model preset (`configs/model/NAME.yaml`, chosen by
`model.preset`) <- the files a job `extends`, outermost first <- the job file <- overrides in order. Every value keeps
the file and line it came from, so that every message can name it. Must not know: what a key means beyond its type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from windlass import configs
from windlass.dist.errors import ConfigError
from windlass.launch.check import check_job, check_values, type_text
from windlass.launch.job import (
    SIZE_PATTERN,
    JobConfig,
    Key,
    Loaded,
    TrainConfig,
    job_groups,
    job_keys,
    show_value,
    value_at,
)
from windlass.launch.run_folder import write_atomically
from windlass.launch.suggest import nearest_key
from windlass.model.hf_config import resolve_model

__all__ = [
    "JobConfig",
    "Loaded",
    "TrainConfig",
    "check_job",
    "job_names",
    "load_dataclass",
    "load_job",
    "to_yaml",
    "write_keys",
]

CONFIGS = Path(configs.__path__[0])


class _Loader(yaml.SafeLoader):
    """YAML as users mean it: 1e-3 is a number (YAML 1.1 wants 1.0e-3), a date is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class _Place:
    """A file and a line in it, or an override (no file)."""

    file: str | None = None
    line: int = 0

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.line}" if self.file else "override"

    def __str__(self) -> str:
        return f" ({self.origin})" if self.file else ""

    def of(self, node: yaml.Node) -> _Place:
        return _Place(self.file, node.start_mark.line + 1) if self.file else self


@dataclass(frozen=True)
class _Entry:
    key: str
    value: Any
    place: _Place

    def __str__(self) -> str:
        """The way every message about a key begins."""
        return f"{self.key} = {show_value(self.value)}{self.place}"


def job_names() -> list[str]:
    """Return the names of the jobs that come with Windlass."""
    return sorted(p.stem for p in CONFIGS.glob("*.yaml"))


def load_job(job: str | Path, overrides: Sequence[str] = (), *, cluster: Path | None = None) -> Loaded:
    """Read a job (a YAML file, or the name of one in configs/) and apply overrides such as `zero.stage=3`.

    `cluster` is a file of keys of that group (see `windlass bench tiers`), which win over those of the job.

    Raises: ConfigError naming key path, file and line for anything that cannot be read, is unknown or out of range.
            Checks across keys are `check_job`'s.
    """
    path = _find(str(job))
    facts = _read(cluster, "cluster.") if cluster is not None else ()
    user = [*_read_job(path, ()), *facts, *_read_overrides(overrides)]
    preset = next((e for e in reversed(user) if e.key == "model.preset" and e.value is not None), None)
    lower = _read_preset(preset) if preset else []
    tree = _defaults()
    origins = dict.fromkeys(job_keys(), "default")
    for entry in lower:
        _assign(tree, entry)
        origins[_leaf_path(entry.key)] = f"preset {entry.place.origin}"
    before = _before(tree, user)
    for entry in user:
        _assign(tree, entry)
        origins[_leaf_path(entry.key)] = entry.place.origin
    loaded = Loaded(_freeze(tree), origins, frozenset(), _show(path))
    check_values(loaded)
    given = {key for key in map(_leaf_path, (e.key for e in user)) if loaded.value(key) != value_at(before, key)}
    return replace(loaded, given=frozenset(given))


def _before(tree: DictConfig, user: Sequence[_Entry]) -> JobConfig:
    """Return what the job would be without the user's values, but for those that choose the architecture."""
    chosen = [e for e in user if e.key in ("model.kind", "model.hf_folder")]
    before = _freeze(tree)
    if not chosen:
        return before
    tree = deepcopy(tree)
    for entry in chosen:
        _assign(tree, entry)
    # These two themselves count as given when they differ from what was before them.
    kept = {e.key.removeprefix("model."): value_at(before, e.key) for e in chosen}
    return replace(before, model=replace(_freeze(tree).model, **kept))


def load_dataclass(path: str | Path, group: str) -> Any:
    """Read a YAML file that holds one group of keys (`cluster`, say) and nothing else; the rest is default.

    Raises: ConfigError as `load_job` does.
    """
    file = Path(path)
    tree = _defaults()
    origins = dict.fromkeys(job_keys(), "default")
    for entry in _read(file, f"{group}."):
        _assign(tree, entry)
        origins[_leaf_path(entry.key)] = entry.place.origin
    loaded = Loaded(_freeze(tree), origins, frozenset(), _show(file))
    check_values(loaded)
    return getattr(loaded.config, group)


def to_yaml(config: JobConfig) -> str:
    """Write a whole configuration as YAML that `load_job` reads back to the same."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True, width=120)


def write_keys(path: str | Path, group: str, values: Mapping[str, Any], heading: str = "") -> None:
    """Set keys in a YAML file of one group, atomically; its other keys and its comments stay. A new file begins with
    `heading` as a comment.

    Raises: ConfigError as `load_dataclass` does, also for a file that was damaged before; or if it cannot be written
    """
    file = Path(path)
    if file.exists():
        load_dataclass(file, group)
        text = file.read_text(encoding="utf-8")
    else:
        text = "".join(f"# {line}\n" for line in heading.splitlines())
    try:
        write_atomically(file, _with_keys(text, values))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}. Give a file that can be written.") from error


def _with_keys(text: str, values: Mapping[str, Any]) -> str:
    """Return the text of a mapping with keys set: in their places, or at its end."""
    # One line per key, whatever the value: the only member of a list in brackets, without them.
    written = {
        key: f"{key}: {yaml.safe_dump([value], default_flow_style=True, width=10**6).strip()[1:-1]}"
        for key, value in values.items()
    }
    node = _compose(text, None)[1]
    pairs = [] if node is None else [(k, v) for k, v in node.value if k.value in written]
    if isinstance(node, yaml.MappingNode) and node.flow_style:
        kept = yaml.load(text, _Loader)
        return yaml.safe_dump({**kept, **values}, sort_keys=False, default_flow_style=None, width=120)
    for key, value in reversed(pairs):
        text = text[: key.start_mark.index] + written.pop(key.value) + text[_end(value) :]
    return "".join([text, "" if text.endswith("\n") or not text else "\n", *(f"{line}\n" for line in written.values())])


def _end(node: yaml.Node) -> int:
    """Return where the text of a node ends; that of a block is taken to reach to the next key, with all comments."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return cast(int, node.end_mark.index)


# -- where files are ---------------------------------------------------------------------------------------------------


def _find(job: str, beside: Path | None = None) -> Path:
    path = beside / job if beside else Path(job)
    if path.is_file():
        return path
    packaged = CONFIGS / f"{job.removesuffix('.yaml')}.yaml"
    if "/" not in job and packaged.is_file():
        return packaged
    if path.is_dir():
        raise ConfigError(f"job '{job}': this is a folder. Give a YAML file in it.")
    raise ConfigError(
        f"job '{job}': no such file{_nearest(job.removesuffix('.yaml'), job_names())}. "
        f"Give a YAML file or one of: {', '.join(job_names())}."
    )


def _nearest(word: str, names: Sequence[str]) -> str:
    match = nearest_key(word, names)
    return f", did you mean '{match}'?" if match else ""


def _show(path: Path) -> str:
    return f"configs/{path.relative_to(CONFIGS)}" if path.is_relative_to(CONFIGS) else str(path)


# -- reading -----------------------------------------------------------------------------------------------------------


def _read_job(path: Path, seen: tuple[Path, ...]) -> list[_Entry]:
    if path.resolve() in seen:
        raise ConfigError(f"extends = '{path}': {' -> '.join(p.name for p in (*seen, path))} is a circle.")
    entries = list(_read(path, ""))
    base = [e for e in entries if e.key == "extends"]
    if not base:
        return entries
    try:
        file = _find(str(base[0].value), path.parent)
    except ConfigError as error:
        raise ConfigError(f"{base[0]}: {error}") from None
    return _read_job(file, (*seen, path.resolve())) + [e for e in entries if e.key != "extends"]


def _read_preset(chosen: _Entry) -> list[_Entry]:
    name = str(chosen.value)
    path = Path(name) if name.endswith(".yaml") else CONFIGS / "model" / f"{name}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in (CONFIGS / "model").glob("*.yaml"))
        raise ConfigError(
            f"{chosen}: no such model preset{_nearest(name, names)}. "
            f"Give a YAML file of model keys or one of: {', '.join(names)}."
        )
    return [e for e in _read(path, "model.") if e.key != "model.preset"]


def _read(path: Path, prefix: str) -> Iterator[_Entry]:
    """Yield the entries of one file in order; `prefix` is the group its keys belong to."""
    place = _Place(_show(path), 1)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place.file}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{place.file}: {error.strerror}. Give a YAML file that can be read.") from error
    loader, node = _compose(text, str(place.file))
    if node is None:
        return
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{place.of(node).origin}: must be a mapping of keys, such as 'zero: {{stage: 3}}'.")
    seen: dict[str, int] = {}
    for entry in _walk(loader, node, prefix, place):
        if entry.key in seen:
            raise ConfigError(f"{entry}: given before in line {seen[entry.key]}. Keep one of the two.")
        seen[entry.key] = entry.place.line
        yield entry


def _read_overrides(arguments: Sequence[str]) -> Iterator[_Entry]:
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            if not argument.startswith("--") or not rest or rest[0].startswith("--"):
                raise ConfigError(f"override '{argument}': no value. Write key=value, for example train.steps=100.")
            value = rest.pop(0)
        key, value = key.strip(), value.strip()
        known = job_keys().get(key)
        if known is not None and known.type is str and value not in ("", "null", "~") and value[0] not in "'\"":
            yield _Entry(key, value, _Place())  # any text, whatever it means in YAML
            continue
        loader, node = _compose(value, None)
        yield from _entries(loader, key, node or yaml.ScalarNode("tag:yaml.org,2002:null", ""), _Place())


def _compose(text: str, file: str | None) -> tuple[_Loader, yaml.Node | None]:
    try:
        loader = _Loader(text)
        return loader, loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if file and mark else file or f"override value '{text}'"
        hint = " Indent with spaces, not tabs." if "\\t" in (error.problem or "") else ""
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}.{hint}") from error
    except yaml.YAMLError as error:
        where = file or f"override value '{text}'"
        raise ConfigError(f"{where}: not valid YAML: {str(error).splitlines()[0]}.") from error


def _walk(loader: _Loader, node: yaml.MappingNode, prefix: str, place: _Place) -> Iterator[_Entry]:
    _refuse_duplicates(node, prefix, place)
    loader.flatten_mapping(node)  # resolves "<<: *anchor"
    for key_node, value_node in node.value:
        yield from _entries(loader, prefix + str(key_node.value), value_node, place.of(key_node))


def _entries(loader: _Loader, path: str, node: yaml.Node, place: _Place) -> Iterator[_Entry]:
    keys, groups = job_keys(), job_groups()
    leaf = keys.get(_leaf_path(path))
    if leaf is not None or (path == "extends" and place.file):
        text = leaf is None or leaf.type is str
        if text and isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":null"):
            yield _Entry(path, node.value, place)  # 007 and no are text here
        else:
            yield _Entry(path, _read_size(leaf, _construct(loader, node, path, place)), place)
    elif path in groups:
        if isinstance(node, yaml.MappingNode):
            yield from _walk(loader, node, f"{path}.", place)
        elif not node.tag.endswith(":null"):
            entry = _Entry(path, _construct(loader, node, path, place), place)
            members = ", ".join(k.removeprefix(f"{path}.") for k in keys if k.startswith(f"{path}."))
            raise ConfigError(f"{entry}: this is a group of keys. Give one of them: {members}.")
    else:
        match = nearest_key(path, [*keys, *groups])
        guess = f", did you mean '{match}'?" if match else "."
        raise ConfigError(f"{path}{place}: no such key{guess} All keys: windlass config show JOB.")


def _construct(loader: _Loader, node: yaml.Node, path: str, place: _Place) -> Any:
    try:
        _refuse_duplicates(node, f"{path}.", place)
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}{place}: {problem}.") from error


def _read_size(key: Key | None, value: Any) -> Any:
    """Return 80e9 as a whole number, and "80GB" or "64 GiB" as bytes where bytes are wanted."""
    if key is not None and key.type is int:
        if isinstance(value, str) and key.metadata.get("unit") == "bytes":
            value = read_bytes(value) or value
        if isinstance(value, float) and value.is_integer():
            return int(value)
    return value


def read_bytes(text: str) -> float | None:
    """Return the number of bytes that a text such as 80GB or 64 GiB says; None if it says none."""
    size = re.fullmatch(SIZE_PATTERN, text)
    return float(size[1]) * (1024 if size[3] else 1000) ** ("kmgt".index(size[2].lower()) + 1) if size else None


def _refuse_duplicates(node: yaml.Node, prefix: str, place: _Place) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if str(key_node.value) in seen:
                raise ConfigError(
                    f"{prefix}{key_node.value}{place.of(key_node)}: given before in line {seen[key_node.value]}. "
                    "Keep one of the two."
                )
            seen[str(key_node.value)] = line


def _leaf_path(path: str) -> str:
    """Return the key that a path belongs to: itself, or the dictionary-valued key that it reaches into."""
    keys = job_keys()
    parts = path.split(".")
    heads = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((head for head in heads if head in keys and keys[head].is_dict), path)


# -- values ------------------------------------------------------------------------------------------------------------


def _defaults() -> DictConfig:
    tree = OmegaConf.structured(JobConfig)
    for group in ("", *job_groups()):
        OmegaConf.set_readonly(OmegaConf.select(tree, group) if group else tree, False)
    derived = JobConfig()
    for path, key in job_keys().items():
        if value_at(derived, path) != key.default:  # back to what lets the dataclass derive it from the final values
            OmegaConf.update(tree, path, key.default, merge=False)
    return tree


def _assign(tree: DictConfig, entry: _Entry) -> None:
    head = _leaf_path(entry.key)
    try:
        if head != entry.key and OmegaConf.select(tree, head) is None:
            OmegaConf.update(tree, head, {})
        OmegaConf.update(tree, entry.key, entry.value, merge=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{entry}: must be {type_text(job_keys()[head])}.") from error


def _freeze(tree: DictConfig) -> JobConfig:
    try:
        config = cast(JobConfig, OmegaConf.to_object(tree))
        return replace(config, model=resolve_model(config.model)) if config.model.hf_folder else config
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}.") from error


def _plain(value: Any) -> Any:
    """Return a value with lists for tuples."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
