"""How the docstrings' conventions are told to mkdocstrings: sections named `Example`, references such as [`MultiMix`]."""

from __future__ import annotations

import re
from typing import Any

from griffe import AliasResolutionError, Attribute, ExprCall, Extension, NameResolutionError, Object

REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?!\[|\()")
BARE_DOCTEST = re.compile(r"(^|\n)((?:>>> .*)(?:\n.+)*)")  # outside of a section, where griffe sees to it
ELSEWHERE = {"transformers.Trainer": "https://huggingface.co/docs/transformers/main_classes/trainer"}


class Docstrings(Extension):
    """Rewrites docstrings before they are parsed."""

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        """Fields of methods: the default alone, without the help text that a command line shows of it."""
        if isinstance(attr.value, ExprCall) and str(attr.value.function) == "setting":
            attr.value = attr.value.arguments[0]

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Once for each module, class, function and attribute, when all of its module is known."""
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
            target += f".{found.name}"  # a function that has the name of its file
    except (NameResolutionError, AliasResolutionError, KeyError):
        target = name  # a full path; if it is none, the strict build says so
    return f"[`{shown}`][{target}]"
