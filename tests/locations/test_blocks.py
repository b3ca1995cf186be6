"""The search for blocks by their names, in small modules of one's own."""

import pytest
import torch
from torch import nn

from mm_hf import LocationError, ManifoldMixup, wrap_model
from mm_hf.locations import find_blocks

INPUTS = {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def convolution():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU())


class Network(nn.Module):
    """A stem that is a list of many layers, then modules of given names, and a head."""

    def __init__(self, names, *, inside="", around=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), *(nn.ReLU() for _ in range(8)))
        body = nn.ModuleDict({name: nn.Sequential(convolution(), convolution()) for name in names})
        if inside:
            self.add_module(inside, body)
        else:
            for name, module in body.items():
                self.add_module(name, module)
        self.body, self.around = [body[name] for name in names], around
        self.head = nn.Linear(4, 5, bias=False)

    def forward(self, pixel_values):
        x = start = self.stem(pixel_values)
        for module in self.body:
            x = module(x)
        return self.head((x + start if self.around else x).mean((2, 3)))


@pytest.mark.parametrize(
    ("names", "inside", "found"),
    [
        (("s1", "s2", "s3", "s4"), "", "s{}"),
        (("stage1", "stage2"), "", "stage{}"),
        (("layer1", "layer2", "layer3"), "encoder", "encoder.layer{}"),
        (("denseblock1", "transition1", "denseblock2", "transition2"), "features", "features.denseblock{}"),
        (("block1", "conv3", "block2"), "", "block{}"),
        (("conv4_1", "conv4_2", "conv4_3"), "features", "features.conv4_{}"),
        (("mixed_5b", "mixed_5c", "mixed_6a"), "", "mixed_{}"),
        (("0", "1", "2"), "stages", "stages.{}"),
    ],
)
def test_blocks_are_the_largest_part_of_the_forward(names, inside, found):
    """The stem is a longer list, and each block is a list, too."""
    torch.manual_seed(0)
    model = Network(names, inside=inside)
    blocks = find_blocks(model, INPUTS)
    numbers = [name.removeprefix(found.rpartition(".")[2].removesuffix("{}")) for name in names]
    expected = [found.format(n) for n in numbers if n[0].isdigit()]
    assert list(blocks.names) == expected and blocks.calls == len(expected)
    with wrap_model(model.train(), ManifoldMixup()) as handle:
        model(**INPUTS, labels=torch.tensor([0, 1, 2, 3]))["loss"].backward()
        assert handle._state.blocks.blocks == blocks
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("seed", range(4))
def test_input_of_a_numbered_module_is_mixed(seed):
    """The loss is that of the forward with the mixing written out."""
    torch.manual_seed(0)
    model, labels = Network(("s1", "s2")).train(), torch.tensor([0, 1, 2, 3])
    with wrap_model(model, ManifoldMixup(), example_inputs={**INPUTS, "labels": labels}):
        torch.manual_seed(seed)
        loss = model(**INPUTS, labels=labels)["loss"]
        torch.manual_seed(seed)
        step = ManifoldMixup().for_batch({}, labels)
        step.mix_inputs({}, labels, model)
        draw = step.block_mixing
    hidden = model.stem(INPUTS["pixel_values"])
    for i, module in enumerate((model.s1, model.s2)):
        if i == int(draw.depth * 2):
            hidden = (1 - draw.share) * hidden + draw.share * hidden[draw.partner]
        hidden = module(hidden)
    losses = -model.head(hidden.mean((2, 3))).log_softmax(1)
    own, other = (losses.gather(1, y[:, None]).mean() for y in (labels, labels[draw.partner]))
    torch.testing.assert_close(loss, (1 - draw.share) * own + draw.share * other)


def test_path_around_numbered_modules_is_detected():
    model = Network(("s1", "s2"), around=True)
    model.stem = nn.Conv2d(3, 4, 1, bias=False)
    with pytest.raises(LocationError, match="has no list of blocks .* and no such modules with numbered names"):
        find_blocks(model, INPUTS)


@pytest.mark.parametrize(("scale", "around"), [(10.0, False), (1.0, False), (0.1, False), (1.0, True), (1e-2, True)])
def test_blocks_of_an_untrained_model_are_found(scale, around):
    """Its logits hardly depend on the inputs: most of them is the bias of the head."""
    torch.manual_seed(0)
    model = Network(["layer1", "layer2", "layer3"], around=around)
    model.stem, model.head = nn.Conv2d(3, 4, 1, bias=False), nn.Linear(4, 5)
    with torch.no_grad():
        model.head.weight.mul_(scale)
        model.head.bias.fill_(1.0)
    if around:
        with pytest.raises(LocationError, match="no list of blocks"):
            find_blocks(model.eval(), INPUTS)
    else:
        assert find_blocks(model.eval(), INPUTS).names == ("layer1", "layer2", "layer3")


def test_blocks_of_examples_with_equal_logits_are_not_found():
    same = {"pixel_values": INPUTS["pixel_values"][:1].expand(4, -1, -1, -1)}
    with pytest.raises(LocationError, match="no list of blocks"):
        find_blocks(Network(["layer1", "layer2"]).eval(), same)
