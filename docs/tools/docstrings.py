"""Translate conventions for mkdocstrings: sections `Example` and `Source`, references as [`MultiMix`], defaults."""

from __future__ import annotations

import importlib
import re
from copy import copy
from typing import Any

from griffe import AliasResolutionError, Attribute, Class, ExprCall, Extension, Module, NameResolutionError, Object

REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\[|\()")
BARE_DOCTEST = re.compile(r"(^|\n)((?:>>> .*)(?:\n.+)*)")  # outside of sections; griffe handles those in sections
SOURCE = re.compile(r"^( *)Source:((?: .*)?(?:\n\1 +\S.*)*)\n?", re.MULTILINE)
ELSEWHERE = {"transformers.Trainer": "https://huggingface.co/docs/transformers/main_classes/trainer"}


class Docstrings(Extension):
    """Griffe extension that rewrites docstrings before they are parsed."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        """Show only the default of a method's field, without its help text for the command line."""
        if isinstance(attr.value, ExprCall) and str(attr.value.function) == "setting":
            attr.value = attr.value.arguments[0]

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Show the defaults that a method sets in its constructor instead of None, which selects them."""
        modules = [found for found in pkg["methods"].members.values() if not found.is_alias and found.is_module]
        for cls in (cls for module in modules for cls in module.members.values() if not cls.is_alias and cls.is_class):
            _show_defaults(cls)

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute after its module is loaded."""
        if obj.docstring is None or obj.is_alias:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        text = SOURCE.sub(lambda match: f"{match[1]}**Source:** {' '.join(match[2].split())}\n", text)
        text = BARE_DOCTEST.sub(r"\1\n```pycon\n\2\n```\n", text)
        obj.docstring.value = REFERENCE.sub(lambda match: _reference(obj, *match.groups()), text)


def _show_defaults(cls: Class) -> None:
    module, _, name = cls.path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if not getattr(found, "defaults", None):
        return
    made, parameters = found(), cls.members["__init__"].parameters
    for parameter in list(parameters):
        value = getattr(made, parameter.name, None)
        if str(parameter.default) == "None" and value is not None:
            parameters[parameter.name] = copy(parameter)  # the parent class has the same object
            parameters[parameter.name].default = repr(value)


def _reference(obj: Object, short: str, name: str) -> str:
    shown = name.rsplit(".", 1)[-1] if short else name
    if name in ELSEWHERE:
        return f"[`{shown}`]({ELSEWHERE[name]})"
    try:
        target = obj.resolve(name)
        found = obj.modules_collection[target]
        if found.is_module and found.name in found.members:
            target += f".{found.name}"  # a function with the name of its module
    except (NameResolutionError, AliasResolutionError, KeyError):
        target = name  # a full path; otherwise the strict build fails
    return f"[`{shown}`][{target}]"
