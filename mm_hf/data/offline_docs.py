"""Pairs of texts that need no download: functions of Python's standard library and their docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from .offline_tokens import MODULES, read_module


def load_stdlib_docs() -> DatasetDict:
    """Load pairs of a function signature and a docstring paragraph that belongs to the same or to another function.

    The columns are `sentence1`, `sentence2`, `label` and `module`; the splits `train` and `test` share no modules. In
    each module, half of the documented functions keep the first paragraph of their docstrings and the others exchange
    theirs. No paragraph occurs twice, so that the label cannot be predicted from the paragraph alone.
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
            if len(moved) == 1:  # there is no other paragraph to exchange with
                kept, moved = order, order[:0]
            rows += [{"sentence1": heads[i], "sentence2": texts[i], "label": 1, "module": module} for i in kept]
            rows += [
                {"sentence1": heads[i], "sentence2": texts[j], "label": 0, "module": module}
                for i, j in zip(moved, np.roll(moved, 1))
            ]
        splits[split] = Dataset.from_list(rows, features=features)
    return DatasetDict(splits)


def documented(source: str) -> Iterator[tuple[str, str]]:
    """Yield the signature of each function or class that has a docstring, and the docstring's first paragraph.

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


OFFLINE = {"stdlib_docs": load_stdlib_docs}
