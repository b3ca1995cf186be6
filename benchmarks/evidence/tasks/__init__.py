"""Tasks of the evidence study: real data and small models that train in about 10 to 60 seconds on one core.

Each task is a function that returns a `mm_hf.comparison.Task`. Subsets and splits of the data are drawn once with a
fixed seed. The seed of a run decides initial weights, the order of examples and the random draws of a method.
Validation examples are held out of the training part and serve for choices only; nothing is chosen on test examples.
"""

from benchmarks.evidence.registry import TASKS
from benchmarks.evidence.tasks import (  # noqa: F401  each registers its tasks
    glyphs,
    images,
    packages,
    pretrained,
    prompts,
    sequences,
    stamps,
    texts,
)

__all__ = ["STUDY", "TASKS"]

# Tasks of docs/evidence.md, in the order of its tables; the others come behind.
STUDY = (
    "digits_vit", "fashion_vit", "fashion_300", "glyphs_vit", "glyphs_resnet", "stamps_dinov2", "mnist1d",
    "reviews_minilm", "packages_minilm", "prompts_ast", "prompts_other_voice",
)  # fmt: skip
_others = [name for name in TASKS if name not in STUDY]
for _name in (*STUDY, *_others):
    TASKS[_name] = TASKS.pop(_name)
