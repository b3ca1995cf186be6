"""Invalid arguments raise a ValueError that names the argument, its value and a valid one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mm_hf.functional import arguments, clean_loss, count_valid, dense_multimix_loss, multimix_loss, soft_targets
from mm_hf.functional.factors import (
    SparseFactors,
    alpha_for,
    sample_factors,
    sample_permutations,
    sample_sparse_factors,
)

B, R, C, N = 6, 5, 4, 8


def valid_arguments():
    torch.manual_seed(0)
    return {
        "token_logits": torch.randn(B, R, C),
        "labels": torch.randint(C, (B,)),
        "attention": torch.rand(B, R),
        "factors": sample_factors(B, N, 1.0),
        "permutations": sample_permutations(R, B),
    }


def changed(x, value, dtype=None):
    x = x.clone() if dtype is None else x.to(dtype)
    x.view(-1)[1] = value
    return x


V = valid_arguments()
FACTORS, SPARSE = V["factors"], sample_sparse_factors(B, N, 1.0, examples_per_mix=3)
SOFT = torch.full((B, C), 1 / C)
INVALID = {
    "negative attention": (
        {"attention": changed(V["attention"], -0.5)},
        r"attention must be .* not negative, got -0\.5",
    ),
    "NaN attention": ({"attention": changed(V["attention"], torch.nan)}, "attention must be finite .* got nan"),
    "infinite attention": ({"attention": changed(V["attention"], torch.inf)}, "attention must be finite .* got inf"),
    "negative factors": ({"factors": changed(FACTORS, -2.0)}, r"factors must not be negative, got -2\.0"),
    "NaN factors": ({"factors": changed(FACTORS, torch.nan)}, "factors must not be negative, got nan"),
    "factors that sum to 2": ({"factors": 2 * FACTORS}, r"factors must sum to 1 .* got 2\.0.*divide each column"),
    "factors that sum to 0": ({"factors": 0 * FACTORS}, r"factors must sum to 1 .* got 0\.0"),
    "negative sparse factors": (
        {"factors": SparseFactors(SPARSE.index, changed(SPARSE.weight, -1.0), B)},
        r"factors must not be negative, got -1\.0",
    ),
    "sparse factors of no example": (
        {"factors": SparseFactors(changed(SPARSE.index, B), SPARSE.weight, B)},
        "factors.index must have rows of distinct examples from 0 to 5",
    ),
    "repeated sparse factors": (
        {"factors": SparseFactors(torch.zeros_like(SPARSE.index), SPARSE.weight, B)},
        "some of them twice in a row",
    ),
    "no mixed examples": ({"factors": FACTORS[:, :0]}, r"factors must have the shape .* n >= 1; got \(6, 0\)"),
    "label out of range": ({"labels": changed(V["labels"], C)}, "labels must be class indices from 0 to 3.*got 4"),
    "negative label": ({"labels": changed(V["labels"], -1)}, "labels must be class indices from 0 to 3.*got -1"),
    "uint8 label 156": ({"labels": changed(V["labels"], 156, torch.uint8)}, "labels must be .* got 156"),
    "negative probability": ({"labels": changed(SOFT, -0.25)}, r"labels must be probabilities .* got -0\.25"),
    "NaN probability": ({"labels": changed(SOFT, torch.nan)}, "labels must be probabilities .* got nan"),
    "probabilities that sum to 3": ({"labels": torch.full((B, C), 0.75)}, r"rows that sum to 1.* got a sum of 3\.0"),
    "multi-hot labels": ({"labels": torch.ones(B, C)}, 'criterion="binary_cross_entropy" for several classes'),
    "multi-hot booleans": ({"labels": torch.ones(B, C, dtype=torch.bool)}, "rows that sum to 1"),
    "unknown criterion": ({"criterion": "nonsense"}, "criterion must be one of cross_entropy, .* got 'nonsense'"),
    "negative smoothing": ({"label_smoothing": -3}, r"label_smoothing must be a number in \[0, 1\], got -3"),
    "smoothing above 1": ({"label_smoothing": 1.01}, r"label_smoothing must be a number in \[0, 1\], got 1\.01"),
    "NaN smoothing": ({"label_smoothing": float("nan")}, r"label_smoothing must be a number in \[0, 1\], got nan"),
    "text smoothing": ({"label_smoothing": "0.1"}, r"label_smoothing must be a number in \[0, 1\], got '0\.1'"),
    "no permutation": ({"permutations": torch.zeros(R, B, dtype=torch.long)}, "each of the 6 examples once per row"),
    "permutation out of range": ({"permutations": changed(V["permutations"], B)}, "permutations must contain each"),
    "int32 permutations": ({"permutations": V["permutations"].int()}, "permutations must have the dtype torch.int64"),
    "columns beyond the end": ({"columns": slice(0, N + 1)}, "columns must be slice.*stop <= 8"),
    "columns without a stop": ({"columns": slice(2, None)}, "columns must be slice"),
    "columns with a step": ({"columns": slice(0, 4, 2)}, "columns must be slice"),
    "reversed columns": ({"columns": slice(4, 2)}, "columns must be slice"),
    "integer logits": ({"token_logits": torch.ones(B, R, C, dtype=torch.long)}, "token_logits must have a floating"),
    "empty batch": (
        {
            "token_logits": torch.zeros(0, R, C),
            "labels": torch.zeros(0, dtype=torch.long),
            "attention": torch.zeros(0, R),
            "factors": torch.zeros(0, N),
            "permutations": None,
        },
        r"token_logits must have the shape .* none of them 0, got \(0, 5, 4\)",
    ),
    "infinite targets of mse": ({"criterion": "mse", "labels": changed(SOFT, torch.inf)}, "labels must be finite"),
    "binary target of 2": (
        {"criterion": "binary_cross_entropy", "labels": changed(SOFT, 2.0)},
        r"labels must be probabilities in \[0, 1\] .* got 2\.0",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_arguments_of_the_dense_loss_raise(case):
    change, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        dense_multimix_loss(**{**valid_arguments(), **change})


DENSE_ONLY = ("attention", "permutations", "columns")


@pytest.mark.parametrize(
    "case", [case for case, (change, _) in INVALID.items() if len(change) > 2 or not change.keys() & set(DENSE_ONLY)]
)
def test_invalid_arguments_of_the_pooled_loss_raise(case):
    change, message = INVALID[case]
    given = {**valid_arguments(), **change}
    options = {key: given[key] for key in ("criterion", "label_smoothing") if key in given}
    message = "logits must have the shape .* none of them 0" if case == "empty batch" else message.replace("token_", "")
    with pytest.raises(ValueError, match=message):
        multimix_loss(given["token_logits"][:, 0], given["labels"], given["factors"], **options)


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (torch.zeros(3, 4), torch.tensor([0, 1, 4]), {}, "labels must be class indices from 0 to 3.*got 4"),
        (torch.zeros(3, 4), torch.zeros(3), {}, "must be integers, got torch.float32"),
        (torch.zeros(3, 4), torch.zeros(2).long(), {}, r"labels must have the shape \(3,\) or \(3, 4\)"),
        (torch.zeros(3, 4), torch.ones(3, 4), {}, "rows that sum to 1"),
        (torch.zeros(3, 4), -torch.ones(3, 4), {}, "labels must be probabilities"),
        (torch.zeros(3, 4), torch.zeros(3, 4), {"criterion": "hinge"}, "criterion must be one of"),
        (torch.zeros(3, 4), torch.zeros(3).long(), {"label_smoothing": 2}, "label_smoothing must be a number"),
        (torch.zeros(3, 4).long(), torch.zeros(3).long(), {}, "logits must have a floating-point dtype"),
        (torch.zeros(0, 4), torch.zeros(0).long(), {}, "logits must have the shape .* none of them 0"),
        (torch.zeros(3, 4), torch.zeros(3), {"criterion": "mse"}, "labels must have the shape"),
    ],
)
def test_invalid_arguments_of_the_clean_loss_raise(logits, labels, options, message):
    with pytest.raises(ValueError, match=message):
        clean_loss(logits, labels, **options)


def test_invalid_arguments_of_helpers_raise():
    with pytest.raises(ValueError, match="criterion must be one of"):
        count_valid(torch.zeros(2), torch.zeros(2, 3), "hinge")
    with pytest.raises(ValueError, match="criterion must be one of"):
        soft_targets(torch.zeros(2), 3, criterion="hinge")
    with pytest.raises(ValueError, match="labels must be class indices from 0 to 2"):
        soft_targets(torch.tensor([0, 3]), 3)


@pytest.mark.parametrize("alpha", [1e-30, 1e30, (1e-29, 1e300), "1", None, [], (1.0, 2.0, 3.0), True + 1j])
def test_alpha_outside_the_range_of_float32_raises(alpha):
    with pytest.raises(ValueError, match="alpha must be a positive number or an interval"):
        sample_factors(4, 5, alpha)


@pytest.mark.parametrize("size", [0, -1, 2.5, "3", None, True])
def test_sizes_must_be_positive_whole_numbers(size):
    with pytest.raises(ValueError, match="num_examples must be at least 1 and a whole number"):
        sample_factors(size, 5, 1.0)
    with pytest.raises(ValueError, match="num_mixed must be at least 1 and a whole number"):
        sample_sparse_factors(4, size, 1.0, examples_per_mix=2)
    with pytest.raises(ValueError, match="num_locations must be at least 1 and a whole number"):
        sample_permutations(size, 3)


def test_other_arguments_of_the_samplers_raise():
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        sample_factors(4, 5, 1.0, dtype=torch.int64)
    with pytest.raises(ValueError, match="dtype must be a floating-point type such as torch.float32, got 'float32'"):
        sample_factors(4, 5, 1.0, dtype="float32")
    for sample in (
        lambda generator: sample_factors(4, 5, 1.0, generator=generator),
        lambda generator: sample_sparse_factors(4, 5, 1.0, examples_per_mix=2, generator=generator),
        lambda generator: sample_permutations(4, 5, generator=generator),
    ):
        with pytest.raises(ValueError, match="generator must be a torch.Generator, got 3: torch.Generator"):
            sample(3)
    for value in (1, 0, float("inf"), float("nan"), "3", None):
        with pytest.raises(ValueError, match="effective_examples must be greater than 1"):
            alpha_for(value, 8)


NO_TENSORS = {
    "list": (lambda x: x.tolist(), "must be a tensor, got list: convert it with torch.as_tensor"),
    "array": (lambda x: x.numpy(), "must be a tensor, got ndarray"),
    "None": (lambda x: None, "must be a tensor, got NoneType"),
    "sparse layout": (lambda x: x.to_sparse(), "must be a dense tensor, got the layout torch.sparse_coo"),
    "other device": (lambda x: x.to("meta"), "must be on the device of (token_)?logits, cpu, got meta"),
}


@pytest.mark.parametrize("case", NO_TENSORS)
@pytest.mark.parametrize("name", ["token_logits", "labels", "attention", "factors", "permutations"])
def test_arguments_that_are_no_tensors_of_one_device_raise(name, case):
    change, message = NO_TENSORS[case]
    given = {**V, name: change(V[name])}
    if (name, case) == ("permutations", "None"):
        dense_multimix_loss(**given)
        return
    with pytest.raises(ValueError, match=message if (name, case) != ("token_logits", "other device") else "must be on"):
        dense_multimix_loss(**given)
    if name in ("token_logits", "labels", "factors"):
        logits = V["token_logits"][:, 0] if name != "token_logits" else change(V["token_logits"][:, 0].contiguous())
        with pytest.raises(ValueError, match=message if name != "token_logits" else "must be"):
            multimix_loss(logits, given["labels"], given["factors"])
        if name != "factors":
            with pytest.raises(ValueError, match=message if name != "token_logits" else "must be"):
                clean_loss(logits, given["labels"])


def test_sparse_factors_on_another_device_raise():
    factors = SparseFactors(SPARSE.index.to("meta"), SPARSE.weight.to("meta"), B)
    with pytest.raises(ValueError, match="factors must be on the device of token_logits, cpu, got meta"):
        dense_multimix_loss(V["token_logits"], V["labels"], V["attention"], factors)


@pytest.mark.parametrize("name", ["labels", "factors"])
def test_gradients_that_the_loss_does_not_compute_raise(name):
    given = {**V, "labels": SOFT.clone()}
    given[name] = given[name].clone().requires_grad_()
    for loss, logits in ((dense_multimix_loss, V["token_logits"]), (multimix_loss, V["token_logits"][:, 0])):
        rest = (given["factors"],) if loss is multimix_loss else (V["attention"], given["factors"])
        with pytest.raises(ValueError, match=f"{name} must not require a gradient: .* Pass {name}.detach"):
            loss(logits, given["labels"], *rest)
        with torch.no_grad():
            assert loss(logits, given["labels"], *rest).isfinite()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_transforms_of_functions_raise_one_sentence(transform):
    logits = V["token_logits"] if transform is not torch.func.vmap else V["token_logits"][None]
    with pytest.raises(ValueError, match="do not support the transforms of torch.func"):
        transform(lambda x: dense_multimix_loss(x, V["labels"], V["attention"], FACTORS))(logits)
    with pytest.raises(ValueError, match="do not support the transforms of torch.func"):
        transform(lambda x: multimix_loss(x[..., 0, :], V["labels"], FACTORS))(logits)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int32])
def test_logits_of_other_types_raise(dtype):
    with pytest.raises(ValueError, match="token_logits must have a floating-point dtype of 16 bits or more, got"):
        dense_multimix_loss(V["token_logits"].to(dtype), V["labels"], V["attention"], FACTORS)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda x: torch.stack([x, x], dim=-1).flatten(-2)[..., ::2],
    "part": lambda x: torch.cat([x, x], dim=0)[: len(x)],
    "inference": lambda x: _inference_copy(x),
}


def _inference_copy(x):
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["token_logits", "attention", "factors", "permutations"])
def test_memory_layout_changes_no_loss_and_no_gradient(name, layout):
    results = []
    for given in (dict(V), {**V, name: LAYOUTS[layout](V[name])}):
        logits = given["token_logits"].clone().requires_grad_()
        loss = dense_multimix_loss(**{**given, "token_logits": logits * 1})
        loss.backward()
        results.append((loss.detach(), logits.grad))
    torch.testing.assert_close(*results)


def test_expanded_arguments_equal_copies():
    given = {
        **V,
        "token_logits": V["token_logits"][:, :1].expand(B, R, C),
        "attention": torch.ones(B, 1).expand(B, R),
        "factors": FACTORS.expand(R, B, N),
        "permutations": None,
    }
    copies = {name: x if x is None else x.clone() for name, x in given.items()}
    torch.testing.assert_close(dense_multimix_loss(**given), dense_multimix_loss(**copies), rtol=0, atol=0)


@pytest.mark.parametrize("r", [1, 5])
def test_boolean_labels_of_examples_are_class_indices(r):
    logits, attention, factors = torch.randn(B, r, 2), torch.rand(B, r), sample_factors(B, N, 1.0)
    labels = torch.tensor([True, False, True, True, False, False])
    for loss, arguments_ in [
        (dense_multimix_loss, (logits, attention, factors)),
        (multimix_loss, (logits[:, 0], factors)),
        (clean_loss, (logits[:, 0],)),
    ]:
        expected = loss(arguments_[0], labels.long(), *arguments_[1:])
        assert torch.equal(loss(arguments_[0], labels, *arguments_[1:]), expected)


def test_integer_one_hot_labels_per_location_are_probabilities():
    given = valid_arguments()
    labels = torch.randint(C, (B, R))
    expected = dense_multimix_loss(**{**given, "labels": labels})
    one_hot = torch.nn.functional.one_hot(labels, C)
    torch.testing.assert_close(dense_multimix_loss(**{**given, "labels": one_hot}), expected)


def test_integer_one_hot_labels_with_as_many_classes_as_locations_raise():
    labels = torch.nn.functional.one_hot(torch.randint(10, (6,)), 10)
    logits, attention, factors = torch.randn(6, 10, 10), torch.rand(6, 10), sample_factors(6, 9, 1.0)
    with pytest.raises(ValueError, match="may be one-hot or class indices of each location"):
        dense_multimix_loss(logits, labels, attention, factors)
    dense_multimix_loss(logits, labels.float(), attention, factors)
    dense_multimix_loss(logits, torch.randint(10, (6, 10)), attention, factors)


def test_values_are_not_checked_without_validate_args():
    given = {**valid_arguments(), "factors": 2 * FACTORS}
    loss = dense_multimix_loss(**given, validate_args=False)
    torch.testing.assert_close(loss, dense_multimix_loss(**{**given, "factors": FACTORS}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounded_factors_and_probabilities_are_valid(dtype):
    torch.manual_seed(0)
    b, c = 300, 200
    labels = torch.rand(b, c).softmax(dim=1).to(dtype)
    factors = sample_factors(b, 50, 1.0).to(dtype)
    logits, attention = torch.randn(b, 2, c), torch.rand(b, 2).to(dtype)
    assert dense_multimix_loss(logits, labels, attention, factors).isfinite()
    assert clean_loss(logits[:, 0], labels).isfinite()


class NoSynchronization(TorchDispatchMode):
    """Raises when the value of a tensor is read, which would wait for an accelerator."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


class Elsewhere:
    """A condition that reports another device."""

    def __init__(self, condition):
        self.condition, self.device = condition, torch.device("cuda")


@pytest.fixture
def on_accelerator(monkeypatch):
    """Check arguments as on an accelerator; returns the asserted conditions."""
    asserted, require = [], arguments.require
    monkeypatch.setattr(arguments, "require", lambda condition, message: require(Elsewhere(condition), message))
    monkeypatch.setattr(torch, "_assert_async", lambda x, message: asserted.append(x.condition))
    return asserted


def check_everything(given):
    arguments.check_attention_values(given["attention"])
    arguments.check_factor_values(given["factors"])
    arguments.check_permutation_values(given["permutations"])
    arguments.check_class_indices(given["labels"], C)
    arguments.check_targets(given.get("targets", SOFT), "cross_entropy")


def test_values_are_asserted_without_synchronization_on_accelerators(on_accelerator):
    with NoSynchronization():
        check_everything(valid_arguments())
    assert len(on_accelerator) == 6 and all(bool(condition) for condition in on_accelerator)


@pytest.mark.parametrize(
    "case",
    [
        "negative attention",
        "NaN attention",
        "negative factors",
        "factors that sum to 2",
        "no permutation",
        "negative label",
    ],
)
def test_invalid_values_fail_the_assertion_on_accelerators(on_accelerator, case):
    with NoSynchronization():
        check_everything({**valid_arguments(), **INVALID[case][0]})
    assert sum(not bool(condition) for condition in on_accelerator) == 1
