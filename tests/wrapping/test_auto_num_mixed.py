import copy
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_hf import DenseMultiMix, Mixing, MultiMix, MultiMixTrainer, wrap_model
from mm_hf.training.hub import load_num_mixed
from mm_hf.wrapping import auto_num_mixed as module
from tests.helpers import digits, models

AUTO = DenseMultiMix(num_mixed="auto")


class Clock:
    """Simulated clock: a plain step takes one second, and the loss `fixed` plus `each` per mixed example."""

    def __init__(self, monkeypatch, fixed=0.0, each=1e-5, plain=1.0):
        self.now, self.fixed, self.each, self.plain = 0.0, fixed, each, plain
        monkeypatch.setattr("mm_hf.wrapping.auto_num_mixed.time.perf_counter", lambda: self.now)

    def step(self, auto_num_mixed, mixes=True):
        size = auto_num_mixed.begin(torch.device("cpu"))
        self.now += self.plain / 3
        if mixes:
            auto_num_mixed.loss_begins(torch.device("cpu"))
            self.now += self.fixed + size * self.each
            auto_num_mixed.loss_ends(torch.device("cpu"))
        self.now += 2 * self.plain / 3
        return size


@given(
    st.floats(1e-4, 10), st.floats(0, 0.03), st.floats(1e-8, 1e-3), st.lists(st.integers(0, 7), max_size=1, unique=True)
)
def test_chosen_number_costs_at_most_the_budget(plain, fixed, each, disturbed):
    fixed, each = fixed * plain, each * plain
    steps = [(size, fixed + size * each, plain + fixed + size * each) for size in module.SIZES * module.ROUNDS]
    for i in disturbed:  # by an evaluation or another program
        steps[i] = (steps[i][0], steps[i][1] * 3, steps[i][2] + 100)
    size = module.choose_size(steps)
    cost = fixed + size * each
    if size in (module.MOST, min(module.SIZES)):
        assert cost <= module.BUDGET * plain * 1.1 or size == min(module.SIZES)
    elif not disturbed:
        assert 0.85 * module.BUDGET * plain <= cost <= 1.001 * module.BUDGET * plain
    else:
        assert cost <= 1.3 * module.BUDGET * plain
    assert size == float(f"{size:.1e}")


def test_number_is_fixed_after_the_first_steps_are_timed(monkeypatch):
    clock, auto_num_mixed = Clock(monkeypatch, fixed=0.01), module.AutoNumMixed()
    sizes = [clock.step(auto_num_mixed) for _ in range(20)]
    trial = module.WARM_UP + module.ROUNDS * len(module.SIZES)
    assert set(sizes[:trial]) == set(module.SIZES)
    assert set(sizes[trial + 1 :]) == {3000} and auto_num_mixed.num_mixed == 3000


def test_steps_without_mixing_are_not_timed(monkeypatch):
    clock, auto_num_mixed = Clock(monkeypatch), module.AutoNumMixed()
    for i in range(60):
        clock.step(auto_num_mixed, mixes=i % 3 == 0)
    assert auto_num_mixed.num_mixed == 4000


def test_timing_continues_until_both_sizes_are_timed(monkeypatch):
    clock, auto_num_mixed = Clock(monkeypatch), module.AutoNumMixed()
    for i in range(40):
        clock.step(auto_num_mixed, mixes=i % 2 == 0)  # always with the same one of the two sizes
    assert auto_num_mixed.num_mixed is None
    for _ in range(2 * module.ROUNDS + 1):
        clock.step(auto_num_mixed)
    assert auto_num_mixed.num_mixed == 4000


def test_ranks_decide_in_the_same_step(monkeypatch):
    """One of two ranks has mixed less often: both ask in every step until both have a number."""
    clock, auto_num_mixed, gathered = Clock(monkeypatch), module.AutoNumMixed(), []

    def gather(sizes, size):
        gathered.append(size)
        sizes[:] = [size, 3000 if len(gathered) > 5 else None]

    monkeypatch.setattr("mm_hf.wrapping.auto_num_mixed.is_distributed", lambda: True)
    monkeypatch.setattr("mm_hf.distributed.is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    sizes = [clock.step(auto_num_mixed) for _ in range(30)]
    trial = module.WARM_UP + module.ROUNDS * len(module.SIZES)
    assert gathered == [4000] * 6 and set(sizes[trial + 5 :]) == {3000}


def test_model_trains_with_the_number_that_is_determined(monkeypatch, caplog):
    model, inputs = models.build("vit").train(), models.batch("vit")
    with wrap_model(model, AUTO) as handle:
        terms = []
        for _ in range(40):
            model(**inputs, labels=models.labels()).loss.backward()
            terms.append(int(handle.pop_logs()["loss_terms"]))
            if handle.num_mixed is not None:
                break
        assert {6 + 16 * size for size in module.SIZES} == set(terms[:-1])
        model(**inputs, labels=models.labels()).loss.backward()
        assert handle.pop_logs()["loss_terms"] == 6 + 16 * handle.num_mixed
        assert copy.deepcopy(model).mm_hf_state.auto_num_mixed.num_mixed == handle.num_mixed
    assert MultiMix(num_mixed=3).is_auto is False and AUTO.with_num_mixed(7).num_mixed == 7 and AUTO.num_mixed == "auto"
    assert Mixing.from_dict(AUTO.to_dict()) == AUTO


def test_resumed_training_keeps_the_number(tmp_path, caplog):
    arguments = {"num_train_epochs": 8, "save_strategy": "steps", "save_steps": 12}
    with caplog.at_level(logging.INFO, "mm_hf.wrapping.auto_num_mixed"):
        first = MultiMixTrainer(
            digits.vit(), digits.arguments(tmp_path, **arguments), mixing=AUTO, train_dataset=digits.dataset()
        )
        first.train()
    chosen = first.mixing_handle.num_mixed
    assert f"num_mixed='auto': {chosen:,} mixed examples per step" in caplog.text
    assert load_num_mixed(tmp_path / "checkpoint-12") == chosen
    again = MultiMixTrainer(
        digits.vit(), digits.arguments(tmp_path, **arguments), mixing=AUTO, train_dataset=digits.dataset()
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert again.mixing_handle.num_mixed == chosen
    digits.same_weights(digits.weights(first.model), digits.weights(again.model))


@pytest.mark.parametrize("value", [0, -3, 2.5, "most", None, True])
def test_num_mixed_is_an_integer_or_auto(value):
    with pytest.raises(ValueError, match="num_mixed must be an integer of at least 1 or 'auto'"):
        MultiMix(num_mixed=value)
