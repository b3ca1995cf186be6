"""Translate docstring conventions for mkdocstrings: sections named `Example`, references such as [`MultiMix`]."""

from __future__ import annotations

import re
from typing import Any

from griffe import AliasResolutionError, Attribute, ExprCall, Extension, NameResolutionError, Object

REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\[|\()")
BARE_DOCTEST = re.compile(r"(^|\n)((?:>>> .*)(?:\n.+)*)")  # outside of sections; griffe handles those in sections
ELSEWHERE = {"transformers.Trainer": "https://huggingface.co/docs/transformers/main_classes/trainer"}


class Docstrings(Extension):
    """Griffe extension that rewrites docstrings before they are parsed."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        """Show only the default of a method's field, without its help text for the command line."""
        if isinstance(attr.value, ExprCall) and str(attr.value.function) == "setting":
            attr.value = attr.value.arguments[0]

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute after its module is loaded."""
        if obj.docstring is None or obj.is_alias:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        text = BARE_DOCTEST.sub(r"\1\n```pycon\n\2\n```\n", text)
        obj.docstring.value = REFERENCE.sub(lambda match: _reference(obj, *match.groups()), text)


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
