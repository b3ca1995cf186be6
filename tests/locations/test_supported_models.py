"""Every classification class of Transformers: what `make model-table` writes to docs/models.md, asserted."""

import pytest
import supported_models
import transformers

from mm_hf import LocationError, probe
from tests.helpers import zoo

MULTIMIX_ONLY = {
    "PerceiverForImageClassificationConvProcessing",
    "PerceiverForImageClassificationFourier",
    "PerceiverForImageClassificationLearned",
    "PerceiverForSequenceClassification",
    "VJEPA2ForVideoClassification",
    "VideoPrismForVideoClassification",
}
NOT_A_CLASSIFIER = {"ShieldGemma2ForImageClassification"}  # its logits are two columns of a language model's
# Under padding, Falcon's eager attention differs from what it computes by default, and not only here.
OTHER_EAGER = {"FalconForSequenceClassification"}


pytestmark = pytest.mark.zoo


@pytest.mark.skipif(transformers.__version__ < "5.23", reason="the list of classes is that of Transformers 5.23")
@pytest.mark.parametrize("name", zoo.class_names())
@pytest.mark.filterwarnings("ignore")
def test_class(name):
    row = supported_models.check(name)
    if row.unavailable:
        pytest.skip(row.reason)
    if name in NOT_A_CLASSIFIER:
        assert not row.multimix and "does not end in a linear layer" in row.reason
        return
    assert row.multimix, row.reason
    assert row.dense == (name not in MULTIMIX_ONLY), row.reason
    if row.dense:
        assert row.trained, row.reason
        assert row.identity <= 1e-5
    if row.attention_error is not None and name not in OTHER_EAGER:
        assert row.attention_error <= 1e-5


# BigBird exchanges its attention modules in its first forward, and these have another name afterwards.
@pytest.mark.parametrize("name", [name for name in zoo.class_names() if "BigBirdFor" not in name])
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_never_trained_has_the_same_plan(name, monkeypatch):
    """Before training, tokens that start at zero are equal, and a wrong pool gives the right logits."""
    try:
        model = zoo.build(name)
        inputs = zoo.batch(name, model)
        expected = probe(model, inputs)
    except (zoo.Unavailable, LocationError):
        pytest.skip("no plan")
    monkeypatch.setattr(zoo, "randomize", lambda model: None)
    assert probe(zoo.build(name), inputs) == expected
