"""Both mixers give the same loss and gradients, and allocate no more than a chunk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mm_hf.functional import dense_multimix_loss, devices, mixers, multimix_loss
from mm_hf.functional.factors import SparseFactors, sample_factors, sample_permutations, sample_sparse_factors
from mm_hf.functional.mixers import DenseMixer, SparseMixer, make_mixer


@pytest.fixture(autouse=True)
def always_sparse(monkeypatch):
    """Use `SparseMixer` for any share of the examples."""
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
    factors = sample_sparse_factors(b, n, 0.7, examples_per_mix=draw(st.integers(1, b)), **random)
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
def test_sparse_and_dense_mixers_agree(problem, by_attention, chunk, row):
    logits, labels, attention, factors, options = problem
    assert isinstance(make_mixer(factors, logits.device), SparseMixer)
    assert isinstance(make_mixer(factors.dense(), logits.device), DenseMixer)
    expected = loss_and_gradients(logits, labels, attention, factors.dense(), options, by_attention)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "chunk_elements", lambda device: chunk)
        patch.setattr(mixers, "ROW_ELEMENTS", row)
        actual = loss_and_gradients(logits, labels, attention, factors, options, by_attention)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@given(problems(), st.sampled_from([1, 20, 1 << 19]))
def test_mixing_matrix_and_mixers_agree(problem, chunk):
    logits, labels, attention, factors, options = problem
    expected = loss_and_gradients(logits, labels, attention, factors, options, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "chunk_elements", lambda device: chunk)
        patch.setattr(devices, "is_accelerator", lambda device: True)
        actual = loss_and_gradients(logits, labels, attention, factors, options, False)
    for ours, theirs in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@given(problems(), st.booleans())
def test_float32_matches_float64(problem, sparse):
    logits, labels, attention, factors, options = problem
    expected = loss_and_gradients(logits, labels, attention, factors, options, False)
    single = factors.to(torch.float32) if sparse else factors.dense().float()
    labels = labels.float() if labels.is_floating_point() else labels
    ours = loss_and_gradients(logits.float(), labels, attention.float(), single, options, False)
    for our, their in zip(ours[:2], expected[:2], strict=True):
        torch.testing.assert_close(our.double(), their, rtol=1e-5, atol=1e-6)


def test_multimix_loss_accepts_sparse_factors():
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 5, dtype=torch.float64), torch.randint(5, (20,))
    factors = sample_sparse_factors(20, 30, 0.4, examples_per_mix=4, dtype=torch.float64)
    torch.testing.assert_close(multimix_loss(logits, labels, factors), multimix_loss(logits, labels, factors.dense()))


def test_sparse_mixer_is_used_on_cpu_for_few_examples_per_mix(monkeypatch):
    monkeypatch.undo()
    few, many = (sample_sparse_factors(100, 10, 0.5, examples_per_mix=s) for s in (8, 50))
    assert isinstance(make_mixer(few, torch.device("cpu")), SparseMixer)
    assert isinstance(make_mixer(many, torch.device("cpu")), DenseMixer)
    assert isinstance(make_mixer(few, torch.device("cuda")), DenseMixer)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is allocated."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs, self.elements = {x.untyped_storage().data_ptr() for x in inputs}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.inputs:
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "dense", "per location"])
@pytest.mark.parametrize("c", [5, 60])
def test_no_tensor_is_larger_than_a_chunk(kind, c, accelerator, monkeypatch):
    monkeypatch.setattr(devices, "is_accelerator", lambda device: accelerator)
    monkeypatch.setattr(devices, "chunk_elements", lambda device: 1 << 15)
    monkeypatch.setattr(mixers, "ROW_ELEMENTS", 1 << 10)
    monkeypatch.setattr(mixers, "SMALL_CHUNK_ELEMENTS", 1 << 15)
    b, r, n = 10, 40, 2000
    factors = {
        "sparse": lambda: sample_sparse_factors(b, n, 0.5, examples_per_mix=3),
        "dense": lambda: sample_factors(b, n, 0.5),
        "per location": lambda: sample_factors(b, n, 0.5, num_locations=r),
    }[kind]()
    logits = torch.randn(b, r, c, requires_grad=True)
    attention = torch.rand(b, r)
    inputs = [factors] if isinstance(factors, torch.Tensor) else [factors.index, factors.weight]
    with LargestTensor(*inputs) as largest:
        # The checks sum the factors of each location and mixed example: r n numbers, 1 / b of the factors.
        loss = dense_multimix_loss(logits, torch.randint(c, (b,)), attention, factors, validate_args=False)
        torch.autograd.grad(loss, logits)
    # The gradient, a chunk, or the masses of a chunk's locations: less than r n, and far less than r n c.
    assert largest.elements <= max(1 << 15, b * r * c, 16 * n)


def test_loss_and_gradients_are_deterministic():
    torch.manual_seed(0)
    logits, labels, attention = torch.randn(64, 16, 20), torch.randint(20, (64,)), torch.rand(64, 16)
    factors, permutations = sample_sparse_factors(64, 3000, 0.4, examples_per_mix=8), sample_permutations(16, 64)
    runs = [
        loss_and_gradients(logits, labels, attention, factors, {"permutations": permutations}, by_attention)
        for by_attention in (False, False)
    ]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_dense_form_of_sparse_factors():
    factors = SparseFactors(torch.tensor([[0, 2], [3, 1]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]]), 4)
    expected = torch.tensor([[0.25, 0], [0, 0.5], [0.75, 0], [0, 0.5]])
    assert torch.equal(factors.dense(), expected) and factors.shape == (4, 2)


FREE_8_GIB, FREE_1_GIB, FREE_NOTHING = 8 << 30, 1 << 30, 0


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
@pytest.mark.parametrize(
    ("free", "cached", "expected"),
    [
        (FREE_8_GIB, 0, 1 << 25),
        (80 << 30, 0, 1 << 25),  # at most 2^25
        (FREE_8_GIB - 1, 0, 1 << 24),  # rounded down to a power of two
        (FREE_NOTHING, FREE_8_GIB, 1 << 25),  # memory that PyTorch's allocator caches is free, too
        (FREE_1_GIB, 0, 1 << 22),
        (FREE_NOTHING, 0, 1 << 20),  # at least the CPU's
    ],
)
def test_chunk_size_of_an_accelerator_is_limited_by_free_memory(monkeypatch, kind, free, cached, expected):
    device, allocated = torch.device(kind, 1), 3 << 30

    def synchronize(*_):
        raise AssertionError("the chunk size must not wait for the device")

    module = getattr(torch, kind)
    monkeypatch.setattr(module, "mem_get_info", lambda d: {device: (free, 80 << 30)}[d])
    monkeypatch.setattr(module, "memory_reserved", lambda d: {device: allocated + cached}[d])
    monkeypatch.setattr(module, "memory_allocated", lambda d: {device: allocated}[d])
    monkeypatch.setattr(module, "synchronize", synchronize)
    assert devices.chunk_elements(device) == expected


def test_chunk_size_on_mps(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10 << 30)
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 2 << 30)
    assert devices.chunk_elements(torch.device("mps")) == 1 << 25


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_chunk_size_without_an_accelerator(kind):
    assert devices.chunk_elements(torch.device(kind)) == 1 << 20


def test_chunks_cover_all_locations_and_mixed_examples(monkeypatch):
    monkeypatch.setattr(devices, "chunk_elements", lambda device: 1 << 25)
    assert DenseMixer(torch.rand(1, 128, 1000)).chunk_sizes(49, 100) == (49, 1000)
    monkeypatch.setattr(devices, "chunk_elements", lambda device: 1 << 20)
    assert DenseMixer(torch.rand(1, 128, 1000)).chunk_sizes(49, 100) == (8, 1000)
