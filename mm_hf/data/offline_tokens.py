"""Text with a label per token that needs no download: Python's standard library, labeled with Python's parser."""

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

# Modules that all supported versions of Python have. The splits share none.
MODULES = {
    "train": "argparse bdb calendar code codecs configparser contextlib copy csv dataclasses difflib fileinput "
    "fractions ftplib functools getpass gettext glob gzip heapq imaplib inspect ipaddress mailbox mimetypes netrc "
    "optparse os pickle plistlib pprint profile pstats random sched shlex shutil socket statistics stat subprocess "
    "tarfile trace typing",
    "test": "cmd compileall datetime enum filecmp graphlib hashlib hmac queue selectors shelve smtplib socketserver "
    "tempfile textwrap threading timeit uuid weakref zipapp",
}
TYPES = ("CLASS", "DECORATOR", "EXCEPTION", "FUNCTION", "IMPORT", "PARAMETER")
TAGS = ("O", *(f"{place}-{kind}" for kind in TYPES for place in "BI"))
SKIPPED = {tokenize.COMMENT, tokenize.NL, token.INDENT, token.DEDENT, token.ENDMARKER}
MAX_PASSAGE, MAX_LINE, MAX_TOKEN = 32, 96, 24  # tokens, tokens, characters
DEFINITIONS, FROM = {"def": "FUNCTION", "class": "CLASS"}, "from"


def load_stdlib() -> DatasetDict:
    """Load code passages of the standard library of the running Python.

    The columns are `tokens`, `ner_tags` and `module`; the splits `train` and `test` share no modules. The tags (BIO)
    mark spans of defined names (CLASS, FUNCTION, PARAMETER), dotted names of DECORATORs, modules after import or from
    (IMPORT), and raised or caught exceptions (EXCEPTION). Passages without tags, about half of them, are omitted.
    """
    features = Features(
        tokens=List(Value("string")), ner_tags=List(ClassLabel(names=list(TAGS))), module=Value("string")
    )
    splits = {}
    for split, modules in MODULES.items():
        rows = [
            {"tokens": tokens, "ner_tags": tags, "module": module}
            for module in modules.split()
            for tokens, tags in passages(tagged_lines(read_module(module)))
            if set(tags) != {"O"}
        ]
        splits[split] = Dataset.from_list(rows, features=features)
    return DatasetDict(splits)


def read_module(name: str) -> str:
    """Return the source code of a module of the standard library.

    Raises:
        FileNotFoundError: The standard library is installed without its source code.
    """
    path = Path(sysconfig.get_path("stdlib")) / f"{name}.py"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: this Python is installed without the source code of its standard library. Use "
            "another Python, or your own data with --train_file."
        )
    with tokenize.open(path) as file:
        return file.read()


def tagged_lines(source: str) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the tokens and tags of each logical line without comments. Long tokens, such as strings, are truncated.

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
            yield [part.string.strip()[:MAX_TOKEN] for part in line], _tags(line, starts)
            line = []


def passages(lines: Iterator[tuple[list[str], list[str]]]) -> Iterator[tuple[list[str], list[str]]]:
    """Join consecutive lines into passages of at most 32 tokens; a longer line is a passage. Omit very long lines."""
    tokens: list[str] = []
    tags: list[str] = []
    for more_tokens, more_tags in lines:
        if len(more_tokens) > MAX_LINE:  # tables of data
            continue
        if tokens and len(tokens) + len(more_tokens) > MAX_PASSAGE:
            yield tokens, tags
            tokens, tags = [], []
        tokens, tags = tokens + more_tokens, tags + more_tags
    if tokens:
        yield tokens, tags


def _starts(source: str) -> Iterator[tuple[tuple[int, int], str]]:
    """Yield the position (line, column) of the first token of each span, and the type of the span."""
    lines = [line.encode() for line in source.split("\n")]
    for node in ast.walk(ast.parse(source)):
        for kind, name in _names(node):
            if isinstance(name, ast.Call):  # @f(x), raise E(x)
                name = name.func
            if kind == FROM or _is_dotted(name):
                yield (name.lineno, len(lines[name.lineno - 1][: name.col_offset].decode())), kind


def _names(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """Yield the types and nodes of the spans of a node. Names after def, class and from have no nodes: see `_tags`."""
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
    """Return a tag for each token. A span is a name and the names joined to it by dots."""
    tags: list[str] = []
    kind = next_kind = ""  # types of the current span and of the span that the next name begins
    before = ""
    for part in line:
        is_name = part.type == token.NAME
        if kind and (part.string == "." or (before == "." and is_name)):
            tags.append(f"I-{kind}")
        else:
            kind = starts.get(part.start, "")
            if kind == FROM or part.string in DEFINITIONS:
                kind, next_kind = "", DEFINITIONS.get(part.string, "IMPORT")
            elif part.string == "import":
                next_kind = ""
            elif next_kind and is_name:
                kind, next_kind = next_kind, ""
            tags.append(f"B-{kind}" if kind else "O")
        before = part.string
    return tags


OFFLINE = {"stdlib": load_stdlib}
