"""Every classification class of Transformers passes the checks of `make model-table`."""

import importlib

import pytest
import transformers

from benchmarks import supported_models
from mm_hf import LocationError, probe
from tests.helpers import zoo

MULTIMIX_ONLY = {
    "PerceiverForImageClassificationConvProcessing",
    "PerceiverForImageClassificationFourier",
    "PerceiverForImageClassificationLearned",
    "PerceiverForSequenceClassification",
}
NOT_A_CLASSIFIER = {"ShieldGemma2ForImageClassification"}  # Its logits are two columns of a language model's logits.
# With padding, Falcon's eager attention differs from its default attention.
OTHER_EAGER = {"FalconForSequenceClassification"}
pytestmark = pytest.mark.zoo


@pytest.fixture(autouse=True)
def empty_registry(monkeypatch):
    monkeypatch.setattr(importlib.import_module("mm_hf.locations.registry"), "_registered", {})


@pytest.mark.skipif(transformers.__version__ < "5.23", reason="the classes are those of Transformers 5.23")
@pytest.mark.parametrize("name", zoo.class_names())
@pytest.mark.filterwarnings("ignore")
def test_class_passes_all_checks(name):
    row = supported_models.check(name)
    if row.unavailable:
        pytest.skip(row.reason)
    if name in NOT_A_CLASSIFIER:
        assert not row.multimix and "does not end in a linear layer" in row.reason
        return
    assert row.multimix, row.reason
    assert row.dense == (name not in MULTIMIX_ONLY), row.reason
    assert not row.dense or bool(row.attention) != row.unread.startswith("no: ")
    if row.dense:
        assert row.trained, row.reason
        assert row.identity <= 1e-5
    if row.attention_error is not None and name not in OTHER_EAGER:
        assert row.attention_error <= 1e-5


# BigBird replaces its attention modules in its first forward, and the new ones have other names.
@pytest.mark.parametrize("name", [name for name in zoo.class_names() if "BigBirdFor" not in name])
@pytest.mark.filterwarnings("ignore")
def test_untrained_model_has_the_same_plan(name, monkeypatch):
    """Tokens that are initialized to zero are equal, so that a wrong pool gives the correct logits."""
    try:
        model = zoo.build(name)
        inputs = zoo.batch(name, model)
        expected = probe(model, inputs)
    except (zoo.Unavailable, LocationError):
        pytest.skip("no plan")
    monkeypatch.setattr(zoo, "randomize", lambda model: None)
    assert probe(zoo.build(name), inputs) == expected
