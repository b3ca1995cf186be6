"""Contents and metadata of a release, and training with its wheel."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import mm_hf

ROOT = Path(__file__).parents[2]
URL = "https://example.org/mm_hf"
NAME = f"mm_hf-{mm_hf.__version__}"
STEP = """
import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
from sklearn.datasets import load_digits
from mm_hf import DenseMultiMix, MultiMixTrainer
import mm_hf
import sys
from importlib.metadata import entry_points, version

sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes))
digits = load_digits()
train = [{"pixel_values": torch.tensor(x / 8 - 1).float()[None], "labels": int(y)}
         for x, y in zip(digits.images[:32], digits.target)]
args = TrainingArguments("out", max_steps=1, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
trainer = MultiMixTrainer(model=model, args=args, mixing=DenseMultiMix(num_mixed=1000), train_dataset=train)
trainer.train()
trainer.save_model()
assert trainer.state.log_history[0]["loss_terms"] == 8 + 16 * 1000
(command,) = entry_points(group="console_scripts", name="mm-hf")
assert command.load()(["--help"]) == 0
print(mm_hf.__file__, version("mm-hf"))
"""


def build(hook, source, directory, **environment):
    """Call a hook of setuptools on a source tree, as pip does, and return the path of the result."""
    directory.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(directory)!r}))"
    environment = {**{k: v for k, v in os.environ.items() if k != "REPOSITORY_URL"}, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, check=True, capture_output=True, text=True
    )
    return directory / done.stdout.splitlines()[-1]


def files(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Copy the repository without files that git ignores."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    copy = tmp_path_factory.mktemp("repository") / "mm_hf"
    return shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", *ignored))


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory):
    """Build and unpack the source archive."""
    directory = tmp_path_factory.mktemp("archive")
    with tarfile.open(build("build_sdist", source, directory / "dist")) as file:
        file.extractall(directory, filter="data")
    return directory / NAME


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory):
    """Build a wheel from the source archive alone, and unpack it, which is what an installation does."""
    directory = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build("build_wheel", archive, directory / "dist")) as file:
        file.extractall(directory / "site")
    return directory / "site"


def metadata(directory):
    return email.message_from_string((directory / "METADATA").read_text("utf-8"))


def test_source_archive_has_all_files_of_the_tests(archive, source):
    there = files(archive)
    for directory in (".ci", ".github", "benchmarks", "docs", "examples", "mm_hf", "tests"):
        assert {f"{directory}/{name}" for name in files(source / directory)} <= there
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "Makefile", "setup.py", "pyproject.toml"} <= there
    assert {"constraints.txt", "constraints-oldest.txt"} <= there


def test_wheel_contains_only_the_package(wheel, source):
    assert "mm_hf/py.typed" in files(wheel)
    assert {path.name for path in wheel.iterdir()} == {"mm_hf", f"{NAME}.dist-info"}
    assert files(wheel / "mm_hf") == files(source / "mm_hf")
    assert (wheel / f"{NAME}.dist-info" / "licenses" / "LICENSE").is_file()


@pytest.mark.distributed
def test_wheel_trains_without_the_repository(wheel, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STEP],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == f"{wheel / 'mm_hf' / '__init__.py'} {mm_hf.__version__}"
    assert "usage: mm-hf COMMAND" in done.stdout
    assert {"model.safetensors", "mixing.json"} <= files(tmp_path / "out")


def test_links_of_the_readme_are_absolute_or_plain_text(wheel, archive, tmp_path):
    """The page on PyPI has no files beside it."""
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / "README.md").read_text("utf-8"))
    assert targets and all((ROOT / target).exists() for target in targets)
    plain = metadata(wheel / f"{NAME}.dist-info")
    assert not re.search(r"\]\((?!https?:)", plain.get_payload())
    assert URL not in str(plain)
    linked = metadata(build("prepare_metadata_for_build_wheel", archive, tmp_path / "meta", REPOSITORY_URL=URL))
    for target in targets:
        assert f"({URL}/blob/v{mm_hf.__version__}/{target})" in linked.get_payload()
    assert linked["Project-URL"] == f"Source, {URL}"


def test_declared_versions_are_tested(wheel):
    declared = metadata(wheel / f"{NAME}.dist-info")
    assert declared["Version"] == mm_hf.__version__
    assert declared["License-Expression"] == "Apache-2.0"
    minors = [line.rpartition(" ")[2] for line in declared.get_all("Classifier") if "Python :: 3." in line]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]["include"]
    assert sorted(minors) == sorted(job["python"] for job in matrix)
    assert declared["Requires-Python"] == f">={minors[0]}"


def pinned(name):
    lines = (ROOT / name).read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {normalized(package): Version(version) for package, version in pins.items()}


def normalized(package):
    return re.sub(r"[-_.]+", "-", package).lower()


def test_lower_bounds_are_the_oldest_tested_versions_and_pins_are_in_range(wheel):
    newest, oldest = pinned("constraints.txt"), pinned("constraints-oldest.txt")
    requirements = [Requirement(line) for line in metadata(wheel / f"{NAME}.dist-info").get_all("Requires-Dist")]
    for requirement in requirements:
        (bound,), name = requirement.specifier, normalized(requirement.name)
        assert bound.operator == ">="
        assert newest[name] in requirement.specifier
        if requirement.marker is None or requirement.marker.evaluate({"extra": "dev"}):
            assert oldest[name] == Version(bound.version), name
