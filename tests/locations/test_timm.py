"""Plans of timm's models, with timm installed (`make test-vision`)."""

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("torchvision")

from mm_hf import DenseMultiMix, LocationError, MultiMix, extract, probe, wrap_model
from mm_hf.data.supported_models import TIMM_TABLE, supported_models
from mm_hf.evaluation.model_check import pooled_error
from tests.helpers import timm_zoo

pytestmark = [pytest.mark.vision, pytest.mark.filterwarnings("ignore")]
TINY = {"embed_dim": 32, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "arguments", "pool", "prefix", "auto"),
    [
        ("vit_tiny_patch16_224", {}, "token[0]", 1, "cls"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "mean[1:]", 1, "gap"),
        ("vit_tiny_patch16_224", {"global_pool": "avgmax", "fc_norm": False}, "avgmax[1:]", 1, "gap"),
        ("vit_tiny_patch16_224", {"global_pool": "max", "fc_norm": False}, "max[1:]", 1, "gap"),
        ("vit_tiny_patch16_224", {"global_pool": "map", "reg_tokens": 4}, "module[0:]", 0, "cls"),
        ("vit_small_patch14_reg4_dinov2", {}, "token[0]", 5, "cls"),
        ("vit_small_patch16_dinov3", {}, "mean[5:]", 5, "gap"),
        ("vit_base_patch16_siglip_224", {}, "module[0:]", 0, "cls"),
        ("vit_pe_core_tiny_patch16_384", {}, "module[0:]", 1, "cls"),
        ("naflexvit_base_patch16_gap", {}, "mean[4:]", 4, "gap"),
        ("naflexvit_base_patch16_map", {}, "module[0:]", 0, "cls"),
        ("deit_tiny_distilled_patch16_224", {}, "token[0]+token[1]", 2, "cls"),
        ("cait_xxs24_224", {}, "token[0]", 1, "cls"),
    ],
)
def test_plan_of_a_transformer(name, arguments, pool, prefix, auto):
    tiny = {**TINY, "depth_token_only": 1} if name.startswith("cait") else TINY
    model = timm_zoo.build(name, 64, **tiny, **arguments)
    inputs = timm_zoo.batch(model, 64)
    plan = probe(model, inputs)
    assert (plan.pool, plan.prefix) == (pool, prefix)
    error, locations = pooled_error(model, plan, timm_zoo.batch(model, 64, b=3, seed=5))
    assert error <= 1e-6 and locations == 16
    with torch.no_grad():
        automatic, expected = (extract(model, attention=kind, **inputs).attention for kind in ("auto", auto))
    assert torch.equal(automatic, expected)


def test_pooling_modules_of_convolutional_models():
    for pool in ("avg", "avgmax", "max"):
        model = timm_zoo.build("resnet18", 64, channels=[8, 8, 8, 8], global_pool=pool)
        plan = probe(model, timm_zoo.batch(model, 64))
        assert pooled_error(model, plan, timm_zoo.batch(model, 64, b=3, seed=5))[0] <= 1e-6, pool


def test_caches_of_the_probe_are_gone():
    model = timm_zoo.build("levit_128", 128).train()
    labels = torch.arange(4) % 5
    inputs = timm_zoo.batch(model, 128)
    with wrap_model(model, MultiMix(num_mixed=5)):
        model(**inputs, labels=labels).loss.backward()
    with torch.no_grad():
        biases = [p for name, p in model.named_parameters() if "attention_biases" in name]
        before = model.eval()(**inputs).logits
        model.train()
        for bias in biases:
            bias.add_(torch.randn_like(bias))
        assert not torch.allclose(model.eval()(**inputs).logits, before)


def test_dropped_patches_are_no_locations_in_training():
    model = timm_zoo.build("vit_tiny_patch16_224", 64, patch_drop_rate=0.5, **TINY).train()
    inputs = {**timm_zoo.batch(model, 64), "labels": torch.arange(4) % 5}
    with wrap_model(model, DenseMultiMix(num_mixed=5, input_mixing="none")):
        model(**inputs).loss.backward()
        assert extract(model, **timm_zoo.batch(model, 64)).token_logits.shape[1] == 8
        model.eval()
        assert extract(model, **timm_zoo.batch(model, 64)).token_logits.shape[1] == 16
    assert model.timm_model.patch_embed.proj.weight.grad.any()


@pytest.mark.parametrize("name", ["crossvit_tiny_240", "volo_d1_224"])
def test_several_heads_are_rejected_with_this_reason(name):
    model = timm_zoo.build(name, 64)
    with pytest.raises(LocationError, match="per-location logits: its logits combine the results of several heads"):
        probe(model, timm_zoo.batch(model, 64))


@pytest.mark.zoo
@pytest.mark.parametrize("row", supported_models(TIMM_TABLE), ids=lambda row: row.name)
def test_row_of_the_table_is_reproduced(row):
    for side in timm_zoo.SIDES:
        try:
            model = timm_zoo.build(row.name.removeprefix("timm/"), side)
            plan = probe(model, timm_zoo.batch(model, side))
            break
        except LocationError as error:
            reason = str(error)
        except timm_zoo.BUILD_ERRORS:
            continue
    else:
        assert not row.dense_multimix and row.reason in reason
        return
    assert row.dense_multimix and plan.pool == row.pool
