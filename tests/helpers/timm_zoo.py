"""Small random models of the architectures of timm, in Transformers' wrapper, and random batches for them."""

import re
from functools import partial

import torch

from tests.helpers.zoo import settle_norms

SIDES = (64, 128, 224, 256)  # of the images: a stride of 64 leaves 2 x 2 locations of 128 x 128
BUILD_ERRORS = (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)


def families():
    """Return the names of all architectures by family: their module and the letters that their names begin with."""
    import timm
    from timm.models import _registry

    found = {}
    for name in timm.list_models(exclude_filters=["test_*", "tf_*"]):
        family = f"{_registry._model_to_module[name]}/{re.match('[a-z]+', name).group()}"
        found.setdefault(family, []).append(name)
    return found


def smallest(names):
    """Return the architecture with the fewest parameters, among those named as small ones if there are any."""
    import timm

    def parameters(name):
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())

    small = [name for name in names if re.search("zepto|atto|femto|pico|nano|mini|tiny|xx?s|small", name)]
    return min(small or names, key=parameters)


def build(name, side, *, num_labels=5, **model_args):
    """Build a model for images of a side, in evaluation mode and with all parameters random.

    It has two blocks, and few features, if its constructor takes these numbers.
    """
    depth, size, width = {"depth": 2}, {"img_size": side}, {"embed_dim": 64, "num_heads": 4}
    for smaller in ({**depth, **size, **width}, {**depth, **size}, depth, size):
        try:
            return _build(name, side, num_labels, {**smaller, **model_args})
        except BUILD_ERRORS:
            continue
    return _build(name, side, num_labels, model_args)


@torch.no_grad()
def _build(name, side, num_labels, model_args):
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = TimmWrapperConfig(architecture=name, model_args=model_args, num_labels=num_labels)
        model = TimmWrapperForImageClassification(config).eval()
        # Parameters that are initialized to 0 or 1 make tokens equal, or modules the identity, and would hide errors.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        settle_norms(model, batch(model, side))
        if not model(**batch(model, side, b=2)).logits.isfinite().all():
            raise ValueError("the logits are not finite")
    return model


def batch(model, side, *, b=4, seed=1, length=None, padding=None):
    """Generate keyword arguments of the model's forward, without labels."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(b, 3, side, side, generator=generator)}


def batches(model, side):
    """Return a function that makes batches, with the keyword arguments of `zoo.batch`."""
    return partial(batch, model, side)
