import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from mm_hf import LocationError, MultiMixTrainer, RecursiveMix, wrap_model
from mm_hf.distributed import rank_generator
from mm_hf.methods.cutmix import draw_box
from mm_hf.methods.recursivemix import divergence, location_weights
from mm_hf.training.checkpoints import find_checkpoint_error
from mm_hf.training.hub import load_method_state, save_method_state, state_file
from tests.helpers import digits, launch, models


class Literal:
    """RecursiveMix pixel by pixel and location by location, on the same draws."""

    def __init__(self, model, patch, max_area, consistency_weight):
        self.model, self.patch, self.max_area, self.weight = model, patch, max_area, consistency_weight
        self.previous = None

    def loss(self, images, labels):
        side, c = images.shape[-1], self.model.config.num_labels
        images, targets, box = images.clone(), F.one_hot(labels, c).float(), (0, 0, 0, 0)
        if self.previous is not None:
            generator = rank_generator("cpu")
            share = self.max_area * float(torch.rand((), generator=generator))
            box = draw_box(side, side, 1 - share, generator)
            height, width = box[1] - box[0], box[3] - box[2]
            for i in range(len(images)):
                j = i % len(self.previous[0])
                for y in range(height):
                    for x in range(width):
                        pixel = self.previous[0][j, :, y * side // height, x * side // width]
                        images[i, :, box[0] + y, box[2] + x] = pixel
                part = height * width / side**2
                targets[i] = (1 - part) * targets[i] + part * self.previous[1][j]
        logits, token_logits = self.outputs(images)
        loss = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
        part = (box[1] - box[0]) * (box[3] - box[2]) / side**2
        if part and self.weight:
            for i in range(len(images)):
                j = i % len(self.previous[0])
                region, pixels = 0, (box[1] - box[0]) * (box[3] - box[2])
                for y in range(box[0], box[1]):
                    for x in range(box[2], box[3]):
                        r = y // self.patch * (side // self.patch) + x // self.patch
                        region = region + token_logits[i, r] / pixels
                p = self.previous[2][j].softmax(dim=0)
                kl = (p * (p.log() - region.log_softmax(dim=0))).sum()
                loss = loss + self.weight * part * kl / len(images)
        self.previous = images, targets, logits.detach()
        return loss

    def outputs(self, images):
        """Return the logits, and the classifier applied to each location of the last feature map or layer."""
        kept = []
        body = self.model.vit.layernorm if hasattr(self.model, "vit") else self.model.resnet.encoder
        hook = body.register_forward_hook(lambda module, args, output: kept.append(output))
        logits = self.model(pixel_values=images).logits
        hook.remove()
        if hasattr(self.model, "vit"):
            return logits, self.model.classifier(kept[0][:, 1:])
        features = kept[0].last_hidden_state.flatten(2).mT
        return logits, self.model.classifier[1](features)


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=5)).eval()


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize(("build", "patch"), [(lambda: models.build("vit"), 8), (resnet, 8)], ids=["vit", "resnet"])
def test_losses_and_gradients_are_those_of_the_literal_implementation(build, patch, weight):
    """Mini-batches of different sizes, among them a smaller one and a larger one after it."""
    model, twin = build(), build()
    literal = Literal(twin, patch, 0.9, weight)
    batches = [(models.batch("vit", b=b, seed=b)["pixel_values"], models.labels(b)) for b in (4, 4, 3, 5)]
    method = RecursiveMix(max_area=0.9, consistency_weight=weight)
    first = {"pixel_values": batches[0][0], "labels": batches[0][1]}
    with wrap_model(model, method, example_inputs=first) as handle:
        for step, (images, labels) in enumerate(batches):
            for module in (model, twin):
                module.zero_grad()
            torch.manual_seed(step)
            model.training = True
            loss = model(pixel_values=images, labels=labels).loss
            model.training = False
            torch.manual_seed(step)
            expected = literal.loss(images, labels)
            loss.backward()
            expected.backward()
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
            gradients = [[p.grad for p in module.parameters() if p.grad is not None] for module in (model, twin)]
            torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
            logs = handle.pop_logs()
            assert ("loss_consistency" in logs) == (step > 0 and weight > 0) and ("pasted_area" in logs) == (step > 0)
        for name, tensor in zip(("images", "targets", "logits"), literal.previous, strict=True):
            torch.testing.assert_close(handle.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_each_image_contains_the_previous_one_and_its_label():
    """Image i of a mini-batch is painted with one number per mini-batch and example: shares can be counted."""
    method, model = RecursiveMix(consistency_weight=0.0), models.build("vit", num_labels=9)
    for step in range(3):
        images = torch.arange(3.0)[:, None, None, None].expand(3, 1, 20, 30) + 3 * step
        copied = method.for_batch({}, torch.arange(3))
        torch.manual_seed(step)
        inputs, targets = copied.mix_inputs({"pixel_values": images}, torch.arange(3) + 3 * step, model)
        copied.loss(OutputOfZeros(3, 9), targets)
        counted = torch.stack([(inputs["pixel_values"] == j).float().mean(dim=(1, 2, 3)) for j in range(9)], dim=1)
        # The share of the examples before the previous one changes when they are resized by nearest neighbors.
        torch.testing.assert_close(targets, counted, atol=0.02, rtol=0)
    assert (targets > 0).sum(dim=1).tolist() == [3, 3, 3]


class OutputOfZeros:
    def __init__(self, b, c):
        self.logits, self.token_logits = torch.zeros(b, c), None


def test_models_do_not_share_their_memory():
    method, images, labels = RecursiveMix(), models.batch("vit"), models.labels()
    first, second = models.build("vit").train(), models.build("vit").train()
    with wrap_model(first, method) as handle, wrap_model(second, method) as other:
        first(**images, labels=labels)
        assert set(handle.state_dict()) == {"images", "targets", "logits"}
        assert other.state_dict() == {} and method.state_dict() == {}


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problem_types_train(problem):
    model, images = models.build("vit", problem_type=problem).train(), models.batch("vit")
    with wrap_model(model, RecursiveMix()) as handle:
        for _ in range(3):
            model(**images, labels=torch.rand(6, 5)).loss.backward()
    assert handle.pop_logs()["loss_consistency"] >= 0


@pytest.mark.parametrize("criterion", ["cross_entropy", "binary_cross_entropy", "mse"])
def test_divergence_is_zero_for_equal_predictions_and_else_positive(criterion):
    logits, other = torch.randn(4, 5), torch.randn(4, 5)
    assert divergence(logits, logits, criterion) == pytest.approx(0, abs=1e-6)
    assert divergence(logits, other, criterion) > 0.01
    expected = F.kl_div(logits.log_softmax(1), other.softmax(1), reduction="batchmean")
    torch.testing.assert_close(divergence(logits, other, "cross_entropy"), expected)


def test_location_weights_are_the_share_of_the_box_in_each_location():
    weights = location_weights((3, 10, 6, 7), (16, 16), (4, 4)).view(4, 4)
    assert weights.sum() == pytest.approx(1)
    torch.testing.assert_close(weights[:, 1], torch.tensor([1, 4, 2, 0]) / 7)


def test_invalid_settings_and_inputs_are_rejected():
    with pytest.raises(ValueError, match=r"max_area must lie in \[0, 1\], got 1.5"):
        RecursiveMix(max_area=1.5)
    with pytest.raises(ValueError, match="consistency_weight must be a finite number of at least 0, got -1"):
        RecursiveMix(consistency_weight=-1)
    with pytest.raises(ValueError, match="The state of RecursiveMix has images, targets, logits, but got labels"):
        RecursiveMix().load_state_dict({"labels": torch.zeros(2)})
    model = models.build("bert").train()
    with pytest.raises(ValueError, match="RecursiveMix cuts and pastes images"):
        wrap_model(model, RecursiveMix(), example_inputs={**models.batch("bert"), "labels": models.labels()})


def test_locations_that_are_no_grid_are_rejected_at_the_first_mini_batch():
    step, output = RecursiveMix().for_batch({}, models.labels()), OutputOfZeros(6, 5)
    step.mix_inputs(models.batch("vit"), models.labels(), models.build("vit"))
    output.token_logits = torch.zeros(6, 15, 5)
    with pytest.raises(LocationError, match="15 locations are no grid of square patches"):
        step.loss(output, torch.rand(6, 5).softmax(dim=1))


# ---- Checkpoints ----


def trainer(directory, **more):
    args = {"num_train_epochs": 3, "per_device_train_batch_size": 20, "save_strategy": "steps", "save_steps": 1, **more}
    train = digits.dataset()  # 96 examples: the last mini-batch of an epoch has 16
    return MultiMixTrainer(
        digits.vit(dropout=0.1), digits.arguments(directory, **args), train_dataset=train, mixing=RecursiveMix()
    )


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(("stop_at", "accumulation"), [(3, 1), (5, 1), (6, 1), (4, 2)])
def test_resumed_training_is_bit_identical(tmp_path, stop_at, accumulation):
    """Within an epoch, at its end after the smaller mini-batch, and with accumulated gradients."""
    more = {"gradient_accumulation_steps": accumulation}
    complete = trainer(tmp_path / "complete", **more)
    complete.train()
    stopped = trainer(tmp_path / "parts", **more)
    stopped.add_callback(StopAt(stop_at))
    stopped.train()
    assert state_file(tmp_path / "parts" / f"checkpoint-{stop_at}").is_file()
    resumed = trainer(tmp_path / "parts", **more)
    resumed.train(resume_from_checkpoint=True)
    digits.same_weights(digits.weights(resumed.model), digits.weights(complete.model))
    assert digits.losses(resumed)[stop_at:] == digits.losses(complete)[stop_at:]
    ends = [t.mixing_handle.state_dict() for t in (resumed, complete)]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_without_its_state_a_resumed_training_differs(tmp_path):
    complete = trainer(tmp_path, max_steps=5)
    complete.train()
    state_file(tmp_path / "checkpoint-3").unlink()
    resumed = trainer(tmp_path, max_steps=5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert digits.losses(resumed)[3:] != digits.losses(complete)[3:]


def test_truncated_state_makes_a_checkpoint_incomplete(tmp_path):
    trainer(tmp_path, max_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    assert find_checkpoint_error(checkpoint) is None
    file = state_file(checkpoint)
    file.write_bytes(file.read_bytes()[:-100])
    assert "mixing_state.safetensors" in find_checkpoint_error(checkpoint)


def test_method_states_are_written_per_rank(tmp_path, caplog):
    save_method_state(tmp_path, {"images": torch.arange(3.0)}, rank=1, world_size=2)
    torch.testing.assert_close(load_method_state(tmp_path, 1, 2), {"images": torch.arange(3.0)})
    assert load_method_state(tmp_path, 0, 1) == {}
    assert "method states of another number of processes than 1" in caplog.text
    save_method_state(tmp_path, {}, rank=1, world_size=2)
    assert not list(tmp_path.iterdir())  # a method without state leaves no file, and removes that of an earlier one


def test_a_custom_loop_resumes_from_the_handles_state():
    batches = [(models.batch("vit", seed=i), models.labels(seed=i)) for i in range(4)]

    def run(model, handle, steps):
        for i in steps:
            torch.manual_seed(i)
            loss = model(**batches[i][0], labels=batches[i][1]).loss
        return loss

    model = models.build("vit").train()
    with wrap_model(model, RecursiveMix()) as handle:
        run(model, handle, range(3))
        state = {name: tensor.clone() for name, tensor in handle.state_dict().items()}
        expected = run(model, handle, [3])
    with wrap_model(model, RecursiveMix()) as handle:
        handle.load_state_dict(state)
        assert run(model, handle, [3]) == expected


SCRIPT = """
import json, sys
import torch
from accelerate import PartialState
from tests.helpers import digits
from tests.methods.test_recursivemix import StopAt, trainer

def run(name, stop_at=None, resume=False):
    found = trainer(f"{sys.argv[1]}/{name}", per_device_train_batch_size=10, ddp_find_unused_parameters=False)
    if stop_at:
        found.add_callback(StopAt(stop_at))
    found.train(resume_from_checkpoint=resume or None)
    return found

complete = run("complete")
run("parts", stop_at=7)  # of 5 steps per epoch, in the middle of the second
resumed = run("parts", resume=True)
digits.same_weights(digits.weights(resumed.model), digits.weights(complete.model))
ends = [t.mixing_handle.state_dict() for t in (resumed, complete)]
torch.testing.assert_close(*ends, rtol=0, atol=0)
result = {"images": float(ends[0]["images"].double().sum()), "processes": complete.accelerator.num_processes}
json.dump(result, open(f"{sys.argv[1]}/rank{PartialState().process_index}.json", "w"))
complete.accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
"""


@pytest.mark.distributed
def test_each_rank_resumes_from_its_own_memory(tmp_path):
    first, second = launch.launch(tmp_path, SCRIPT)
    assert first["processes"] == second["processes"] == 2 and first["images"] != second["images"]
    files = sorted(file.name for file in (tmp_path / "parts" / "checkpoint-7").glob("mixing_state*"))
    assert files == ["mixing_state_0.safetensors", "mixing_state_1.safetensors"]
