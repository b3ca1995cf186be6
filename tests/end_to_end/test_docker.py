"""The Dockerfile without Docker: general rules, and (slow) its instructions executed in a new directory."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def instructions():
    """Return pairs of an instruction and its arguments, with continued lines joined and comments removed."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    return [
        (word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def arguments_of(word):
    return [rest for found, rest in instructions() if found == word]


def test_base_image_is_an_argument_with_a_version():
    (base,) = [rest.removeprefix("BASE=") for rest in arguments_of("ARG") if rest.startswith("BASE=")]
    image, _, tag = base.partition(":")
    assert image == "python" and re.match(r"\d+\.\d+", tag)
    assert arguments_of("FROM") == ["${BASE}"]
    assert ":latest" not in (ROOT / "Dockerfile").read_text()


def test_container_does_not_run_as_root():
    order = [word for word, _ in instructions()]
    users = arguments_of("USER")
    assert users and users[-1] not in ("root", "0")
    assert (
        order.index("USER") < order.index("WORKDIR") < order.index("COPY")
    )  # files that are copied later belong to the user
    assert all(rest.startswith(f"--chown={users[-1]} ") for rest in arguments_of("COPY"))
    assert not any("sudo" in rest for rest in arguments_of("RUN"))


def test_installs_leave_no_cache_and_pin_versions():
    assert not arguments_of("ADD") and not arguments_of("MAINTAINER")
    for line in arguments_of("RUN"):
        if "apt-get install" in line:
            assert "--yes" in line and "--no-install-recommends" in line and "rm -rf /var/lib/apt/lists/*" in line
            assert line.index("apt-get update") < line.index("apt-get install")
        if "pip install" in line:
            assert "--no-cache-dir" in line and "--constraint constraints.txt" in line
    assert any("pip install" in line for line in arguments_of("RUN"))


def test_entry_point_and_command_exist():
    (entry,), (command,) = (map(json.loads, arguments_of(word)) for word in ("ENTRYPOINT", "CMD"))
    assert entry == ["accelerate", "launch"]
    assert (ROOT / command[0]).is_file()


def test_copied_files_exist_and_are_not_ignored():
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [source for rest in arguments_of("COPY") for source in rest.split()[1:-1]]
    assert set(sources) == set(kept)
    for source in sources:
        assert (ROOT / source).exists(), source
    # All files that setup.py reads, and none that are secret or large.
    assert {"setup.py", "README.md", "mm_hf"} <= set(sources)
    for name in (".git", ".venv", "outputs", ".env", "tests"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in kept)


def execute(root):
    """Execute the instructions with `root` as /home/mmhf; return the working directory and the environment."""
    home, environment = "/home/mmhf", {**os.environ, "HOME": str(root)}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    here = Path(arguments_of("WORKDIR")[0].replace(home, str(root)))
    here.mkdir(parents=True)
    for word, rest in instructions():
        rest = rest.replace(home, str(root))
        if word == "COPY":
            *sources, target = rest.split()[1:]
            for source in sources:
                kind = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                kind(ROOT / source, here / (target if target != "./" else source))
        elif word == "ENV":
            name, _, value = rest.partition("=")
            environment[name] = value.replace(f"${name}", environment[name])
        elif word == "RUN" and "apt-get" not in rest and "useradd" not in rest:
            subprocess.run(["/bin/sh", "-c", rest], cwd=here, env=environment, check=True)
    return here, environment


@pytest.mark.slow  # installs PyTorch, which takes minutes
def test_instructions_make_an_environment_that_trains(tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{bin}:/usr/bin:/bin")
        here, environment = execute(tmp_path / "home")
    (entry,) = map(json.loads, arguments_of("ENTRYPOINT"))
    (command,) = map(json.loads, arguments_of("CMD"))
    code = "import mm_hf, sys; print(mm_hf.__file__, sys.prefix)"
    where = subprocess.run(
        ["python3", "-c", code], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    assert where.stdout.count(str(tmp_path / "home" / "venv")) == 2
    options = ["--seeds", "1", "--epochs", "1", "--output_dir", str(tmp_path / "out")]
    subprocess.run([*entry, *command, *options], cwd=here, env=environment, check=True)
    assert (tmp_path / "out" / "results.json").exists()
