"""Tests of behavior that differs between a GPU and a CPU. They need PyTorch, Transformers and Accelerate only."""

import contextlib
import os
import socket
import warnings

import pytest
import torch
from torch import distributed as dist
from transformers import TrainingArguments

from benchmarks.gpu.setup import Setup, count_kernels
from mm_hf import DenseMultiMix, ManifoldMixup, MultiMixTrainer, sample_factors, wrap_model
from mm_hf.functional import dense_multimix_loss, kernels
from mm_hf.functional.devices import ACCELERATOR_CHUNK_ELEMENTS, chunk_elements
from mm_hf.functional.factors import sample_permutations, sample_sparse_factors
from mm_hf.methods import METHODS
from mm_hf.methods.settings import required_settings, settings_of
from tests.functional import literal
from tests.helpers import models

B, R, C, N = 6, 5, 7, 9
DENSE = DenseMultiMix(num_mixed=30)


def problem(device, kind, dtype=torch.float32, sizes=(B, R, C, N)):
    """Return the arguments of the loss, and the factors of each location for the reference."""
    torch.manual_seed(0)
    b, r, c, n = sizes
    logits = torch.randn(b, r, c, device=device, dtype=dtype).requires_grad_()
    attention = torch.rand(b, r, device=device)
    attention[1, 3:] = 0  # padding
    if kind == "sparse":
        factors = sample_sparse_factors(b, n, 0.5, examples_per_mix=3, device=device)
        dense = factors.dense()
    else:
        factors = dense = sample_factors(b, n, 0.5, device=device)
    permutations = sample_permutations(r, b, device=device)
    return logits, attention, factors, permutations, torch.stack([dense[p] for p in permutations])


def in_float64(x):
    return x.detach().double().cpu()


@pytest.mark.parametrize("criterion", ["cross_entropy", "binary_cross_entropy", "mse"])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_loss_and_gradient_equal_the_float64_reference(device, kind, criterion):
    logits, attention, factors, permutations, located = problem(device, kind)
    labels = torch.randint(C, (B,)) if criterion == "cross_entropy" else torch.rand(B, C)
    options = {"criterion": criterion, "permutations": permutations, "validate_args": False}
    loss = dense_multimix_loss(logits, labels.to(device), attention, factors, **options)
    loss.backward()
    reference = in_float64(logits).requires_grad_()
    expected = literal.dense_multimix(
        reference, labels, in_float64(attention), in_float64(located), criterion=criterion
    )
    expected.backward()
    torch.testing.assert_close(loss.detach().cpu(), expected.detach().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.cpu(), reference.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", ["compile", "triton"])
@pytest.mark.parametrize("sizes", [(6, 5, 7, 9), (40, 9, 300, 130)], ids=str)
def test_kernel_equals_the_float64_reference(device, kernel, sizes, monkeypatch):
    monkeypatch.setattr(kernels, "_is_equal", {})
    logits, attention, factors, permutations, located = problem(device, "dense", sizes=sizes)
    labels = torch.randint(sizes[2], (sizes[0],))
    options = {"permutations": permutations, "validate_args": False, "kernel": kernel}
    with warnings.catch_warnings():
        replaced = kernel == "triton" and device.type == "cpu"  # Triton has no CPU
        warnings.filterwarnings("ignore" if replaced else "error", message="kernel=")
        loss = dense_multimix_loss(logits, labels.to(device), attention, factors, **options)
    loss.backward()
    reference = in_float64(logits).requires_grad_()
    expected = literal.dense_multimix(reference, labels, in_float64(attention), in_float64(located))
    expected.backward()
    torch.testing.assert_close(loss.detach().cpu(), expected.detach().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.cpu(), reference.grad.float(), rtol=1e-4, atol=1e-6)


def test_loss_is_computed_in_float32_under_autocast(device):
    logits, attention, factors, permutations, _ = problem(device, "dense", torch.bfloat16)
    labels = torch.randint(C, (B,), device=device)
    options = {"permutations": permutations, "validate_args": False}
    with torch.autocast(device.type, torch.bfloat16):
        loss = dense_multimix_loss(logits, labels, attention, factors, **options)
    expected = dense_multimix_loss(logits.detach().float(), labels, attention, factors, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def training_step(model, device, seed=0, **inputs):
    torch.manual_seed(seed)
    inputs = inputs or {**models.batch("vit"), "labels": models.labels()}
    loss = model(**{k: v.to(device) for k, v in inputs.items()}).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if not required_settings(settings_of(kind))])
def test_training_step_of_every_method(device, name):
    model = models.build("vit").to(device).train()
    with wrap_model(model, METHODS[name]()), torch.autocast(device.type, torch.bfloat16):
        for seed in range(3):
            assert bool(training_step(model, device, seed).isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("method", [DENSE, DenseMultiMix(num_mixed=30, attention="gap", pooled_weight=1.0)], ids=str)
def test_step_does_not_synchronize(device, name, method):
    model = models.build(name).to(device).train()
    inputs = {**models.batch(name), "labels": models.labels()}
    inputs.pop("attention_mask", None)  # Transformers reads the values of a mask
    inputs = {k: v.to(device) for k, v in inputs.items()}
    with wrap_model(model, method, example_inputs=inputs):
        model(**inputs).loss.backward()  # the first step checks shapes
        with synchronization_is_an_error(device):
            model(**inputs).loss.backward()


@contextlib.contextmanager
def synchronization_is_an_error(device):
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(directory, device, **settings):
    torch.manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 5} for i in range(48)]
    arguments = TrainingArguments(
        str(directory), per_device_train_batch_size=8, max_steps=12, save_steps=6, logging_steps=3, disable_tqdm=True,
        report_to="none", use_cpu=device.type == "cpu",
    )  # fmt: skip
    model = models.build("vit", hidden_dropout_prob=0.1)
    trainer = MultiMixTrainer(model, arguments, mixing=DenseMultiMix(input_mixing_start=0.5), train_dataset=data)
    trainer.train(**settings)
    return {name: value.cpu() for name, value in model.state_dict().items()}


def test_resumed_training_is_bit_identical(device, tmp_path):
    expected = train(tmp_path, device)
    found = train(tmp_path, device, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_deterministic_algorithms_give_equal_gradients(device):
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            model = models.build("vit").to(device).train()
            with wrap_model(model, DenseMultiMix(pooled_weight=1.0)):
                training_step(model, device)
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *gradients))


def test_gathering_with_one_rank_changes_no_loss(device):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    losses = []
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    try:
        for gathers in (True, False):
            model = models.build("vit").to(device).eval()
            for module in (model, model.classifier):
                module.training = True  # without dropout
            mixing = DenseMultiMix(num_mixed=2000, clean_weight=0.0, gather_across_devices=gathers)
            with wrap_model(model, mixing):
                losses.append(training_step(model, device))
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(*losses, rtol=0.05, atol=0)  # they draw from different generators


@pytest.mark.parametrize("method", [DENSE, ManifoldMixup()], ids=str)
def test_compiled_model_is_not_recompiled(device, method):
    torch._dynamo.reset()
    model = models.build("vit").to(device).train()
    inputs = {k: v.to(device) for k, v in {**models.batch("vit"), "labels": models.labels()}.items()}
    with wrap_model(model, method, example_inputs=inputs):
        compiled = torch.compile(model, backend="inductor" if device.type == "cuda" else "eager")
        for _ in range(2):
            compiled(**inputs).loss.backward()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                compiled(**inputs).loss.backward()
    torch._dynamo.reset()


def test_chunks_fit_the_device(device):
    elements = chunk_elements(device)
    assert elements & (elements - 1) == 0 and elements <= ACCELERATOR_CHUNK_ELEMENTS
    assert (elements > 1 << 20) == (device.type == "cuda")


def test_mixing_launches_at_most_400_kernels(device, tmp_path):
    setup = Setup(device, device.type == "cpu", tmp_path)
    b, r, c, n = (128, 196, 1000, 1000) if device.type == "cuda" else (8, 16, 100, 100)
    logits = torch.randn(b, r, c, device=device, requires_grad=True)
    labels, attention = torch.randint(c, (b,), device=device), torch.rand(b, r, device=device)
    factors, permutations = sample_factors(b, n, 1.0, device=device), sample_permutations(r, b, device=device)

    def step():
        options = {"permutations": permutations, "validate_args": False}
        dense_multimix_loss(logits, labels, attention, factors, **options).backward()

    step()
    assert 0 < count_kernels(setup, step)[0] <= 400
