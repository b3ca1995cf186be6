"""Run Transformers' own tests of `Trainer` with `MultiMixTrainer`.

    python -m benchmarks.trainer_tests CHECKOUT

CHECKOUT is a copy of Transformers' repository, of which `tests/` is used; imports that the installed version lacks must
be removed from it. The tests need the packages parameterized, sentencepiece and optuna. Without a network, those that
load models fail with both trainers. All tests run with `ERM()`. With `DenseMultiMix`, a tiny BERT or ViT and a
classification task replace the regression model and the dataset of the tests. Each run is compared with that of
`Trainer`. benchmarks/results/trainer_tests.csv gets the number of tests that `Trainer` passes, and a row with the error
of each of them that `MultiMixTrainer` does not pass.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from benchmarks import harness
from mm_hf import ERM, DenseMultiMix, MultiMixTrainer

FILES = ("test_trainer", "test_trainer_callback", "test_trainer_jit_checkpoint")
RUNS = (("regression", "erm"), ("bert", "dense_multimix"), ("vit", "dense_multimix"))
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 3}
MODELS: dict[str, tuple[Any, Any, dict[str, int], str, Any]] = {
    "bert": (
        BertConfig, BertForSequenceClassification, {"vocab_size": 16},
        "input_ids", lambda random: random.integers(16, size=6),
    ),
    "vit": (
        ViTConfig, ViTForImageClassification, {"image_size": 4, "patch_size": 2, "num_channels": 1},
        "pixel_values", lambda random: random.standard_normal((1, 4, 4), dtype=np.float32),
    ),
}  # fmt: skip


# ---- A plugin of pytest, inside of the tests ----


class Trainer(MultiMixTrainer):
    """`MultiMixTrainer` in the place of `Trainer`."""

    made = 0

    def __init__(self, *args: Any, **kwargs: Any):
        Trainer.made += 1
        mixing = ERM() if os.environ["METHOD"] == "erm" else DenseMultiMix(num_mixed=8)
        super().__init__(*args, mixing=mixing, **kwargs)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Replace `Trainer` before the tests import it."""
    if os.environ["METHOD"] != "plain":
        sys.modules["transformers"].Trainer = Trainer


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Raise an error if the tests have used another `Trainer`."""
    if os.environ["METHOD"] != "plain" and not Trainer.made:
        raise RuntimeError("The tests have not used MultiMixTrainer.")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Replace the model and the dataset of the tests."""
    if os.environ["MODEL"] in MODELS:
        replacements = classification(*MODELS[os.environ["MODEL"]])
        for name, module in sys.modules.items():
            if name.startswith("tests.trainer.") and hasattr(module, "RegressionDataset"):
                vars(module).update(replacements)


def classification(config_class: Any, model_class: Any, sizes: dict[str, int], name: str, draw: Any) -> dict[str, Any]:
    """Return a model and a dataset of a classification task under the names of the tests' regression task."""

    def make_config(**settings: Any) -> Any:
        return config_class(**{"a": 0, "b": 0, **TINY, **sizes, **settings})

    class Model(model_class):  # type: ignore[misc]
        def __init__(self, config: Any = None, **settings: Any):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                super().__init__(config or make_config(**settings))

        a = property(lambda self: self.classifier.weight[0, 0])
        b = property(lambda self: self.classifier.bias[0])

    Model.__name__ = model_class.__name__  # Transformers selects the loss by it

    class Rows:
        def __init__(self, a: Any = 2, b: Any = 3, length: int = 64, seed: int = 42, label_names: Any = None):
            random = np.random.default_rng(seed)
            self.x, self.ys = [draw(random) for _ in range(length)], [random.integers(3, size=length)]
            self.names = label_names or ["labels"]

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {name: self.x[i], **{label: int(self.ys[0][i]) for label in self.names}}

    models = ("RegressionModel", "RegressionPreTrainedModel", "RegressionRandomPreTrainedModel")
    return {"RegressionModelConfig": make_config, "RegressionDataset": Rows, **dict.fromkeys(models, Model)}


# ---- The process that runs them ----


def errors(checkout: Path, model: str, method: str) -> dict[str, str | None]:
    """Run the tests; return the error of each test, None if it passed. Skipped tests are left out."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        environment = {**os.environ, "MODEL": model, "METHOD": method, "PYTHONPATH": ":".join(sys.path)}
        options = ["-q", "-p", "benchmarks.trainer_tests", f"--junitxml={report.name}", "-o", "junit_family=xunit1"]
        command = [sys.executable, "-m", "pytest", *options, *(f"tests/trainer/{name}.py" for name in FILES)]
        subprocess.run(command, cwd=checkout, env=environment, check=False)
        found: dict[str, str | None] = {}
        for case in ElementTree.parse(report.name).iter("testcase"):
            name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
            if case.find("skipped") is None:
                problem = next((child for child in case if child.tag in ("failure", "error")), None)
                found[name] = None if problem is None else _first_sentence(problem.get("message", ""))
        return found


def _first_sentence(message: str) -> str:
    """Return the first sentence of an error, without names of temporary directories."""
    return re.sub(rf"{tempfile.gettempdir()}/\w+/", "", " ".join(message.split())).split(". ")[0]


def main() -> None:
    """Run the tests, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    args = parser.parse_args()
    table: list[dict[str, object]] = []
    for model, method in RUNS:
        plain, mixed = errors(args.checkout, model, "plain"), errors(args.checkout, model, method)
        passed = [name for name, error in plain.items() if error is None]
        failed = {name: mixed.get(name, "skipped") for name in passed if mixed.get(name, "skipped") is not None}
        run = {"model": model, "method": method, "passed": f"{len(passed) - len(failed)} of {len(passed)}"}
        table += [{**run, "test": name, "error": error} for name, error in (failed or {"": ""}).items()]
        harness.write("trainer_tests.csv", table)


if __name__ == "__main__":
    main()
