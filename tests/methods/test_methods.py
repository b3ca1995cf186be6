import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import HfArgumentParser, TrainingArguments

from mm_hf import ERM, CutMix, DenseMultiMix, Mixing, Mixup, MultiMix, clean_loss, get_method, wrap_model
from mm_hf.distributed import rank_generator
from mm_hf.locations import LocationOutput
from mm_hf.methods import METHODS, default_methods, pairs
from tests.helpers import models

settings = st.fixed_dictionaries(
    {},
    optional={
        "num_mixed": st.integers(1, 5000),
        "clean_weight": st.floats(0.1, 3),
        "pooled_weight": st.floats(0, 3),
        "input_mixing": st.sampled_from([None, "none", "mixup", "cutmix", "mixup_cutmix"]),
        "input_mixing_prob": st.floats(0, 1),
        "input_mixing_start": st.floats(0, 100),
        "min_fit": st.none() | st.just(0.0),
        "preset": st.sampled_from(["paper", None]),
    },
)
strength = st.one_of(
    st.fixed_dictionaries({"alpha": st.floats(0.01, 3)}),
    st.fixed_dictionaries({"alpha": st.tuples(st.floats(0.01, 1), st.floats(1, 3))}),
    st.fixed_dictionaries({"effective_examples": st.floats(1.1, 20)}),
    st.just({}),
)


@given(st.sampled_from([MultiMix, DenseMultiMix]), settings, strength)
def test_settings_survive_json(cls, values, how):
    method = cls(**values, **how)
    restored = Mixing.from_dict(json.loads(json.dumps(method.to_dict())))
    assert restored == method and type(restored) is cls
    assert cls.from_dict(method.to_dict()) == method


def test_registry_has_every_method_by_name():
    assert set(METHODS) >= {"erm", "mixup", "cutmix", "manifold_mixup", "transmix", "multimix", "dense_multimix"}
    for name, cls in METHODS.items():
        assert get_method(name) is cls and cls.name == name
    for name, method in default_methods().items():
        assert Mixing.from_dict({"method": name}) == method


def test_paper_preset_sets_the_papers_recipe_and_given_arguments_override_it():
    method = DenseMultiMix(preset="paper")
    assert (method.alpha, method.clean_weight, method.pooled_weight, method.dense_weight) == ((0.5, 2.0), 0.0, 1.0, 1.0)
    assert (method.input_mixing, method.input_mixing_prob, method.input_mixing_start) == ("mixup", 0.5, 0.0)
    assert method.effective_examples is None
    method = MultiMix(preset="paper", input_mixing="none", clean_weight=1.0, effective_examples=4)
    assert (method.input_mixing, method.clean_weight, method.effective_examples, method.alpha) == ("none", 1.0, 4, None)


def test_default_recipe():
    method = DenseMultiMix()
    assert (method.clean_weight, method.pooled_weight, method.dense_weight) == (1.0, 0.0, 1.0)
    assert (method.num_mixed, method.effective_examples, method.alpha) == ("auto", 3.0, None)
    assert MultiMix().pooled_weight == 1.0
    for default in (DenseMultiMix(), MultiMix()):
        assert (default.input_mixing, default.input_mixing_prob, default.input_mixing_start) == (None, 0.5, 3.0)


@pytest.mark.parametrize("name", sorted(default_methods()))
def test_every_method_is_parsed_beside_training_arguments(name, tmp_path):
    parser = HfArgumentParser((TrainingArguments, get_method(name)))
    assert parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path)])[1] == get_method(name)()


def test_command_line_of_dense_multimix():
    parser = HfArgumentParser(DenseMultiMix)
    parse = lambda line: parser.parse_args_into_dataclasses(line.split())[0]  # noqa: E731
    assert parse("--alpha 0.5 2.0 --num_mixed 7") == DenseMultiMix(alpha=(0.5, 2.0), num_mixed=7)
    assert parse("--alpha 0.3 --attention gap") == DenseMultiMix(alpha=0.3, attention="gap")
    assert parse("--preset paper --input_mixing none") == DenseMultiMix(preset="paper", input_mixing="none")
    assert parse("--input_mixing mixup_cutmix --input_mixing_prob 0.2 --input_mixing_start 1 --examples_per_mix 9") == (
        DenseMultiMix(input_mixing="mixup_cutmix", input_mixing_prob=0.2, input_mixing_start=1.0, examples_per_mix=9)
    )
    assert parse("--no_detach_attention --dense_weight 2") == DenseMultiMix(detach_attention=False, dense_weight=2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_mixed": 0}, "num_mixed must be an integer of at least 1 or 'auto', got 0"),
        ({"num_mixed": 2.5}, "num_mixed must be an integer"),
        ({"alpha": 0.0}, "alpha must be a positive number or an interval"),
        ({"alpha": (1.0, 2.0, 3.0)}, "alpha must be a positive number or an interval"),
        ({"effective_examples": float("nan")}, "effective_examples must be a finite number greater than 1, got nan"),
        ({"effective_examples": "3"}, "effective_examples must be a finite number greater than 1, got '3'"),
        ({"alpha": []}, "alpha must be a positive number or an interval"),
        ({"detach_attention": "yes"}, "detach_attention must be True or False, got 'yes'"),
        ({"gather_across_devices": 1}, "gather_across_devices must be True or False, got 1"),
        ({"preset": ["paper"]}, r"preset must be one of paper, got \['paper'\]"),
        ({"clean_weight": float("inf")}, "clean_weight must be a finite number of at least 0, got inf"),
        ({"alpha": (2.0, 1.0)}, "alpha must be a positive number or an interval"),
        ({"alpha": 1.0, "effective_examples": 3}, "give one of the two"),
        ({"effective_examples": 1.0}, "effective_examples must be a finite number greater than 1, got 1.0"),
        ({"examples_per_mix": 1}, "examples_per_mix must be an integer of at least 2, got 1"),
        ({"examples_per_mix": 2.0}, "examples_per_mix must be an integer of at least 2, got 2.0"),
        ({"examples_per_mix": 3}, "examples_per_mix must be greater than effective_examples, got 3 and 3.0"),
        ({"input_mixing": "cut"}, "input_mixing must be one of none, mixup, cutmix, mixup_cutmix, got 'cut'"),
        ({"input_mixing": ["mixup"]}, r"input_mixing must be one of .*, got \['mixup'\]"),
        ({"input_mixing_prob": 1.5}, r"input_mixing_prob must lie in \[0, 1\], got 1.5"),
        ({"input_mixing_prob": float("nan")}, r"input_mixing_prob must lie in \[0, 1\], got nan"),
        ({"input_mixing_prob": True}, r"input_mixing_prob must lie in \[0, 1\], got True"),
        ({"input_mixing_prob": "0.5"}, r"input_mixing_prob must lie in \[0, 1\], got '0.5'"),
        ({"input_mixing_start": -1}, "input_mixing_start must be a number of at least 0, got -1"),
        ({"input_mixing_start": float("nan")}, "input_mixing_start must be a number of at least 0, got nan"),
        ({"input_mixing_start": "3"}, "input_mixing_start must be a number of at least 0, got '3'"),
        ({"min_fit": 1.0}, r"min_fit must lie in \[0, 1\), got 1.0"),
        ({"min_fit": float("nan")}, r"min_fit must lie in \[0, 1\), got nan"),
        ({"min_fit": 0.5, "clean_weight": 0.0}, "min_fit must be 0 with clean_weight=0, got 0.5"),
        ({"clean_weight": -1.0}, "clean_weight must be a finite number of at least 0, got -1.0"),
        ({"clean_weight": 0.0, "dense_weight": 0.0}, "At least one of clean_weight, pooled_weight, dense_weight"),
        ({"attention": "best"}, "attention must be one of auto, cls, mean, gap, cam, uniform, got 'best'"),
        ({"preset": "mixup"}, "preset must be one of paper, got 'mixup'"),
    ],
)
def test_invalid_settings_raise_a_value_error(values, message):
    with pytest.raises(ValueError, match=message):
        DenseMultiMix(**values)


def test_unknown_names_and_settings_raise_a_value_error():
    with pytest.raises(
        ValueError, match="no mixing method 'mixmax'. The methods are align_mixup, .*cutmix, dense_multimix, erm"
    ):
        get_method("mixmax")
    with pytest.raises(
        ValueError, match=r"MultiMix has no setting num_mixd \(did you mean num_mixed\?\); it has num_mixed, alpha"
    ):
        Mixing.from_dict({"method": "multimix", "num_mixd": 3})
    with pytest.raises(ValueError, match="settings of MultiMix, not of DenseMultiMix"):
        DenseMultiMix.from_dict({"method": "multimix"})


def location_output(b=6, r=4, c=5):
    torch.manual_seed(0)
    mask = torch.rand(b, r) < 0.8
    mask[:, 0] = True
    attention = torch.rand(b, r) * mask
    attention = attention / attention.sum(1, keepdim=True)
    return LocationOutput(torch.randn(b, c), torch.randn(b, r, c), mask, attention)


def test_loss_is_the_weighted_sum_of_its_terms():
    output, labels = location_output(), torch.tensor([0, 1, 2, 3, 4, -100])
    torch.manual_seed(1)
    method = DenseMultiMix(num_mixed=30, clean_weight=0.5, pooled_weight=2.0, dense_weight=3.0)
    result = method.loss(output, labels, label_smoothing=0.1)
    logs = result.logs
    expected = 0.5 * logs["loss_clean"] + 2 * logs["loss_pooled"] + 3 * logs["loss_dense"]
    torch.testing.assert_close(result.loss, expected)
    clean = F.cross_entropy(output.logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(logs["loss_clean"], clean)
    assert logs["loss_terms"] == 6 + 30 + 4 * 30
    entropy = -(output.attention * output.attention.clamp(min=1e-30).log()).sum(1).mean()
    torch.testing.assert_close(logs["attention_entropy"], entropy)


def test_terms_of_weight_zero_are_not_computed():
    assert set(MultiMix(pooled_weight=0.0).loss(location_output(), models.labels()).logs) == {
        "loss_clean",
        "loss_terms",
    }
    without, default = DenseMultiMix(dense_weight=0.0).requirements, DenseMultiMix().requirements
    assert without.attention is None and not without.token_logits and without.linear_head
    assert default.attention == "auto" and default.token_logits
    assert not ERM().requirements.locations and not ERM().requirements.linear_head


IMAGES, LABELS = {"pixel_values": torch.zeros(4, 1, 8, 8)}, torch.arange(4)
TEXTS = {"input_ids": torch.ones(4, 8, dtype=torch.long)}


def choices(method, inputs=IMAGES, labels=LABELS, epoch=3.0, draws=2000):
    """Return the share of each method's class among the choices for mini-batches."""
    torch.manual_seed(0)
    chosen = [type(method.for_batch(inputs, labels, epoch=epoch)) for _ in range(draws)]
    return {cls: chosen.count(cls) / draws for cls in set(chosen)}


@pytest.mark.parametrize("cls", [MultiMix, DenseMultiMix])
def test_input_mixing_is_drawn_with_its_probability(cls):
    def shares(input_mixing, prob, draws=20):
        return choices(cls(input_mixing=input_mixing, input_mixing_prob=prob, input_mixing_start=0), draws=draws)

    found = shares("mixup", 0.3, draws=2000)
    assert set(found) == {cls, Mixup} and found[Mixup] == pytest.approx(0.3, abs=0.04)
    found = shares("mixup_cutmix", 0.6, draws=2000)
    assert set(found) == {cls, Mixup, CutMix}
    assert found[Mixup] == pytest.approx(0.3, abs=0.04) and found[CutMix] == pytest.approx(0.3, abs=0.04)
    assert shares("cutmix", 1.0) == {CutMix: 1}
    assert shares("cutmix", 0.0) == shares("none", 1.0) == {cls: 1}


@pytest.mark.parametrize("epoch", [None, 0.0, 1.499, 1.5, 2.0, 3.0, 6.0, 1500.0])
def test_share_of_input_mixing_rises_after_its_first_epochs(epoch):
    method = DenseMultiMix(input_mixing="cutmix", input_mixing_prob=0.8, input_mixing_start=1.5)
    expected = 0.0 if not epoch or epoch <= 1.5 else 0.8 * (1 - 1.5 / epoch)
    assert choices(method, epoch=epoch).get(CutMix, 0.0) == pytest.approx(expected, abs=0.04 * bool(expected))
    constant = DenseMultiMix(input_mixing="cutmix", input_mixing_prob=1.0, input_mixing_start=0)
    assert choices(constant, epoch=epoch, draws=20) == {CutMix: 1}  # also in a custom loop that sets no epoch


def test_dense_multimix_mixes_real_valued_inputs_of_late_epochs_by_default():
    shares = choices(DenseMultiMix(), epoch=12.0)
    prob = 0.75 * DenseMultiMix().input_mixing_prob
    assert set(shares) == {DenseMultiMix, CutMix} and shares[CutMix] == pytest.approx(prob, abs=0.04)

    def mixes(inputs=IMAGES, labels=LABELS, epoch=1e9, by=CutMix):
        return choices(DenseMultiMix(input_mixing_prob=1.0), inputs, labels, epoch, draws=5) == {by: 1}

    assert mixes() and mixes(labels=torch.rand(4, 3)) and mixes({"input_features": torch.zeros(4, 80, 30)})
    assert mixes({"pixel_values": torch.zeros(4, 1, 1, 40)}) and mixes(
        {"pixel_values_videos": torch.zeros(4, 2, 3, 8, 8)}
    )
    # Without a time axis that can be told from the features, and with inputs that a cut would not fit.
    assert mixes({"input_features": torch.zeros(4, 30, 30)}, by=Mixup)
    assert mixes({**IMAGES, "bool_masked_pos": torch.zeros(4, 4, dtype=torch.bool)}, by=Mixup)
    assert not mixes(epoch=3.0) and not mixes(epoch=None)
    for by in (CutMix, Mixup):
        assert not mixes(labels=torch.zeros(4, 16, dtype=torch.long), by=by)  # one label per location
        assert not mixes({**TEXTS, **IMAGES}, by=by)
        assert not mixes({"pixel_values": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)}, by=by)
        assert not mixes({"pixel_values": torch.zeros(1, 1, 8, 8)}, LABELS[:1], by=by)  # no partner
        integers = {"input_values": torch.ones(4, 8, dtype=torch.long), "attention_mask": torch.ones(4, 8)}
        assert not mixes(integers, by=by)
        assert not mixes({**IMAGES, "spatial_shapes": torch.ones(4, 2)}, by=by)
    assert choices(MultiMix(), epoch=100.0, draws=50) == {MultiMix: 1}


def test_the_default_draws_one_number_for_an_eligible_mini_batch_and_none_for_another():
    """A mini-batch gets input mixing if one uniform number is below the probability."""
    method = DenseMultiMix(input_mixing_prob=0.5)
    for inputs, epoch, draws in ((IMAGES, 1e9, 1), (IMAGES, 3.0, 0), (TEXTS, 1e9, 0)):
        torch.manual_seed(7)
        chosen = method.for_batch(inputs, LABELS, epoch=epoch)
        after = torch.rand(())
        torch.manual_seed(7)
        uniform = torch.rand(draws)
        assert isinstance(chosen, CutMix) == bool((uniform < 0.5).any()) and torch.rand(()) == after


def test_explicit_mixup_also_mixes_texts():
    method = DenseMultiMix(input_mixing="mixup", input_mixing_prob=1.0, input_mixing_start=0)
    assert choices(method, TEXTS, draws=5) == {Mixup: 1}


@pytest.mark.parametrize("input_mixing", ["cutmix", "mixup_cutmix"])
def test_explicit_cutmix_of_texts_is_rejected_before_training(input_mixing):
    model, inputs = models.build("bert").train(), models.batch("bert")
    with pytest.raises(ValueError, match=r"CutMix .* this batch has input_ids"):
        wrap_model(
            model, DenseMultiMix(input_mixing=input_mixing), example_inputs={**inputs, "labels": models.labels()}
        )
    assert "forward" not in model.__dict__


def test_input_mixing_and_labels_of_locations():
    assert DenseMultiMix().requirements.dense_labels and DenseMultiMix(input_mixing="none").requirements.dense_labels
    assert not DenseMultiMix(input_mixing="mixup").requirements.dense_labels


def test_clean_loss_equals_cross_entropy():
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, -100, 2, 1])
    torch.testing.assert_close(clean_loss(logits, labels), F.cross_entropy(logits, labels))
    soft = torch.rand(5, 4).softmax(-1)
    torch.testing.assert_close(
        clean_loss(logits, soft, label_smoothing=0.2), F.cross_entropy(logits, soft, label_smoothing=0.2)
    )
    assert clean_loss(logits, torch.full((5,), -100)) == 0


def test_mixup_equals_kornia_on_the_same_draws():
    kornia = pytest.importorskip("kornia.augmentation")
    from kornia.constants import DType

    images, labels = models.batch("vit")["pixel_values"], torch.tensor([0, 1, 2, 3, 4, 0])
    model = models.build("vit")
    torch.manual_seed(4)
    inputs, targets = Mixup(alpha=0.7).mix_inputs({"pixel_values": images}, labels, model)
    # kornia's factor and partner, set to what was drawn: it returns the labels of both and the partner's share.
    torch.manual_seed(4)
    generator = rank_generator("cpu")
    factor = pairs.draw_factor(0.7, generator)
    partner = pairs.draw_partners(6, generator, torch.device("cpu"))
    params = {
        "mixup_pairs": partner,
        "mixup_lambdas": torch.full((6,), 1 - factor),
        "batch_prob": torch.ones(6),
        "dtype": torch.tensor(DType.get(torch.float32).value),
    }
    theirs, classes = kornia.RandomMixUpV2(data_keys=["input", "class"], p=1.0)(images, labels, params=params)
    torch.testing.assert_close(inputs["pixel_values"], theirs)
    one_hot = F.one_hot(labels, 5).float()
    expected = one_hot * (1 - classes[:, 2:]) + F.one_hot(classes[:, 1].long(), 5) * classes[:, 2:]
    torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_mixup_of_text_mixes_word_embeddings(name):
    model, inputs, labels = models.build(name), models.batch(name), models.labels()
    torch.manual_seed(0)
    mixed, targets = Mixup().mix_inputs(inputs, labels, model)
    ids = mixed.pop("input_ids")  # of the longer text
    assert (ids.ne(model.config.pad_token_id) == mixed["attention_mask"].bool()).all()
    assert mixed["inputs_embeds"].shape == (6, 12, 32)
    assert (mixed["attention_mask"] >= inputs["attention_mask"]).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert model(**mixed).logits.isfinite().all()


def test_mixup_rejects_inputs_that_it_cannot_mix():
    with pytest.raises(ValueError, match="Mixup mixes floating-point inputs .* only position_ids"):
        Mixup().check_inputs({"position_ids": torch.arange(6)}, models.build("vit"))
    with pytest.raises(ValueError, match="alpha must be a positive number, got 0"):
        Mixup(alpha=0)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0])
def test_factor_of_a_pair_has_the_beta_distribution(alpha):
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    drawn = [pairs.draw_factor(alpha, generator) for _ in range(3000)]
    assert stats.kstest(drawn, stats.beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("name", ["mixup", "cutmix", "manifold_mixup", "transmix"])
def test_pair_methods_validate_alpha_and_draw_from_the_global_generator(name):
    with pytest.raises(ValueError, match="alpha must be a positive number, got -1"):
        get_method(name)(alpha=-1.0)
    model, images, labels = models.build("vit"), models.batch("vit"), torch.tensor([0, 1, 2, 3, -100, 4])
    drawn = []
    for _ in range(2):
        torch.manual_seed(9)
        drawn.append(get_method(name)().for_batch(images, labels).mix_inputs(dict(images), labels, model))
    torch.testing.assert_close(*drawn)
    # -100 takes no part: it gives weight to no class, and the others keep theirs.
    assert drawn[0][1].sum() == pytest.approx(5, abs=1e-5) and (drawn[0][1] >= 0).all()


@pytest.mark.parametrize("name", ["mixup", "cutmix", "manifold_mixup", "transmix"])
@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_soft_and_multi_label_targets_are_mixed(name, problem):
    model, images = models.build("vit", problem_type=problem).train(), models.batch("vit")
    labels = torch.rand(6, 5) if problem else torch.rand(6, 5).softmax(dim=1)
    with wrap_model(model, get_method(name)()) as handle:
        output = model(**images, labels=labels)
        output.loss.backward()
    assert output.loss.isfinite() and handle.pop_logs()[f"loss_{name}"] == pytest.approx(float(output.loss.detach()))
    assert model.config.problem_type == problem
