"""Settings: fields of dataclasses with a type, a range and a help text, parsed from text and validated.

The module imports neither torch nor Transformers, and reads dataclasses from their source if importing them would.
Commands parse their options with it, and methods validate their settings.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TRUE, FALSE = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")
ALIASES = {"Count": ("int",), "Alpha": ("float",), "ClassWeights": ("float",)}  # annotations of methods


class Help(str):
    """A help text with the limits of a setting. `HfArgumentParser` passes all other metadata to argparse."""

    limits: Mapping[str, Any] = {}


def setting(default: Any, help: str, *, nargs: str | None = None, **limits: Any) -> Any:
    """Return a dataclass field with the help text of its command-line option.

    Args:
        default: Default value.
        help: Help text.
        nargs: Number of values, as in argparse.
        limits: `within`, the valid interval of a number, such as "[0, 1]" or "(0, inf)"; `words`, valid words besides
            numbers; `requirement`, the end of the error message; `required`, True if there is no default.
    """
    return field(default=default, metadata=described(help, nargs=nargs, **limits))


def described(help: str, *, nargs: str | None = None, **limits: Any) -> dict[str, Any]:
    """Return the metadata of a field, with the arguments of [`setting`]."""
    text = Help(help)
    text.limits = limits
    return {"help": text, **({"nargs": nargs} if nargs else {})}


@dataclass(frozen=True)
class Setting:
    """A field of a dataclass.

    Attributes:
        name: Name of the field.
        types: Names of its types ("bool", "int", "float", "str"); empty if other values are valid, too.
        choices: Valid values, or empty.
        optional: None is a valid value.
        many: The value may be a list.
        single: The value may be something else than a list.
        default: Default value; None if it cannot be read from the source.
        metadata: Metadata and limits of the field.
        kw_only: The field is an argument that is given by its name only. Such fields come last.
    """

    name: str
    types: tuple[str, ...] = ()
    choices: tuple[Any, ...] = ()
    optional: bool = False
    many: bool = False
    single: bool = True
    default: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    kw_only: bool = False

    @property
    def is_flag(self) -> bool:
        """True if the field is True or False."""
        return self.types == ("bool",)

    def parse(self, text: str) -> Any:
        """Return the value that a text on the command line stands for.

        Raises:
            ValueError: The text is no valid value.

        Example:
            >>> Setting("confidence_weighted", ("bool",)).parse("no")
            False
        """
        value: Any = None if self.optional and text in ("null", "None") else self._convert(text)
        self.check(value, shown=text, yes="yes or no")
        return value

    def _convert(self, text: str) -> Any:
        if "bool" in self.types and text.lower() in TRUE + FALSE and "int" not in self.types:
            return text.lower() in TRUE
        if text in map(str, (*self.choices, *self.metadata.get("words", ()))):
            return text
        for kind, convert in (("int", int), ("float", float)):
            if kind in self.types:
                try:
                    return convert(text)
                except ValueError:
                    pass
        return text

    def check(self, value: Any, *, shown: Any = None, yes: str = "True or False") -> None:
        """Raise a ValueError if a value has a wrong type or lies outside of the valid interval."""
        if value is None and self.optional:
            return
        values = value if self.many and isinstance(value, (list, tuple)) else [value]
        if not all(map(self._is_valid, values)):
            raise ValueError(f"{self.name} {self._requirement(yes)}, got {value if shown is None else shown!r}.")

    def _is_valid(self, value: Any) -> bool:
        if isinstance(value, str) and value in self.metadata.get("words", ()):
            return True
        if self.choices:
            return any(value == choice and type(value) is type(choice) for choice in self.choices)
        if not self.types or ("str" in self.types and isinstance(value, str)):
            return True
        if isinstance(value, bool) or ("int" not in self.types and "float" not in self.types):
            return isinstance(value, bool) and "bool" in self.types
        numbers = (int, float) if "float" in self.types else (int,)
        return isinstance(value, numbers) and _is_within(value, self.metadata.get("within", ""))

    def _requirement(self, yes: str) -> str:
        """Return the requirement as the end of a sentence: "must be an integer of at least 1"."""
        if "requirement" in self.metadata:
            return str(self.metadata["requirement"])
        if self.choices:
            return f"must be one of {', '.join(map(str, self.choices))}"
        if self.types == ("bool",):
            return f"must be {yes}"
        noun = "an integer" if "float" not in self.types else "a number"
        interval = self.metadata.get("within", "")
        if not interval:
            requirement = f"must be {noun}"
        else:
            low, high = (float(x) for x in interval[1:-1].split(","))
            if noun == "a number" and interval[-1] == ")":
                noun = "a finite number"
            if high < math.inf:
                requirement = f"must lie in {interval}"
            elif interval[0] == "[":
                requirement = f"must be {noun} of at least {low:g}"
            else:
                requirement = "must be a positive number" if low == 0 else f"must be {noun} greater than {low:g}"
        words = "".join(f" or {word!r}" for word in self.metadata.get("words", ()))
        return requirement + words


def _is_within(value: float, interval: str) -> bool:
    if not interval:
        return True
    low, high = (float(x) for x in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    return above and (value < high if interval[-1] == ")" else value <= high)


def check_settings(instance: Any) -> None:
    """Raise a ValueError if a field of a dataclass has a value of a wrong type or outside of its interval.

    Default values are valid, such as None of a field whose type does not name it.
    """
    for one in settings_of(instance).values():
        value = getattr(instance, one.name)
        if value is not one.default:
            one.check(value)


def required_settings(settings: Mapping[str, Setting]) -> list[str]:
    """Return the names of the settings that have no default."""
    return [name for name, one in settings.items() if one.metadata.get("required")]


def check_required(method: str, settings: Mapping[str, Setting], given: Any) -> None:
    """Raise a ValueError if a setting without a default is not among the given names."""
    missing = [name for name in required_settings(settings) if name not in given]
    if missing:
        raise ValueError(f"{method} requires {', '.join(missing)}: {settings[missing[0]].metadata['help']}")


def settings_of(dataclass_: Any) -> dict[str, Setting]:
    """Return the fields of a dataclass, or of an instance, by name.

    Example:
        >>> from mm_hf import MultiMix
        >>> settings_of(MultiMix)["num_mixed"].metadata["words"]
        ('auto',)
    """
    class_ = dataclass_ if isinstance(dataclass_, type) else type(dataclass_)
    annotations: dict[str, Any] = {}  # not `Field.type`, which HfArgumentParser changes
    for base in reversed(class_.__mro__):
        annotations |= inspect.get_annotations(base)
    found = {}
    for f in sorted(dataclasses.fields(dataclass_), key=lambda f: f.kw_only is True):
        default = f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        annotation = annotations[f.name]
        if not isinstance(annotation, str):
            annotation = annotation.__name__ if type(annotation) is type else str(annotation).replace("typing.", "")
        metadata = {**f.metadata, **getattr(f.metadata.get("help"), "limits", {})}
        found[f.name] = _make(f.name, annotation, None if default is dataclasses.MISSING else default, metadata)
    return found


def _make(
    name: str, annotation: str, default: Any, metadata: Mapping[str, Any], enums: Mapping[str, tuple[str, ...]] = {}
) -> Setting:
    """Read the annotation of a field. Values of annotations with other names than those of types are not checked."""
    types: list[str] = []
    choices: tuple[Any, ...] = tuple(metadata.get("choices") or ())
    optional, many, single, other = False, metadata.get("nargs") in ("+", "*"), False, False
    for part in _alternatives(ast.parse(annotation, mode="eval").body):
        text = ast.unparse(part)
        outer, inner = (ast.unparse(part.value), part.slice) if isinstance(part, ast.Subscript) else (text, None)
        if text == "None":
            optional = True
        elif outer == "Literal" and inner is not None:
            values, single = ast.literal_eval(inner), True
            choices += tuple(values) if isinstance(values, (tuple, list)) else (values,)
        elif outer == "list" and inner is not None:
            many = True
            types += [ast.unparse(inner)]
        elif text in enums:
            choices, single = (*choices, *enums[text]), True
        else:
            single = True
            types += ALIASES.get(text, (text,))
            other = other or text not in ("bool", "int", "float", "str", *ALIASES)
    if choices and any(not isinstance(choice, str) for choice in choices):
        choices, types = (), [*types, "str"]  # a word or a constant, such as False
    if enums and choices:
        types = []
    known = tuple(dict.fromkeys(kind for kind in types if kind in ("bool", "int", "float", "str")))
    return Setting(
        name, () if other and "str" not in known else known, choices, optional, many, single, default, metadata
    )


def _alternatives(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return [*_alternatives(node.left), *_alternatives(node.right)]
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Optional", "Union"):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice, ast.Constant(None)]
        return [inner for part in parts for inner in _alternatives(part)]
    return [node]


# ---- Dataclasses that are read from their source ----


def read_settings(name: str, classes: Mapping[str, ast.ClassDef], enums: Mapping[str, Any] = {}) -> dict[str, Setting]:
    """Return the fields of a dataclass by name, without importing it.

    Args:
        name: Name of the class.
        classes: Definitions of the class and of its base classes, from [`read_classes`].
        enums: Values of enumerations that annotations name.
    """
    found: dict[str, Setting] = {}
    for base in classes[name].bases:
        if isinstance(base, ast.Name) and base.id in classes:
            found |= read_settings(base.id, classes, enums)
    for node in classes[name].body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        annotation = ast.unparse(node.annotation)
        default, metadata = _default_and_metadata(node.value)
        kw_only, _ = bool(metadata.pop("kw_only", False)), metadata.pop("repr", True)
        if not annotation.startswith("ClassVar") and metadata.pop("init", True):
            one = _make(node.target.id, annotation, default, metadata, enums)
            found[one.name] = dataclasses.replace(one, kw_only=kw_only)
    return dict(sorted(found.items(), key=lambda item: item[1].kw_only))


def read_classes(files: Sequence[Path]) -> dict[str, ast.ClassDef]:
    """Return the definitions of the classes in Python files by name."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _default_and_metadata(node: ast.expr | None) -> tuple[Any, dict[str, Any]]:
    """Return the default and the metadata of a field; None stands for a value that is not a constant."""
    if not isinstance(node, ast.Call):
        return _constant(node), {}
    given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    given |= dict(zip(("default", "help"), node.args))
    default = _constant(given.pop("default", None))
    metadata = given.pop("metadata", None)
    if isinstance(metadata, ast.Call):  # described(help, ...)
        given |= {"help": metadata.args[0]}
        given |= {keyword.arg: keyword.value for keyword in metadata.keywords if keyword.arg}
    elif isinstance(metadata, ast.Dict):
        given |= {str(_constant(key)): value for key, value in zip(metadata.keys, metadata.values)}
    return default, {name: _constant(value) for name, value in given.items()}


def _constant(node: ast.expr | None) -> Any:
    if node is None:
        return None
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


@functools.cache
def read_methods() -> dict[str, dict[str, Setting]]:
    """Return the settings of all mixing methods by the name of the method, without importing them.

    Example:
        >>> list(read_methods()["mixup"])
        ['alpha', 'class_weights']
    """
    classes = read_classes(sorted(Path(__file__).parent.glob("*.py")))
    found = {}
    for class_name, node in classes.items():
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and ast.unparse(part.target) == "name" and _constant(part.value):
                found[_constant(part.value)] = read_settings(class_name, classes)
    return dict(sorted(found.items()))


def parse_specification(text: str) -> tuple[str, str, dict[str, str]]:
    """Divide a specification `method`, `method:setting=value,...` or `name=method:setting=value,...` into its parts.

    Returns:
        The name, the method, and the text of each setting.

    Raises:
        ValueError: A setting has no value.

    Example:
        >>> parse_specification("few=multimix:num_mixed=10,alpha=[0.5,2]")
        ('few', 'multimix', {'num_mixed': '10', 'alpha': '[0.5,2]'})
    """
    head, _, tail = text.partition(":")
    name, _, method = head.rpartition("=")
    settings = {}
    for part in re.split(r",(?![^\[]*\])", tail) if tail else []:
        key, equals, value = part.partition("=")
        if not equals or not value.strip():
            raise ValueError(f"methods: {text!r} has {part!r} instead of setting=value.")
        settings[key.strip()] = value.strip()
    return name.strip() or text.strip(), method.strip(), settings


def parse_values(settings: Mapping[str, Setting], texts: Mapping[str, str], method: str) -> dict[str, Any]:
    """Parse the values of a specification; lists are in brackets.

    Raises:
        ValueError: A setting is unknown or its value invalid.
    """
    unknown = [name for name in texts if name not in settings]
    if unknown:
        raise ValueError(
            f"{method} has no setting {unknown[0]}{nearest(unknown[0], settings)}; it has "
            f"{', '.join(settings) or 'none'}."
        )
    found = {}
    for name, text in texts.items():
        one = settings[name]
        if one.many and text.startswith("["):
            try:
                found[name] = json.loads(text)
            except ValueError:
                raise ValueError(f"{name} must be a number or a list such as [0.5,2], got {text!r}.") from None
            one.check(found[name])
        else:
            found[name] = one.parse(text)
    return found


def nearest(name: str, known: Any) -> str:
    """Return `` (did you mean ...?)`` with the known name that is most similar, or an empty string."""
    import difflib

    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
