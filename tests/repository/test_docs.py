"""Pages of the documentation: links exist, code compiles, printed output is correct, command lines parse."""

import argparse
import ast
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path

import blocks
import figures
import notebook
import pytest
import torch
from kornia import augmentation
from markdown_it import MarkdownIt
from PIL import Image

import mm_hf
from mm_hf.comparison import as_methods
from mm_hf.methods import METHODS
from tests.helpers import digits

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
MARKDOWN = MarkdownIt("commonmark").enable("table")


def each_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))(test)


def tokens_of(page):
    """Yield all tokens of a page, including those in paragraphs and cells."""
    for token in MARKDOWN.parse(page.read_text()):
        yield token
        yield from token.children or ()


def anchors_of(page):
    """Return the anchors of a page's headings, as on GitHub and on the site."""
    names = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\{.*\}|`", "", name)).strip().lower() for name in names]
    return {name.replace(" ", "-") for name in plain}


@each_page
def test_links_and_images_exist(page):
    for token in tokens_of(page):
        target = token.attrGet("href") or token.attrGet("src")
        if target is None or re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if file.suffix == ".png":
            Image.open(file).verify()
        if anchor and "api" not in file.parts:  # checked by the strict build of the site
            assert anchor in anchors_of(file), f"{page.name}: {target}"


@each_page
def test_code_compiles_and_its_imports_exist(page):
    for block in blocks.blocks_of(page.read_text()):
        ours = {
            match for line in re.findall(r"from mm_hf import (.*)", block.code) for match in re.findall(r"\w+", line)
        }
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("mm_hf", "transformers", "kornia"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
            call = node.func if isinstance(node, ast.Call) else None
            if isinstance(call, ast.Name) and call.id in ours:
                known = inspect.signature(getattr(mm_hf, call.id)).parameters
                named = {keyword.arg for keyword in node.keywords} - {None}
                open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
                assert open_ended or named <= set(known), ast.unparse(node)


def commands_of(page):
    """Yield the command lines of a page, with continued lines joined."""
    for token in tokens_of(page):
        if token.type == "fence" and token.info in ("", "bash", "sh", "console"):
            yield from token.content.replace("\\\n", "").splitlines()
        elif token.type == "code_inline":
            yield token.content.replace("\n", " ")


class Parsed(Exception):  # noqa: N818
    """The result of a command's parser, raised to stop the command."""


def check_command(command, monkeypatch):
    """Parse the arguments of a command of this repository, and stop. Return False for other commands."""
    if not re.match(r"(?:[A-Z_]+=\S* )*(mm-hf|python|make) ", command):
        return False
    if re.match(r"mm-hf \w+:", command):  # output of a command
        return False
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "make":
        targets = re.findall(r"^([\w -]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert "=" in words[1] or words[1] in " ".join(targets).split(), command
        return True
    if words[0] == "mm-hf":
        if not words[1].isalpha() or not words[1].islower():  # a placeholder, or --version
            return False
        start = importlib.import_module(f"mm_hf.cli.{words[1]}").main
    elif words[1] == "-m" and words[2].startswith("benchmarks."):
        words = words[1:]
        package = (ROOT / words[1].replace(".", "/")).is_dir()
        start = importlib.import_module(words[1] + ".__main__" * package).main
    elif words[1].endswith(".py"):
        assert (ROOT / words[1]).exists(), command
        start = getattr(importlib.import_module(Path(words[1]).stem), "main", None)
    else:
        return False
    rest = words[2:]
    if start is None or not rest:
        return True
    if rest[0].endswith((".yaml", ".md")):
        assert words[0] == "mm-hf" or (ROOT / rest[0]).exists(), command
        return True

    is_script = Path(words[1]).stem.startswith("run_")  # an example script
    if words[0] == "mm-hf" or is_script:
        module = importlib.import_module("mm_hf.cli.scripts.options" if is_script else f"mm_hf.cli.{words[1]}")
        parse = module.parse

        def parse_and_stop(*args, **settings):
            raise Parsed(parse(*args, **settings))

        monkeypatch.setattr(module, "parse", parse_and_stop)
    else:
        parse = argparse.ArgumentParser.parse_known_args

        def parse_and_stop(parser, args=None, namespace=None):
            found = parse(parser, rest if args is None else args, namespace)
            if parser.add_help:
                raise Parsed(*found)
            return found

        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    monkeypatch.setattr("sys.argv", words[1:])
    try:
        start(rest) if words[0] == "mm-hf" else inspect.unwrap(start)()
    except Parsed as found:
        monkeypatch.undo()
        values, *others = found.args
        if words[0] != "mm-hf":
            assert is_script or not others[0], f"{command}: {others[0]}"
        elif "methods" in values:
            as_methods(values["methods"])
        return True
    except (SystemExit, ValueError):
        monkeypatch.undo()
        if not any(re.fullmatch(r"[A-Z_]+|\.\.\.", word) for word in words):  # placeholders are not valid values
            raise
        return False
    raise AssertionError(f"{command}: nothing was parsed")


@each_page
def test_command_lines_parse(page, monkeypatch):
    if page.name == "errors.md":
        pytest.skip("lists invalid command lines, which test_errors_page.py runs")
    for command in commands_of(page):
        check_command(command, monkeypatch)


def test_wrong_command_line_fails(monkeypatch):
    assert check_command("mm-hf compare --dataset_name digits --methods erm --num_train_epochs 3", monkeypatch)
    assert check_command("python examples/demo.py --seeds 3", monkeypatch)
    assert check_command(
        "python examples/run_image_classification.py --mixing multimix --num_mixed 5 --output_dir x", monkeypatch
    )
    assert not check_command("pip install torch", monkeypatch)
    for wrong in ("mm-hf compare --data digits", "python examples/demo.py --runs 3", "make everything"):
        with pytest.raises((AssertionError, SystemExit, ValueError)):
            check_command(wrong, monkeypatch)


def run_page(name, directory, monkeypatch):
    """Run the code of a page in a temporary directory, and compare its output with the page, except for numbers."""
    monkeypatch.chdir(directory)
    for block, printed in blocks.run((DOCS / name).read_text(), name):
        if block.printed is not None:
            assert layout_of(printed) == layout_of(block.printed), f"{name}, line {block.line}"
        yield block, printed


def layout_of(printed):
    """Return printed text without its numbers and their padding."""
    return re.sub(r"\s+", " ", re.sub(r"-?\d[\d.,e+-]*", "0", printed)).strip()


@pytest.mark.end_to_end
def test_tutorial_prints_the_documented_output(tmp_path, monkeypatch):
    run = list(run_page("tutorial.md", tmp_path, monkeypatch))
    cells = json.loads((DOCS / "tutorial.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert code == [block.code.strip("\n") for block, _ in run]  # the cells of the notebook ran in their order
    printed = [printed for _, printed in run]
    found = [re.fullmatch(r"accuracy ([\d.]+), NLL ([\d.]+)\n", text) for text in printed]
    accuracy, nll = zip(*[map(float, match.groups()) for match in found if match], strict=True)
    assert len(accuracy) == 2 and min(accuracy) > 0.85
    assert nll[1] < nll[0]  # the regime in which mixing helps
    assert Image.open(tmp_path / "outputs" / "tutorial" / "attention.png").width > 800
    assert "same logits: True" in "".join(printed)


def test_notebook_is_up_to_date():
    """`make figures` writes the notebook."""
    page = (DOCS / "tutorial.md").read_text()
    found = json.loads((DOCS / "tutorial.ipynb").read_text())
    assert found == notebook.notebook_of(page)
    outputs = ["".join(out["text"]) for cell in found["cells"] for out in cell.get("outputs", ())]
    assert outputs == [block.printed for block in blocks.blocks_of(page) if block.printed is not None]
    text = ["".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "markdown"]
    assert all(heading in "\n".join(text) for heading in re.findall(r"^#+ .*$", page, flags=re.MULTILINE))


def test_page_on_models_prints_the_documented_output(tmp_path, monkeypatch):
    taught = importlib.import_module("mm_hf.locations.registry")
    monkeypatch.setattr(taught, "_registered", {})
    assert len(list(run_page("your_model.md", tmp_path, monkeypatch))) == 4
    assert taught.is_registered("smooth maximum")


def test_method_page_runs(tmp_path, monkeypatch):
    assert len(list(run_page("method.md", tmp_path, monkeypatch))) == 1


def test_mixup_or_cutmix_of_the_migration_page_trains(tmp_path):
    found = [
        block for block in blocks.blocks_of((DOCS / "migration.md").read_text()) if "class MixupOrCutMix" in block.code
    ]
    namespace = {}
    exec(compile(found[0].code, "migration.md", "exec", dont_inherit=True), {**namespace, "__name__": __name__})
    method = mm_hf.get_method("mixup_or_cutmix")
    chosen = {type(method(prob=0.5).for_batch({}, torch.arange(4))).__name__ for _ in range(60)}
    METHODS.pop("mixup_or_cutmix")
    assert chosen == {"ERM", "Mixup", "CutMix"}
    trainer = mm_hf.MultiMixTrainer(
        digits.vit(), digits.arguments(tmp_path), mixing=method(), train_dataset=digits.dataset()
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert logged & {"loss_mixup", "loss_cutmix"}


def test_migration_page_names_arguments_of_kornia():
    page = (DOCS / "migration.md").read_text()
    section = page[page.index("## From kornia") : page.index("## From OpenMixup")]
    known = {
        *inspect.signature(augmentation.RandomMixUpV2).parameters,
        *inspect.signature(augmentation.RandomCutMixV2).parameters,
    }
    named = re.findall(r"^\| (.*?) \|", section, flags=re.MULTILINE)
    arguments = {name for cell in named for name in re.findall(r"`(?:\w+\()?(\w+)(?:=|`)", cell)} - {
        "use_correct_lambda"
    }
    assert {"p", "num_mix", "cut_size", "same_on_batch"} <= arguments <= known


def test_figures_show_the_factors_of_the_methods(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name, k in [("Mixup", None), ("MultiMix (default)", 3), ("effective_examples = 10", 10)]:
        factors = figures.factors_of(figures.MIXED_BY[name], 64, generator)
        torch.testing.assert_close(factors.sum(dim=0), torch.ones(factors.shape[1]))
        assert k is None or figures.effective_number(factors) == pytest.approx(k, rel=0.05)
    assert figures.effective_number(torch.eye(5)) == 1 and figures.effective_number(
        torch.full((5, 3), 0.2)
    ) == pytest.approx(5)
    model = digits.vit().eval()
    pixels = torch.stack([row["pixel_values"] for row in digits.dataset(0, 6)])
    seen = mm_hf.extract(model, pixel_values=pixels)
    images = pixels[:, 0].numpy() / 2 + 0.5
    figures.draw_factors(tmp_path / "factors.png")
    figures.draw_simplex(tmp_path / "simplex.png", images)
    figures.draw_identity(tmp_path / "identity.png", model, pixels)
    figures.draw_dense(tmp_path / "dense.png", images, torch.tensor([0, 1, 2, 3, 4, 5]), seen, "abcdefghij")
    for path in tmp_path.iterdir():
        assert Image.open(path).width == 2070
        assert (DOCS / "images" / path.name).exists()


def test_reference_has_all_public_names():
    told = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    for name in mm_hf.__all__:
        if name != "__version__":
            home = getattr(mm_hf, name).__module__
            packages = [home.rsplit(".", n)[0] for n in range(home.count("."))]
            assert any(f"::: {path}\n" in told for path in (f"mm_hf.{name}", *packages, "mm_hf.functional")), name
