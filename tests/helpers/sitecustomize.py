"""Make torchvision importable beside a PyTorch build for which its extension is not compiled.

`make test-vision` puts this file where Python runs it at startup. PyPI's torchvision is compiled for CUDA. Beside the
CPU build of PyTorch its extension does not load, and the import fails because two operators do not exist. They are
declared before the import. Transforms and image processors need none of them.
"""

import importlib.abc
import importlib.machinery
import sys

OPERATORS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finder that declares the operators when torchvision is imported, and finds no module itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            package = importlib.machinery.PathFinder.find_spec(name)
            try:
                torch.ops.load_library(f"{package.submodule_search_locations[0]}/_C.so")
            except (AttributeError, OSError):
                for operator, signature in OPERATORS.items():
                    torch.library.define(operator, signature)


sys.meta_path.insert(0, DeclareOperators())
