import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_hf.functional import clean_loss, dense_multimix_loss, devices, inputs, multimix_loss, sample_factors
from mm_hf.functional.factors import sample_permutations
from tests.functional import literal


@pytest.fixture(autouse=True, scope="module", params=["class shares", "one-hot targets", "mixing matrix"])
def way_of_mixing(request):
    """Run every test with each way of mixing, for any number of classes; the last one is that of accelerators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "FEW_CLASSES", 0 if request.param == "class shares" else 64)
        patch.setattr(devices, "is_accelerator", lambda device: request.param == "mixing matrix")
        yield


@st.composite
def problems(draw, dense=True):
    """Draw a batch: features, a classifier, labels (indices with some -100, or soft), attention with zeros, factors."""
    b, r, d, c, n = (draw(st.integers(1, high)) for high in (5, 4, 3, 4, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    random = {"generator": generator, "dtype": torch.float64}
    features = torch.randn(b, r, d, **random)
    weight, bias = 2 * torch.randn(c, d, **random), torch.randn(c, **random)
    if draw(st.booleans()):
        labels = torch.randint(c, (b,), generator=generator)
        labels[torch.rand(b, generator=generator) < 0.2] = -100
    else:
        labels = torch.rand(b, c, **random) + 0.01
        labels = labels / labels.sum(dim=1, keepdim=True)
    attention = torch.rand(b, r, **random)
    attention[torch.rand(b, r, generator=generator) < 0.3] = 0
    factors = sample_factors(b, n, draw(st.sampled_from([0.1, 1.0, (0.5, 2.0)])), num_locations=r, **random)
    smoothing = draw(st.sampled_from([0.0, 0.1, 1.0]))
    return features, weight, bias, labels, attention, factors, smoothing


def classifier(weight, bias):
    """Return the linear layer as a function of the features of one mixed example."""
    return lambda features: weight @ features + bias


def close(a, b, tolerance):
    # Relative to the largest entry and absolute below 1: a single gradient entry may cancel to zero.
    b = torch.zeros_like(a) if b is None else b
    assert (a.double() - b.double()).abs().max() <= tolerance * max(1.0, float(b.detach().abs().max()))


@given(problems(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_dense_multimix_equals_mixing_features(problem, weighted, dtype):
    features, weight, bias, labels, attention, factors, smoothing = problem
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    ours, theirs = ([t.detach().clone().requires_grad_() for t in (features, weight, bias)] for _ in range(2))
    z64, *linear = theirs
    expected = literal.dense_multimix(
        z64, labels, attention, factors, smoothing, weighted, classify=classifier(*linear)
    )
    expected.backward()
    z, w, v = (t.to(dtype) for t in ours)
    loss = dense_multimix_loss(
        z @ w.mT + v,
        labels,
        attention.to(dtype),
        factors.to(dtype),
        label_smoothing=smoothing,
        confidence_weighted=weighted,
    )
    loss.backward()
    assert loss.dtype == dtype
    close(loss, expected, tolerance)
    for our, their in zip(ours, theirs, strict=True):
        close(our.grad, their.grad, 10 * tolerance)


@given(problems(), st.sampled_from([torch.float32, torch.float64]))
def test_multimix_equals_mixing_features(problem, dtype):
    features, weight, bias, labels, _, factors, smoothing = problem
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    ours, theirs = ([t.detach().clone().requires_grad_() for t in (features[:, 0], weight, bias)] for _ in range(2))
    z64, *linear = theirs
    expected = literal.multimix(z64, labels, factors[0], smoothing, classifier(*linear))
    expected.backward()
    z, w, v = (t.to(dtype) for t in ours)
    loss = multimix_loss(z @ w.mT + v, labels, factors[0].to(dtype), label_smoothing=smoothing)
    loss.backward()
    close(loss, expected, tolerance)
    for our, their in zip(ours, theirs, strict=True):
        close(our.grad, their.grad, 10 * tolerance)


@given(problems(), st.booleans(), st.sampled_from(["cross_entropy", "binary_cross_entropy", "mse"]), st.booleans())
def test_labels_per_location_and_other_criteria_equal_mixing_features(problem, weighted, criterion, local):
    features, weight, bias, _, attention, factors, smoothing = problem
    (b, r, _), c = features.shape, len(bias)
    generator = torch.Generator().manual_seed(b + 10 * r + 100 * c)
    if criterion == "cross_entropy" and local:
        labels = torch.randint(c, (b, r), generator=generator)
        labels[torch.rand(b, r, generator=generator) < 0.2] = -100
    else:
        labels = torch.rand((b, r, c) if local else (b, c), generator=generator, dtype=torch.float64)
        labels = labels / labels.sum(-1, keepdim=True) if criterion == "cross_entropy" else labels
        smoothing = 0.0
    ours, theirs = (
        [t.detach().clone().requires_grad_() for t in (features, weight, bias, attention)] for _ in range(2)
    )
    z64, w64, v64, a64 = theirs
    expected = literal.dense_multimix(
        z64, labels, a64, factors, smoothing, weighted, criterion, local, classify=classifier(w64, v64)
    )
    (expected + 0 * theirs[3].sum()).backward()
    z, w, v, a = ours
    options = {"label_smoothing": smoothing, "confidence_weighted": weighted, "criterion": criterion}
    loss = dense_multimix_loss(z @ w.mT + v, labels, a, factors, **options)
    loss.backward()
    close(loss, expected, 1e-12)
    for our, their in zip(ours, theirs, strict=True):
        close(our.grad, their.grad, 1e-9)
    if local:  # also in float32, and without a gradient of the attention, which changes how labels are mixed
        z, w, v = (t.detach().float().requires_grad_() for t in (features, weight, bias))
        loss = dense_multimix_loss(z @ w.mT + v, labels, attention.float(), factors.float(), **options)
        loss.backward()
        close(loss, expected, 1e-6)
        close(z.grad, theirs[0].grad, 1e-5)


def test_integer_labels_per_location_are_class_indices_when_r_equals_c():
    logits, _, attention, factors = dense_batch(c=5)
    labels = torch.randint(5, (6, 5))
    one_hot = torch.nn.functional.one_hot(labels, 5).double()
    torch.testing.assert_close(
        dense_multimix_loss(logits, labels, attention, factors),
        dense_multimix_loss(logits, one_hot, attention, factors),
    )
    first = torch.nn.functional.one_hot(labels[:, 0], 5)  # one-hot integers (b, c), where r is not c
    torch.testing.assert_close(
        dense_multimix_loss(logits[:, :3], first, attention[:, :3], factors[:3]),
        dense_multimix_loss(logits[:, :3], labels[:, 0], attention[:, :3], factors[:3]),
    )


def test_mse_accepts_labels_of_shape_b_for_one_output():
    labels = torch.randn(6, dtype=torch.float64)
    logits, _, attention, factors = dense_batch(c=1)
    loss = dense_multimix_loss(logits, labels, attention, factors, criterion="mse", confidence_weighted=False)
    mixing = attention.T[..., None] * factors
    mixing = mixing / mixing.sum(dim=1, keepdim=True)
    expected = torch.einsum("rbn,br->rn", mixing, logits[..., 0] - labels[:, None]).square().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        multimix_loss(logits[:1, 0], labels[:1], factors[0, :1] * 0 + 1, criterion="mse"),
        (logits[0, 0, 0] - labels[0]).square(),
    )


@given(problems(), st.booleans())
def test_gradient_of_attention_equals_mixing_features(problem, weighted):
    features, weight, bias, labels, attention, factors, smoothing = problem
    ours, theirs = (attention.clone().requires_grad_() for _ in range(2))
    (
        0 * theirs.sum()
        + literal.dense_multimix(
            features, labels, theirs, factors, smoothing, weighted, classify=classifier(weight, bias)
        )
    ).backward()
    dense_multimix_loss(
        features @ weight.mT + bias,
        labels,
        ours,
        factors,
        label_smoothing=smoothing,
        confidence_weighted=weighted,
    ).backward()
    close(ours.grad, theirs.grad, 1e-9)


@pytest.mark.parametrize("weighted", [True, False])
def test_gradcheck(weighted):
    torch.manual_seed(0)
    logits = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    attention = torch.rand(4, 3, dtype=torch.float64).add_(0.1).requires_grad_()
    labels = torch.randint(5, (4,))
    factors = sample_factors(4, 6, 0.7, num_locations=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z, a: dense_multimix_loss(z, labels, a, factors, confidence_weighted=weighted), (logits, attention)
    )


def test_second_derivatives_raise():
    logits = torch.randn(4, 5, requires_grad=True)
    loss = multimix_loss(logits**2, torch.randint(5, (4,)), sample_factors(4, 6, 1.0))
    with pytest.raises(RuntimeError, match="without create_graph=True"):
        torch.autograd.grad(loss, logits, create_graph=True)


def dense_batch(b=6, r=5, c=4, n=16):
    torch.manual_seed(0)
    factors = sample_factors(b, n, 0.5, num_locations=r, dtype=torch.float64)
    logits = torch.randn(b, r, c, dtype=torch.float64)
    return logits, torch.randint(c, (b,)), torch.rand(b, r, dtype=torch.float64), factors


def test_loss_is_invariant_to_permuting_examples_locations_and_columns():
    logits, labels, attention, factors = dense_batch()
    expected = dense_multimix_loss(logits, labels, attention, factors)
    examples, locations, columns = (torch.randperm(n) for n in (6, 5, 16))
    torch.testing.assert_close(
        dense_multimix_loss(logits[examples], labels[examples], attention[examples], factors[:, examples]), expected
    )
    torch.testing.assert_close(
        dense_multimix_loss(logits[:, locations], labels, attention[:, locations], factors[locations]), expected
    )
    torch.testing.assert_close(dense_multimix_loss(logits, labels, attention, factors[:, :, columns]), expected)


def test_loss_is_invariant_to_scaling_the_attention_of_a_location():
    logits, labels, attention, factors = dense_batch()
    expected = dense_multimix_loss(logits, labels, attention, factors)
    scaled = attention * torch.tensor([1e-30, 1e-3, 1.0, 7.0, 1e30])
    torch.testing.assert_close(dense_multimix_loss(logits, labels, scaled, factors), expected)
    single = [t.float() for t in (logits, scaled / 1e8, factors)]
    torch.testing.assert_close(
        dense_multimix_loss(single[0], labels, single[1], single[2]), expected.float(), rtol=1e-5, atol=1e-6
    )


def test_shared_factors_equal_repeated_factors():
    logits, labels, attention, factors = dense_batch()
    everywhere = factors[:1].expand(5, -1, -1)
    torch.testing.assert_close(
        dense_multimix_loss(logits, labels, attention, factors[0]),
        dense_multimix_loss(logits, labels, attention, everywhere),
    )


def test_permutations_permute_the_rows_of_shared_factors_at_each_location():
    logits, labels, attention, factors = dense_batch()
    permutations = sample_permutations(5, 6)
    assert torch.equal(permutations.sort(dim=1).values, torch.arange(6).expand(5, 6))
    by_hand = torch.stack([factors[0][order] for order in permutations])
    torch.testing.assert_close(
        dense_multimix_loss(logits, labels, attention, factors[0], permutations=permutations),
        dense_multimix_loss(logits, labels, attention, by_hand),
    )


def test_loss_and_gradient_match_a_vectorized_reference_for_any_number_of_classes():
    torch.manual_seed(0)
    for c in (3, 6, 7, 20):
        logits = torch.randn(6, 5, c, dtype=torch.float64, requires_grad=True)
        labels, attention = torch.randint(c, (6,)), torch.rand(6, 5, dtype=torch.float64)
        factors = sample_factors(6, 9, 0.5, num_locations=5, dtype=torch.float64)
        loss = dense_multimix_loss(logits, labels, attention, factors)
        mixing = attention.T[:, :, None] * factors
        mass = mixing.sum(dim=1)
        mixing = mixing / mass[:, None]
        targets = torch.einsum("rbn,bc->rnc", mixing, torch.nn.functional.one_hot(labels, c).double())
        mixed = torch.einsum("rbn,brc->rnc", mixing, logits)
        expected = (-(targets * mixed.log_softmax(-1)).sum(-1) * mass / mass.sum(1, keepdim=True)).sum(1).mean()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected)))


def test_chunk_size_does_not_change_loss_and_gradient(monkeypatch):
    logits, labels, attention, factors = dense_batch()
    logits.requires_grad_()
    expected = dense_multimix_loss(logits, labels, attention, factors)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    for elements in (1, 4 * 5, 4 * 16 * 2):
        monkeypatch.setattr("mm_hf.functional.devices.chunk_elements", lambda device, elements=elements: elements)
        loss = dense_multimix_loss(logits, labels, attention, factors)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32_under_autocast(dtype):
    logits, labels, attention, factors = dense_batch()
    half = (30 * logits).to(dtype)
    expected = dense_multimix_loss(half.double(), labels, attention, factors)
    with torch.autocast("cpu", dtype=dtype):
        loss = dense_multimix_loss(half.requires_grad_(), labels, attention.float(), factors.float())
    loss.backward()
    assert loss.dtype == torch.float32 and half.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


def test_loss_of_a_batch_of_one_example_is_the_clean_loss():
    logits, label = torch.randn(1, 7), torch.tensor([3])
    clean = torch.nn.functional.cross_entropy(logits, label, label_smoothing=0.1)
    factors = sample_factors(1, 5, 0.01)
    torch.testing.assert_close(multimix_loss(logits, label, factors, label_smoothing=0.1), clean)
    dense = dense_multimix_loss(logits[:, None], label, torch.ones(1, 1), factors, label_smoothing=0.1)
    torch.testing.assert_close(dense, clean)


def test_ignored_examples_do_not_change_the_loss_of_the_others():
    logits, labels, attention, factors = dense_batch()
    labels[[1, 4]] = -100
    rest = [0, 2, 3, 5]
    remaining = factors[:, rest] / factors[:, rest].sum(dim=1, keepdim=True)
    torch.testing.assert_close(
        dense_multimix_loss(logits, labels, attention, factors, confidence_weighted=False),
        dense_multimix_loss(logits[rest], labels[rest], attention[rest], remaining, confidence_weighted=False),
    )
    torch.testing.assert_close(
        dense_multimix_loss(logits, labels, attention, factors),
        dense_multimix_loss(logits[rest], labels[rest], attention[rest], factors[:, rest], validate_args=False),
    )
    torch.testing.assert_close(
        multimix_loss(logits[:, 0], labels, factors[0]), multimix_loss(logits[rest, 0], labels[rest], remaining[0])
    )


def test_loss_and_gradient_are_zero_without_valid_examples():
    logits = torch.randn(3, 2, 4, requires_grad=True)
    factors = sample_factors(3, 5, 1.0)
    for labels, attention in [(torch.full((3,), -100), torch.ones(3, 2)), (torch.tensor([0, 1, 2]), torch.zeros(3, 2))]:
        loss = dense_multimix_loss(logits, labels, attention, factors)
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and not grad.any()


def test_large_common_offset_of_the_logits_loses_no_precision():
    logits, labels, attention, factors = dense_batch()
    expected = dense_multimix_loss(logits, labels, attention, factors)
    shifted = dense_multimix_loss((logits + 4096).float(), labels, attention.float(), factors.float())
    rounding = dense_multimix_loss((logits + 4096).float().double() - 4096, labels, attention, factors)
    torch.testing.assert_close(shifted.double(), rounding, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rounding, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("masked", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_masked_class_loses_no_precision(masked):
    logits, labels, attention, factors = dense_batch(c=5)
    labels = labels.clamp(max=3)
    logits[..., 4] = masked
    expected = dense_multimix_loss(logits[..., :4], labels, attention, factors)
    loss = dense_multimix_loss(logits.float(), labels, attention.float(), factors.float())
    torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_all_integer_dtypes_are_class_indices(dtype):
    logits, labels, attention, factors = dense_batch()
    for loss, arguments in [
        (dense_multimix_loss, (logits, attention, factors)),
        (multimix_loss, (logits[:, 0], factors[0])),
        (clean_loss, (logits[:, 0],)),
    ]:
        expected = loss(arguments[0], labels, *arguments[1:])
        assert torch.equal(loss(arguments[0], labels.to(dtype), *arguments[1:]), expected)


def test_boolean_labels_are_one_hot():
    logits, labels, attention, factors = dense_batch(c=5)  # as many classes as there are locations
    one_hot = torch.nn.functional.one_hot(labels, 5)
    torch.testing.assert_close(
        dense_multimix_loss(logits, one_hot.bool(), attention, factors),
        dense_multimix_loss(logits, labels, attention, factors),
    )


@pytest.mark.parametrize("wrong", [-1, -7, 4, 9])
def test_class_indices_out_of_range_raise(wrong):
    logits, labels, attention, factors = dense_batch()
    labels[2] = wrong
    for loss, arguments in [
        (dense_multimix_loss, (logits, labels, attention, factors)),
        (dense_multimix_loss, (logits, labels[:, None].expand(-1, 5), attention, factors)),
        (multimix_loss, (logits[:, 0], labels, factors[0])),
        (clean_loss, (logits[:, 0], labels)),
    ]:
        with pytest.raises(ValueError, match=f"labels must be class indices from 0 to 3, .* got {wrong}"):
            loss(*arguments)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_rows_of_zeros_are_ignored(smoothing):
    logits, labels, attention, factors = dense_batch()
    soft = torch.nn.functional.one_hot(labels, 4).double()
    soft[2], labels[2] = 0, -100
    for loss, arguments in [
        (dense_multimix_loss, (logits, attention, factors)),
        (multimix_loss, (logits[:, 0], factors[0])),
        (clean_loss, (logits[:, 0],)),
    ]:
        results = [loss(arguments[0], y, *arguments[1:], label_smoothing=smoothing) for y in (soft, labels)]
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.rand(6)}, "must be integers"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, "labels must be class indices of shape"),
        ({"attention": torch.rand(6, 4)}, "attention must have the shape"),
        ({"factors": torch.rand(5, 7, 3)}, "factors must have the shape"),
        ({"token_logits": torch.rand(6, 4)}, "token_logits must have the shape"),
        ({"permutations": torch.zeros(5, 6, dtype=torch.long)}, "permutations must have the shape"),
        ({"label_smoothing": 1.5}, "label_smoothing must be a number in"),
        (
            {"label_smoothing": 0.1, "criterion": "mse", "labels": torch.rand(6, 4)},
            "label_smoothing must be 0 with criterion='mse'",
        ),
        ({"criterion": "mse"}, r"labels must have the shape \(6, 4\)"),
        ({"criterion": "hinge"}, "criterion must be one of cross_entropy, binary_cross_entropy, mse"),
    ],
)
def test_invalid_arguments_raise_and_are_named(change, message):
    names = ("token_logits", "labels", "attention", "factors")
    with pytest.raises(ValueError, match=message):
        dense_multimix_loss(**{**dict(zip(names, dense_batch(), strict=True)), **change})
