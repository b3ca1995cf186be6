"""Losses and gradients are finite and equal to float64 for every valid input, also if factors are small or masked."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_hf.functional import clean_loss, dense_multimix_loss, devices, inputs, mixers, multimix_loss
from mm_hf.functional.factors import alpha_for, sample_factors, sample_permutations, sample_sparse_factors
from tests.functional import literal

DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
TINY = torch.finfo(torch.float32).tiny  # the smallest normal number


def random_problem(seed):
    """Draw logits, labels, attention, factors and options; the extremes are as likely as ordinary numbers."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    b, r, c, n = pick(1, 2, 3, 6), pick(1, 2, 3), pick(2, 3, 5), pick(1, 2, 5)
    dtype = pick(*DTYPES)
    working = torch.promote_types(dtype, torch.float32)
    criterion = pick("cross_entropy", "cross_entropy", "cross_entropy", "binary_cross_entropy", "mse")
    soft, local, masked = pick(True, False) or criterion != "cross_entropy", pick(True, False), pick(True, False)
    masked = masked and criterion != "mse"
    shape = (b, r) if local else (b,)
    valid_classes = c - 1 if masked else c
    if soft:
        labels = torch.zeros(*shape, c, dtype=torch.float64)
        labels[..., :valid_classes] = (rand(*shape, valid_classes) + 0.01).clamp(max=1)
        if criterion == "cross_entropy":
            labels /= labels.sum(dim=-1, keepdim=True)
            labels[rand(*shape) < 0.2] = 0
        labels = labels.to(working)
    else:
        labels = torch.randint(valid_classes, shape, generator=generator)
        labels[rand(*shape) < 0.2] = -100
    # Attention from 1 down to the smallest normal number, and padding.
    attention = 10 ** (-rand(b, r) * pick(0.1, 6, 37.9))
    attention = attention.to(torch.float32).clamp(min=TINY)
    attention[rand(b, r) < pick(0, 0.3, 0.8)] = 0
    alpha = pick(
        1e-29,
        1e-9,
        1e-4,
        0.016,
        0.1,
        1.0,
        (0.5, 2.0),
        1e29,
        (1e-3, 1e3),
        *(alpha_for(k, b) for k in (1 + 1e-6, 1.2, 3, 1e6)),
    )
    kind = pick("sparse", "dense", "per location")
    how = {"generator": generator, "dtype": working}
    if kind == "sparse":
        factors = sample_sparse_factors(b, n, alpha, examples_per_mix=pick(*range(1, b + 1)), **how)
    else:
        factors = sample_factors(b, n, alpha, num_locations=r if kind == "per location" else None, **how)
    options = {"criterion": criterion, "confidence_weighted": pick(True, False)}
    if criterion == "cross_entropy" and not masked:
        options["label_smoothing"] = pick(0.0, 0.1, 1.0)
    if kind != "per location" and pick(True, False):
        options["permutations"] = sample_permutations(r, b, generator=generator)
    if pick(True, False, False):
        options["columns"] = slice(n // 3, n - n // 3)
    logits = (pick(0.1, 3, 30) * torch.randn(b, r, c, generator=generator)).to(dtype)
    if masked:
        logits[..., -1] = pick(-torch.inf, torch.finfo(dtype).min)
    if pick(True, False):
        logits[attention == 0] = pick(torch.nan, torch.inf, 1.0)  # padding may have any logits
    return logits, labels, attention, factors, options, local


def expected_loss(logits, labels, attention, factors, options, local):
    """Compute the loss and its gradients by the literal reference."""
    options = dict(options)
    matrix = factors if isinstance(factors, torch.Tensor) else factors.dense()
    if matrix.ndim == 2:
        permutations = options.pop("permutations", None)
        matrix = matrix.expand(logits.shape[1], *matrix.shape)
        if permutations is not None:
            matrix = torch.stack([matrix[j][row] for j, row in enumerate(permutations)])
    return literal.dense_multimix(
        logits, labels, attention, matrix.double(), options.get("label_smoothing", 0.0), options["confidence_weighted"],
        options["criterion"], local, options.get("columns", slice(None)),
    )  # fmt: skip


def check(problem, by_attention=False):
    """Compare a problem's loss and gradients with the literal reference."""
    logits, labels, attention, factors, options, local = problem
    if by_attention:  # the reference has no gradient of the share of infinite logits
        logits = logits.nan_to_num(0, 0, 0).clamp(min=-1e4)
    z, a = logits.clone().requires_grad_(), attention.clone().requires_grad_(by_attention)
    loss = dense_multimix_loss(z, labels, a, factors, **options)
    loss.backward()
    z64, a64 = logits.double().requires_grad_(), attention.double().requires_grad_(by_attention)
    expected = expected_loss(z64, labels, a64, factors, options, local)
    expected.backward()
    precision = 1e-11 if logits.dtype == torch.float64 else 3e-6
    close(loss, expected, precision)
    rounding = torch.finfo(logits.dtype).eps if logits.dtype in (torch.float16, torch.bfloat16) else 0
    close(z.grad, z64.grad, max(precision, rounding))
    if by_attention:
        # The gradient of a small number is large and cancels: compare the gradient of its logarithm, relative to the
        # loss.
        expected_grad = torch.zeros_like(a64) if a64.grad is None else a64.grad
        scale = max(1.0, float(expected.detach().abs()))
        close(a.grad.double() * attention / scale, expected_grad * attention / scale, 3e-5)  # float32 attention


def close(actual, expected, precision):
    expected = expected.detach().nan_to_num(nan=0.0)  # the reference has no gradient of padding
    assert actual.isfinite().all()
    assert (actual.detach().double() - expected).abs().max() <= precision * max(1.0, float(expected.abs().max()))


@given(st.integers(0, 2**32), st.sampled_from([0.2, 1.0]), st.sampled_from([0, 64]), st.sampled_from([1, 1 << 20]))
def test_loss_and_gradient_equal_float64(seed, sparse_share, few_classes, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixers, "SPARSE_SHARE", sparse_share)
        patch.setattr(inputs, "FEW_CLASSES", few_classes)
        patch.setattr(devices, "chunk_elements", lambda device: chunk)
        check(random_problem(seed))


@given(st.integers(0, 2**32))
def test_gradient_of_attention_equals_float64(seed):
    check(random_problem(seed), by_attention=True)


@pytest.mark.parametrize("criterion", ["cross_entropy", "mse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("small", [1e-20, 1e-30, 1e-33, 1e-37])
def test_gradient_of_small_attention_equals_float64(small, dtype, criterion):
    """Only examples of small attention are in the second mixed example: the gradients are about 1 / attention."""
    logits = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.eye(4)[:3].to(torch.promote_types(dtype, torch.float32))
    attention = torch.tensor([[1.0, 0.02], [small, small], [3 * small, 2 * small]])
    factors = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.5]], dtype=labels.dtype)
    options = {"criterion": criterion, "confidence_weighted": False}
    check((logits, labels, attention, factors, options, False), by_attention=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 65536.0])
def test_gradient_of_padding_and_ignored_examples_is_finite(scale, dtype):
    """The gradient of an attention of 0 grows with 1 / mass, and is multiplied by 0 where the attention was."""
    logits, labels = torch.randn(4, 1, 3, dtype=dtype), torch.tensor([0, 1, -100, 2])
    attention = torch.tensor([[1.0], [1e-38], [0.5], [0.5]], dtype=dtype, requires_grad=True)
    is_location = torch.tensor([[1.0], [1.0], [1.0], [0.0]], dtype=dtype)
    factors = torch.tensor([[1.0, 0.0], [0.0, 1e-30], [0.0, 0.5], [0.0, 0.5]], dtype=dtype)
    factors[0, 1] = torch.finfo(dtype).tiny
    for weighted in (True, False):
        loss = dense_multimix_loss(
            logits, labels, attention * is_location, factors, confidence_weighted=weighted, validate_args=False
        )
        (grad,) = torch.autograd.grad(scale * loss, attention)
        assert grad.isfinite().all() and not grad[2:].any()


def test_share_that_underflows_in_float64_mixes_masked_logits():
    logits = torch.tensor([[[0.3, -torch.inf]], [[-0.5, -torch.inf]]], dtype=torch.float64)
    labels = torch.tensor([[0.2, 0.0], [0.9, 0.0]], dtype=torch.float64)
    factors = torch.tensor([[1.0, 1.0], [0.0, 2.6e-319]], dtype=torch.float64)
    options = {"criterion": "binary_cross_entropy", "confidence_weighted": True}
    check((logits, labels, torch.tensor([[1e-3], [1e-24]]), factors, options, False))


@given(st.integers(0, 2**32))
def test_multimix_loss_equals_float64(seed):
    logits, labels, _, factors, options, local = random_problem(seed)
    factors = factors[0] if isinstance(factors, torch.Tensor) and factors.ndim == 3 else factors
    labels = labels[:, 0] if local else labels
    options = {key: options[key] for key in ("criterion", "label_smoothing") if key in options}
    logits = torch.where(logits.isnan() | (logits == torch.inf), 0, logits)[:, :1]  # every example is mixed
    z, z64 = logits[:, 0].clone().requires_grad_(), logits.double().requires_grad_()
    loss = multimix_loss(z, labels, factors, **options)
    loss.backward()
    ones = torch.ones(len(labels), 1, dtype=torch.float64)
    expected = expected_loss(z64, labels, ones, factors, {**options, "confidence_weighted": False}, False)
    expected.backward()
    rounding = torch.finfo(logits.dtype).eps if logits.dtype in (torch.float16, torch.bfloat16) else 0
    close(loss, expected, 3e-6)
    close(z.grad, z64.grad[:, 0], max(3e-6, rounding))


@given(st.integers(0, 2**32))
def test_clean_loss_equals_float64(seed):
    logits, labels, _, _, options, local = random_problem(seed)
    logits = torch.where(logits.isnan() | (logits == torch.inf), 0, logits)
    logits = logits if local else logits[:, 0]
    criterion, smoothing = options["criterion"], options.get("label_smoothing", 0.0)
    z, z64 = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = clean_loss(z, labels, criterion=criterion, label_smoothing=smoothing)
    loss.backward()
    rows, losses = z64.flatten(0, -2), []
    classes = labels.ndim < z64.ndim
    for row, label in zip(rows, labels.flatten() if classes else labels.flatten(0, -2), strict=True):
        target = literal.target_of_one(label, len(row)) if criterion == "cross_entropy" else label.double()
        if target is not None:
            losses.append(literal.loss_of_one(row, target, smoothing, criterion))
    expected = torch.stack(losses).mean() if losses else (z64 * 0).nan_to_num(0).sum()
    expected.backward()
    rounding = torch.finfo(logits.dtype).eps if logits.dtype in (torch.float16, torch.bfloat16) else 0
    close(loss, expected, 3e-6)
    close(z.grad, z64.grad, max(3e-6, rounding))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("alpha", "examples_per_mix"),
    [(0.1, None), (0.01, None), (1e-3, None), (alpha_for(1.2, 128), None), (alpha_for(3, 128), 128), (0.4, 8)],
)
def test_location_that_one_example_occupies_has_the_loss_of_that_example(alpha, examples_per_mix, weighted):
    torch.manual_seed(0)
    b, n, c = 128, 40, 5
    if examples_per_mix is None:
        factors = sample_factors(b, n, alpha)
    else:
        factors = sample_sparse_factors(b, n, alpha, examples_per_mix=examples_per_mix)
    matrix = factors if isinstance(factors, torch.Tensor) else factors.dense()
    example = int(matrix.sum(dim=1).argmin())  # has the smallest mass
    logits, labels = torch.randn(b, 2, c, requires_grad=True), torch.randint(c, (b,))
    attention = torch.zeros(b, 2)
    attention[example, 1] = 0.3
    loss = dense_multimix_loss(logits, labels, attention, factors, confidence_weighted=weighted)
    (grad,) = torch.autograd.grad(loss, logits)
    if matrix[example].any():
        expected = clean_loss(logits[example, 1][None], labels[example][None])
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, logits)[0])
    else:
        assert loss == 0 and not grad.any()


@pytest.mark.parametrize("mass", [2.9e-39, 1e-42, 1e-45, 1e-38])
def test_mass_without_a_float32_inverse_is_mixed_in_float64(mass):
    """The factors of one column are so small at the only valid examples that 1 / mass is infinite in float32."""
    factors = torch.tensor([[1.0, 1.0], [mass, mass], [mass, 3 * mass]])
    logits = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    attention = torch.tensor([[0.0], [1.0], [1.0]])
    labels = torch.tensor([0, 1, 2])
    loss = dense_multimix_loss(logits, labels, attention, factors)
    (grad,) = torch.autograd.grad(loss, logits)
    options = {"criterion": "cross_entropy", "confidence_weighted": True}
    expected = expected_loss(logits.detach().double(), labels, attention.double(), factors, options, False)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert grad.isfinite().all() and grad[1:].any()


def test_small_mass_is_left_out_on_accelerators(monkeypatch):
    """Without the choice of float64, which would wait for the device, the loss stays finite."""
    monkeypatch.setattr(devices, "is_accelerator", lambda device: True)
    factors = torch.tensor([[1.0, 0.5], [1e-40, 0.5]])
    logits, labels = torch.randn(2, 1, 4, requires_grad=True), torch.tensor([0, 1])
    attention = torch.tensor([[0.0], [1.0]])
    for weighted in (True, False):
        loss = dense_multimix_loss(logits, labels, attention, factors, confidence_weighted=weighted)
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[1], labels[1:]))
        assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("alpha", [1e-29, 1e29, (1e-29, 1e29), alpha_for(1 + 1e-12, 128), alpha_for(1e6, 128)])
def test_factors_of_extreme_alphas_are_valid(alpha):
    torch.manual_seed(0)
    for factors in (
        sample_factors(128, 200, alpha),
        sample_sparse_factors(128, 200, alpha, examples_per_mix=8).dense(),
    ):
        assert factors.isfinite().all() and (factors >= 0).all()
        torch.testing.assert_close(factors.sum(dim=0), torch.ones(200))
