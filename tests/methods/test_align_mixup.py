"""AlignMixup against a literal Sinkhorn algorithm and forwards of the model's own layers."""

import pytest
import torch
from torch.nn import functional as F

from mm_hf import AlignMixup, Mixup, wrap_model
from mm_hf.distributed import rank_generator
from mm_hf.functional import transport
from mm_hf.methods import pairs
from tests.helpers import models
from tests.methods.test_recursivemix import resnet


def literal_assignment(x, y, eps, rows, columns, iterations=5000):
    """Sinkhorn's algorithm in float64 for one pair of examples, with lists of the valid locations."""
    x, y = x[rows].double(), y[columns].double()
    cost = torch.tensor([[float((a - b).square().sum()) for b in y] for a in x], dtype=torch.float64)
    kernel = torch.exp(-cost / (eps * cost.mean()))
    u, v = torch.ones(len(x), dtype=torch.float64), torch.ones(len(y), dtype=torch.float64)
    for _ in range(iterations):
        u = (1 / len(x)) / (kernel @ v)
        v = (1 / len(y)) / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    return plan / plan.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("eps", [0.1, 1.0])
def test_assignment_is_that_of_the_literal_algorithm(scale, eps):
    generator = torch.Generator().manual_seed(0)
    x, y = (scale * (torch.randn(3, 7, 4, generator=generator) + 5) for _ in range(2))
    found = transport.assignment(x, y, eps=eps)
    for i in range(3):
        expected = literal_assignment(x[i], y[i], eps, range(7), range(7))
        torch.testing.assert_close(found[i].double(), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(found.sum(dim=2), torch.ones(3, 7))
    # Each location of the partner is assigned once, which keeps the mean of its features.
    torch.testing.assert_close(found.sum(dim=1), torch.ones(3, 7), rtol=0, atol=0.02)


def test_padding_is_neither_assigned_nor_receives_anything():
    x, y = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    mask, other = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 0]])
    found = transport.assignment(x, y, mask=mask, other_mask=other)
    for i in range(2):
        rows, columns = ([j for j in range(6) if m[i, j]] for m in (mask, other))
        expected = torch.zeros(6, 6, dtype=torch.float64)
        expected[torch.tensor(rows)[:, None], torch.tensor(columns)] = literal_assignment(
            x[i], y[i], 0.1, rows, columns
        )
        torch.testing.assert_close(found[i].double(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_equal_features_are_assigned_evenly_and_half_precision_is_finite(constant):
    same = torch.full((2, 5, 4), constant)
    torch.testing.assert_close(transport.assignment(same, same), torch.full((2, 5, 5), 0.2))
    found = transport.assignment((100 * torch.randn(2, 5, 4)).half(), (100 * torch.randn(2, 5, 4)).half(), eps=0.01)
    assert found.dtype == torch.half and found.isfinite().all()
    with pytest.raises(ValueError, match="eps must be positive, got 0"):
        transport.assignment(same, same, eps=0)


def draws(alpha, b, seed):
    torch.manual_seed(seed)
    generator = rank_generator("cpu")
    factor = pairs.draw_factor(alpha, generator)
    return factor, pairs.draw_partners(b, generator, torch.device("cpu"))


def mixed_tokens(tokens, factor, partner, mask=None):
    """Return tokens (b, n, d) mixed with aligned ones, one example and one location at a time."""
    result = tokens.clone()
    for i, j in enumerate(partner.tolist()):
        if i == j:
            continue
        valid = [range(tokens.shape[1])] * 2
        if mask is not None:
            valid = [[k for k in range(tokens.shape[1]) if mask[m, k]] for m in (i, j)]
        plan = literal_assignment(tokens[i].detach(), tokens[j].detach(), 0.1, *valid).float()
        for row, k in enumerate(valid[0]):
            other = sum(plan[row, column] * tokens[j, m] for column, m in enumerate(valid[1]))
            result[i, k] = factor * tokens[i, k] + (1 - factor) * other
    return result


def literal_loss(model, inputs, labels, block, seed, mask=None):
    """Return the loss of a forward in which a hook mixes the input of the last block."""
    factor, partner = draws(2.0, len(labels), seed)

    def mix(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        tokens = hidden if hidden.ndim == 3 else hidden.flatten(2).mT
        mixed = mixed_tokens(tokens, factor, partner, mask)
        mixed = mixed if hidden.ndim == 3 else mixed.mT.reshape(hidden.shape)
        return ((mixed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": mixed})

    hook = block.register_forward_pre_hook(mix, with_kwargs=True)
    logits = model(**inputs).logits
    hook.remove()
    return factor * F.cross_entropy(logits, labels) + (1 - factor) * F.cross_entropy(logits, labels[partner])


@pytest.mark.parametrize(
    ("name", "build", "block"),
    [
        ("vit", lambda: models.build("vit"), lambda model: model.vit.layers[-1]),
        ("vit", resnet, lambda model: model.resnet.encoder.stages[-1]),
        ("bert", lambda: models.build("bert"), lambda model: model.bert.encoder.layer[-1]),
    ],
    ids=["vit", "resnet", "bert"],
)
def test_loss_and_gradients_are_those_of_the_literal_implementation(name, build, block, monkeypatch):
    monkeypatch.setattr(transport, "ITERATIONS", 2000)
    model, twin, inputs, labels = build(), build(), models.batch(name, b=4), models.labels(4)
    expected = literal_loss(twin, inputs, labels, block(twin), 3, inputs.get("attention_mask"))
    expected.backward()
    method = AlignMixup(unaligned_prob=0.0)
    with wrap_model(model, method, example_inputs={**inputs, "labels": labels}) as handle:
        torch.manual_seed(3)
        model.training = True
        loss = model(**inputs, labels=labels).loss
        model.training = False
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
        loss.backward()
        for (key, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            if theirs.grad is not None:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2, atol=1e-3, msg=key)
        assert set(handle.pop_logs()) == {"loss_align_mixup"}
        assert torch.equal(model(**inputs).logits, build()(**inputs).logits)


def test_alignment_changes_the_loss_and_each_mini_batch_differs():
    inputs, labels = models.batch("vit"), models.labels()

    def loss(eps, seed):
        model = models.build("vit")
        with wrap_model(model, AlignMixup(unaligned_prob=0.0, eps=eps), example_inputs={**inputs, "labels": labels}):
            torch.manual_seed(seed)
            model.training = True
            return model(**inputs, labels=labels).loss.item()

    assert loss(0.1, 0) == loss(0.1, 0) != loss(0.1, 1) and loss(0.1, 0) != loss(100.0, 0)


def test_share_of_unaligned_mini_batches_gets_mixup():
    torch.manual_seed(0)
    chosen = [type(AlignMixup(unaligned_prob=0.3).for_batch({}, models.labels())) for _ in range(1000)]
    assert set(chosen) == {AlignMixup, Mixup} and chosen.count(Mixup) == pytest.approx(300, abs=50)
    assert AlignMixup(0.7, unaligned_prob=1.0).for_batch({}, models.labels()) == Mixup(0.7)
    model, inputs, labels = models.build("vit").train(), models.batch("vit"), models.labels()
    with wrap_model(model, AlignMixup()) as handle:
        for _ in range(12):
            model(**inputs, labels=labels).loss.backward()
        assert set(handle.pop_logs()) == {"loss_align_mixup", "loss_mixup"}


def test_mask_that_does_not_mark_tokens_is_rejected():
    model, inputs = models.build("vit").train(), models.batch("vit")
    method = AlignMixup(unaligned_prob=0.0)
    method.mix_inputs({**inputs, "attention_mask": torch.ones(6, 99)}, models.labels(), model)
    with pytest.raises(
        ValueError, match=r"AlignMixup aligns the 17 tokens .* mask of shape \(6, 99\) .* ManifoldMixup"
    ):
        method.block_mixing(torch.randn(6, 17, 8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 0}, "alpha must be a positive number, got 0"),
        ({"unaligned_prob": 2}, r"unaligned_prob must lie in \[0, 1\], got 2"),
        ({"eps": 0.0}, "eps must be a positive number, got 0.0"),
        ({"eps": "1"}, "eps must be a positive number, got '1'"),
    ],
)
def test_invalid_settings_are_rejected(values, message):
    with pytest.raises(ValueError, match=message):
        AlignMixup(**values)
