"""Real pairs of texts that need no download: functions of Python's standard library and what their docstrings say."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from offline_tokens import MODULES, read_module

OFFLINE = ("stdlib_docs",)


def load_offline(name: str) -> DatasetDict:
    """A data set of `OFFLINE` by name, with a `train` and a `test` split."""
    if name == "stdlib_docs":
        return load_stdlib_docs()
    raise ValueError(f"There is no offline data set {name!r}. There are {', '.join(OFFLINE)}.")


def load_stdlib_docs() -> DatasetDict:
    """Is it this function that the text is about? Splits by module: `sentence1`, `sentence2`, `label` and `module`.

    Of the documented functions of a module every second one keeps the first paragraph of its docstring; the others exchange
    theirs among each other. No paragraph comes twice, so that it alone does not tell whether it is where it belongs.
    """
    features = Features(
        sentence1=Value("string"),
        sentence2=Value("string"),
        label=ClassLabel(names=["other", "same"]),
        module=Value("string"),
    )
    splits = {}
    for split, modules in MODULES.items():
        rows = []
        for module in modules.split():
            found = {text: head for head, text in documented(read_module(module))}
            texts, heads = list(found), list(found.values())
            order = np.random.default_rng(0).permutation(len(texts))
            kept, moved = order[::2], order[1::2]
            if len(moved) == 1:  # nothing to exchange with
                kept, moved = order, order[:0]
            rows += [{"sentence1": heads[i], "sentence2": texts[i], "label": 1, "module": module} for i in kept]
            rows += [
                {"sentence1": heads[i], "sentence2": texts[j], "label": 0, "module": module}
                for i, j in zip(moved, np.roll(moved, 1))
            ]
        splits[split] = Dataset.from_list(rows, features=features)
    return DatasetDict(splits)


def documented(source: str) -> Iterator[tuple[str, str]]:
    """The head of each function or class that has a docstring, and the docstring's first paragraph.

    Example:
        >>> list(documented("class A:\\n  def f(self, *x, y=1):\\n    '''Add\\n    x.\\n\\n    More.'''"))
        [('def f(self, *x, y)', 'Add x.')]
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if text and isinstance(node, ast.ClassDef):
                yield f"class {node.name}", text
            elif text:
                yield f"def {node.name}({', '.join(_parameters(node))})", text  # type: ignore[arg-type]


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = node.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [argument.arg for argument in given.kwonlyargs]
    return names + ([f"**{given.kwarg.arg}"] if given.kwarg else [])
