"""Real text with labels of each token that needs no download: Python's standard library and what its parser says of it."""

from __future__ import annotations

import ast
import io
import sysconfig
import token
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

OFFLINE = ("stdlib",)
# Modules that all versions of Python have that mm_hf supports; the splits share none.
MODULES = {
    "train": "argparse bdb calendar code codecs configparser contextlib copy csv dataclasses difflib fileinput fractions "
    "ftplib functools getpass gettext glob gzip heapq imaplib inspect ipaddress mailbox mimetypes netrc optparse os "
    "pickle plistlib pprint profile pstats random sched shlex shutil socket statistics stat subprocess tarfile trace "
    "typing",
    "test": "cmd compileall datetime enum filecmp graphlib hashlib hmac queue selectors shelve smtplib socketserver "
    "tempfile textwrap threading timeit uuid weakref zipapp",
}
TYPES = ("CLASS", "DECORATOR", "EXCEPTION", "FUNCTION", "IMPORT", "PARAMETER")
TAGS = ("O", *(f"{place}-{kind}" for kind in TYPES for place in "BI"))
SKIPPED = {tokenize.COMMENT, tokenize.NL, token.INDENT, token.DEDENT, token.ENDMARKER}
BLOCK, LONGEST_LINE, LONGEST_TOKEN = 32, 96, 24
DEFINITIONS, FROM = {"def": "FUNCTION", "class": "CLASS"}, "from"


def load_offline(name: str) -> DatasetDict:
    """A data set of `OFFLINE` by name, with a `train` and a `test` split."""
    if name == "stdlib":
        return load_stdlib()
    raise ValueError(f"There is no offline data set {name!r}. There are {', '.join(OFFLINE)}.")


def load_stdlib() -> DatasetDict:
    """Blocks of code of the running Python's standard library, split by module: `tokens`, `ner_tags` and `module`.

    The tags (BIO) are spans of the names that are being defined (CLASS, FUNCTION, PARAMETER), of the dotted names of
    DECORATORs and of modules after import or from (IMPORT), and of what is raised or caught (EXCEPTION). Blocks with
    none of these, every second one, are left out.
    """
    features = Features(
        tokens=List(Value("string")), ner_tags=List(ClassLabel(names=list(TAGS))), module=Value("string")
    )
    splits = {}
    for split, modules in MODULES.items():
        rows = [
            {"tokens": tokens, "ner_tags": tags, "module": module}
            for module in modules.split()
            for tokens, tags in blocks(tagged_lines(read_module(module)))
            if set(tags) != {"O"}
        ]
        splits[split] = Dataset.from_list(rows, features=features)
    return DatasetDict(splits)


def read_module(name: str) -> str:
    """The source code of a module of the standard library."""
    path = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"The standard library's {name}.py is not at {path}: this Python comes without its source code. Use one that "
            "has it, or your own data by --train_file."
        )
    with tokenize.open(path) as file:
        return file.read()


def tagged_lines(source: str) -> Iterator[tuple[list[str], list[str]]]:
    """Tokens and tags of each logical line, without comments; long tokens, which are strings, are cut.

    Example:
        >>> list(tagged_lines("@a.b\\ndef f(x=1): pass"))[0]
        (['@', 'a', '.', 'b'], ['O', 'B-DECORATOR', 'I-DECORATOR', 'I-DECORATOR'])
    """
    starts = dict(_starts(source))
    line: list[tokenize.TokenInfo] = []
    for part in tokenize.generate_tokens(io.StringIO(source).readline):
        if part.type != token.NEWLINE:
            if part.type not in SKIPPED and part.string.strip():
                line.append(part)
        elif line:
            yield [part.string.strip()[:LONGEST_TOKEN] for part in line], _tags(line, starts)
            line = []


def blocks(lines: Iterator[tuple[list[str], list[str]]]) -> Iterator[tuple[list[str], list[str]]]:
    """Lines that follow each other, put together while they have no more than 32 tokens; tables are left out."""
    tokens: list[str] = []
    tags: list[str] = []
    for more_tokens, more_tags in lines:
        if len(more_tokens) > LONGEST_LINE:
            continue
        if tokens and len(tokens) + len(more_tokens) > BLOCK:
            yield tokens, tags
            tokens, tags = [], []
        tokens, tags = tokens + more_tokens, tags + more_tags
    if tokens:
        yield tokens, tags


def _starts(source: str) -> Iterator[tuple[tuple[int, int], str]]:
    """Where the parser sees a span begin (line and column, as `tokenize` counts them), and its type."""
    lines = [line.encode() for line in source.split("\n")]
    for node in ast.walk(ast.parse(source)):
        for kind, name in _names(node):
            if isinstance(name, ast.Call):  # @f(x), raise E(x)
                name = name.func
            if kind == FROM or _is_dotted(name):
                yield (name.lineno, len(lines[name.lineno - 1][: name.col_offset].decode())), kind


def _names(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """Types and nodes of the spans that a node has. Names after def, class and from have no node: see `_tags`."""
    if isinstance(node, ast.arg):
        yield "PARAMETER", node
    elif isinstance(node, ast.Import):
        yield from (("IMPORT", alias) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield FROM, node
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield from (("DECORATOR", decorator) for decorator in node.decorator_list)
    elif isinstance(node, ast.Raise) and node.exc is not None:
        yield "EXCEPTION", node.exc
    elif isinstance(node, ast.ExceptHandler) and node.type is not None:
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        yield from (("EXCEPTION", name) for name in caught)


def _is_dotted(node: ast.AST) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, (ast.Name, ast.arg, ast.alias))


def _tags(line: list[tokenize.TokenInfo], starts: dict[tuple[int, int], str]) -> list[str]:
    """A tag for each token: a span is the name it starts with and all that follow with a dot between."""
    tags: list[str] = []
    kind = coming = ""  # the type of the span that we are in, and of the one that the next name begins
    before = ""
    for part in line:
        is_name = part.type == token.NAME
        if kind and (part.string == "." or (before == "." and is_name)):
            tags.append(f"I-{kind}")
        else:
            kind = starts.get(part.start, "")
            if kind == FROM or part.string in DEFINITIONS:
                kind, coming = "", DEFINITIONS.get(part.string, "IMPORT")
            elif part.string == "import":
                coming = ""
            elif coming and is_name:
                kind, coming = coming, ""
            tags.append(f"B-{kind}" if kind else "O")
        before = part.string
    return tags
