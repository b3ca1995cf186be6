"""The two ways in which factors are applied give one loss, and neither keeps more than a chunk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mm_hf.functional import dense_multimix_loss, mixers, multimix_loss
from mm_hf.functional.factors import SparseFactors, sample_factors, sample_permutations, sample_sparse_factors
from mm_hf.functional.mixers import DenseMixer, SparseMixer, make_mixer


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    monkeypatch.setattr("mm_hf.functional.mixers.SPARSE_SHARE", 1.0)


@st.composite
def problems(draw):
    b, r, c, n = (draw(st.integers(low, high)) for low, high in [(1, 7), (1, 5), (1, 6), (1, 9)])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    random = {"generator": generator, "dtype": torch.float64}
    criterion = draw(st.sampled_from(["cross_entropy", "cross_entropy", "binary_cross_entropy", "mse"]))
    local, soft = draw(st.booleans()), draw(st.booleans()) or criterion != "cross_entropy"
    shape = (b, r) if local else (b,)
    if soft:
        labels = torch.rand(*shape, c, **random)
        labels = labels / labels.sum(-1, keepdim=True) if criterion == "cross_entropy" else labels
    else:
        labels = torch.randint(c, shape, generator=generator)
        labels[torch.rand(shape, generator=generator) < 0.2] = -100
    attention = torch.rand(b, r, **random)
    attention[torch.rand(b, r, generator=generator) < 0.3] = 0
    factors = sample_sparse_factors(b, n, 0.7, num_vertices=draw(st.integers(1, b)), **random)
    options = {"criterion": criterion, "confidence_weighted": draw(st.booleans())}
    if criterion == "cross_entropy":
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    if draw(st.booleans()):
        options["permutations"] = sample_permutations(r, b, generator=generator)
    return torch.randn(b, r, c, **random), labels, attention, factors, options


def loss_and_gradients(logits, labels, attention, factors, options, by_attention):
    logits = logits.clone().requires_grad_()
    attention = attention.clone().requires_grad_(by_attention)
    loss = dense_multimix_loss(logits, labels, attention, factors, **options)
    loss.backward()
    return loss.detach(), logits.grad, attention.grad


@given(problems(), st.booleans(), st.sampled_from([1, 20, 1 << 19]), st.sampled_from([1, 1 << 13]))
def test_vertex_by_vertex_or_by_products(problem, by_attention, chunk, row):
    logits, labels, attention, factors, options = problem
    assert isinstance(make_mixer(factors, logits.device), SparseMixer)
    assert isinstance(make_mixer(factors.dense(), logits.device), DenseMixer)
    products = loss_and_gradients(logits, labels, attention, factors.dense(), options, by_attention)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixers, "CHUNK_ELEMENTS", chunk)
        patch.setattr(mixers, "ROW_ELEMENTS", row)
        vertices = loss_and_gradients(logits, labels, attention, factors, options, by_attention)
    for ours, theirs in zip(vertices, products, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@given(problems(), st.booleans())
def test_single_precision_is_within_its_rounding(problem, sparse):
    logits, labels, attention, factors, options = problem
    expected = loss_and_gradients(logits, labels, attention, factors, options, False)
    single = factors.to(torch.float32) if sparse else factors.dense().float()
    labels = labels.float() if labels.is_floating_point() else labels
    ours = loss_and_gradients(logits.float(), labels, attention.float(), single, options, False)
    for our, their in zip(ours[:2], expected[:2], strict=True):
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-6)


def test_mixing_of_pooled_features_takes_sparse_factors_too():
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 5, dtype=torch.float64), torch.randint(5, (20,))
    factors = sample_sparse_factors(20, 30, 0.4, num_vertices=4, dtype=torch.float64)
    torch.testing.assert_close(multimix_loss(logits, labels, factors), multimix_loss(logits, labels, factors.dense()))


def test_few_vertices_are_added_up_and_many_are_multiplied(monkeypatch):
    monkeypatch.undo()
    few, many = (sample_sparse_factors(100, 10, 0.5, num_vertices=s) for s in (8, 50))
    assert isinstance(make_mixer(few, torch.device("cpu")), SparseMixer)
    assert isinstance(make_mixer(many, torch.device("cpu")), DenseMixer)
    assert isinstance(make_mixer(few, torch.device("cuda")), DenseMixer)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs, self.elements = {x.untyped_storage().data_ptr() for x in inputs}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.inputs:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("kind", ["sparse", "dense", "one for each location"])
@pytest.mark.parametrize("c", [5, 60])
def test_no_more_than_a_chunk_is_alive(kind, c, monkeypatch):
    monkeypatch.setattr(mixers, "CHUNK_ELEMENTS", 1 << 15)
    monkeypatch.setattr(mixers, "ROW_ELEMENTS", 1 << 10)
    b, r, n = 10, 40, 2000
    factors = {
        "sparse": lambda: sample_sparse_factors(b, n, 0.5, num_vertices=3),
        "dense": lambda: sample_factors(b, n, 0.5),
        "one for each location": lambda: sample_factors(b, n, 0.5, num_locations=r),
    }[kind]()
    logits = torch.randn(b, r, c, requires_grad=True)
    attention = torch.rand(b, r)
    inputs = [factors] if isinstance(factors, torch.Tensor) else [factors.index, factors.weight]
    with Largest(*inputs) as largest:
        loss = dense_multimix_loss(logits, torch.randint(c, (b,)), attention, factors)
        torch.autograd.grad(loss, logits)
    # The gradient, a chunk, or the masses of the few locations that are walked together: less than r n, and r n c by far.
    assert largest.elements <= max(1 << 15, b * r * c, 16 * n)


def test_repeatable_to_the_last_bit():
    torch.manual_seed(0)
    logits, labels, attention = torch.randn(64, 16, 20), torch.randint(20, (64,)), torch.rand(64, 16)
    factors, permutations = sample_sparse_factors(64, 3000, 0.4, num_vertices=8), sample_permutations(16, 64)
    runs = [
        loss_and_gradients(logits, labels, attention, factors, {"permutations": permutations}, by_attention)
        for by_attention in (False, False)
    ]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_the_dense_form_of_sparse_factors():
    factors = SparseFactors(torch.tensor([[0, 2], [3, 1]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]]), 4)
    expected = torch.tensor([[0.25, 0], [0, 0.5], [0.75, 0], [0, 0.5]])
    assert torch.equal(factors.dense(), expected) and factors.shape == (4, 2)
