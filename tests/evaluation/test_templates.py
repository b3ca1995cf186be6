"""Escaping in Markdown, HTML and Python, checked with a Markdown parser, an HTML parser and Python itself."""

import ast
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError
from markdown_it import MarkdownIt
from markupsafe import Markup

from mm_hf.evaluation.templates import code_span, escape_markdown, markdown_table, render

UNUSUAL = (
    "plain",
    "macro_f1",
    "_under_ __init__ a_ _b",
    "*bold* **b** ~~gone~~ $x$",
    "1. first",
    "2)",
    "1.5 -2 +3",
    "-0.5",
    "---",
    "- item",
    "[ ] task",
    "+ item",
    "# heading #",
    "C#",
    "=====",
    "a|b",
    "`code` ``x` `",
    "<script>alert(1)</script>",
    "![x](http://example.org/x.png) [link](y) &amp; <!-- c -->",
    "back\\slash \\* \\",
    "quote \" and '",
    "line\nbreak\r\n\r\n# not a heading",
)


def one_line(text):
    return " ".join(text.split())


def inline(tokens):
    """Return the text of rendered Markdown, and the types of everything in it that is not text."""
    children = [child for token in tokens for child in token.children or []]
    return "".join(child.content for child in children), {child.type for child in children} - {"text", "text_special"}


@pytest.mark.parametrize("text", UNUSUAL)
def test_escaped_markdown_displays_the_text_unchanged(text):
    for before in ("", "- ", "# ", "a paragraph that says "):
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(f"{before}{escape_markdown(text)}")
        shown, markup = inline(tokens)
        assert shown == (before if before.startswith("a") else "") + one_line(text)
        assert not markup
        assert {token.tag for token in tokens} <= {"", "p", "ul", "li", "h1"} and len(tokens) <= 7
        assert ("h1" in {token.tag for token in tokens}) == before.startswith("#")


@pytest.mark.parametrize("text", UNUSUAL)
def test_a_code_span_displays_the_text_unchanged(text):
    (paragraph,) = [t for t in MarkdownIt().parse(f"x {code_span(text)} y") if t.type == "inline"]
    assert [child.type for child in paragraph.children] == ["text", "code_inline", "text"]
    assert paragraph.children[1].content == one_line(text)


def test_a_table_has_the_cells_that_were_given():
    rows = [[text, code_span(text), i] for i, text in enumerate(UNUSUAL)]
    table = markdown_table(["text", "*", "n"], rows, "llr")
    tokens = MarkdownIt("commonmark").enable("table").parse(table)
    cells = [inline([token])[0] for token in tokens if token.type == "inline"]
    expected = [cell for text, _, i in rows for cell in (one_line(text), one_line(text), str(i))]
    assert cells == ["text", "*", "n", *expected]
    styles = [token.attrs.get("style") for token in tokens if token.type == "td_open"]
    assert styles == [None, None, "text-align:right"] * len(rows)


def test_a_table_of_markdown_is_not_escaped():
    assert markdown_table(["a"], [["**b**|"]], escape=False).splitlines()[-1] == "| **b**\\| |"
    assert markdown_table(["a"], [[Markup("**b**")]]).splitlines()[-1] == "| **b** |"
    with pytest.raises(ValueError, match="must have 2 entries, one for each heading"):
        markdown_table(["a", "b"], [["c"]])


def template(directory, format, text):
    path = directory / f"page.{format}.jinja"
    path.write_text(text)
    return path


class Texts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.texts, self.tags = [], []

    def handle_data(self, data):
        self.texts.append(data)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *[value for _, value in attributes]))


@pytest.mark.parametrize("text", UNUSUAL)
def test_templates_escape_values_for_their_format(tmp_path, text):
    macros = "{% macro p() %}{{ caller() }}{% endmacro %}"
    html = render(
        template(tmp_path, "html", f'{macros}<p title="{{{{ x }}}}">{{% call p() %}}{{{{ x | code }}}}{{% endcall %}}'),
        x=text,
    )
    page = Texts()
    page.feed(html)
    assert page.tags == [("p", text), ("code",)] and "".join(page.texts) == text
    markdown = render(
        template(tmp_path, "md", f"{macros}*{{% call p() %}}{{{{ x }}}} {{{{ x | code }}}}{{% endcall %}}*"), x=text
    )
    assert markdown == f"*{escape_markdown(text)} {code_span(text)}*"
    python = render(template(tmp_path, "py", "f({{ x }}, {{ y }})"), x=text, y=Markup("name"))
    call = ast.parse(python).body[0].value
    assert call.args[0].value == text and call.args[1].id == "name"


def test_numbers_are_not_escaped_and_missing_variables_are_errors(tmp_path):
    path = template(tmp_path, "md", "{{ x }}")
    assert render(path, x=-1.5) == "-1.5"
    with pytest.raises(UndefinedError, match="'x' is undefined"):
        render(path)
