"""One network of every module of timm: planned in both roles on the meta device; a few of them with real numbers.

`benchmarks/timm_coverage.py` does this for every name.
"""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from irgdistill.config.loading import validate
from irgdistill.losses.base import Batch
from irgdistill.losses.objective import build_loss
from irgdistill.matching.levels import Level
from irgdistill.matching.plan import match
from irgdistill.matching.taps import Tapped
from irgdistill.models.build import build_network
from irgdistill.models.network import Network

# The smallest name of each module in timm 1.0.31, or another small one that is read much faster.
NAMES = """
beit_base_patch16_224 eca_halonext26ts test_byobnet cait_xxs24_224 coat_lite_tiny convit_tiny convmixer_768_32
test_convnext3 cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m
deit_tiny_distilled_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8
focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_a hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmixer_12_224 mobilenetv3_small_050 mobilenetv5_base
mobilevitv2_050 mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small test_nfnet pit_ti_224
pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2net50_48w_2s resnest14d
test_resnet resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224
tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos
samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p
xcit_nano_12_p8_224 cifar_resnet14_x0_5
""".split()  # noqa: SIM905
LEFT_OUT: dict[str, str] = {}
"""Modules without a name above, and why."""
SLOW = {"sequencer2d_s"}
"""Recurrent: the dry run takes every step of every row, six seconds."""

# One network of each layout and of each unusual output, at an input that keeps it cheap.
REAL = [
    ("test_resnet", 64),  # NCHW
    ("test_mambaout", 64),  # NHWC
    ("test_vit", 64),  # tokens, one class token
    ("deit_tiny_distilled_patch16_224", 64),  # two prefix tokens, two heads
    ("test_vit_relpos", 64),  # tokens without a prefix
    ("mobilevitv2_050", 64),  # patches of pixels
    ("nest_tiny", 64),  # tiles of tokens
    ("dpn48b", 64),  # blocks that return two tensors
    ("selecsls42", 64),  # blocks that pass a tensor on; wider at every block, no transformation
    ("crossvit_tiny_240", None),  # two branches of tokens
    ("xcit_nano_12_p8_224", 64),  # class attention at the end
    ("test_nfnet", 64),  # no batch-norm
    ("rexnet_100", 64),  # wider at every block, no transformation
]
WIDER_AT_EVERY_BLOCK = {"rexnet_100", "selecsls42"}


@pytest.fixture(scope="module")
def partner() -> list[Level]:
    return build_network("resnet18", meta=True).levels()


def test_every_module_of_timm_appears() -> None:
    named = {module for module in timm.list_modules() if set(NAMES) & set(timm.list_models(module=module))}
    assert set(timm.list_modules()) == named | set(LEFT_OUT)
    assert len(NAMES) == len(set(NAMES)) == len(named)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NAMES])
def test_plan(name: str, partner: list[Level]) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    levels = build_network(name, meta=True).levels()
    as_student, as_teacher = match(partner, levels), match(levels, partner)
    assert as_student.pairs[-1].student.exit == as_teacher.pairs[-1].teacher.exit == levels[-1].exit
    assert as_student.pairs[-1].teacher.exit == as_teacher.pairs[-1].student.exit == partner[-1].exit
    for plan in (as_student, as_teacher):
        depth = len(
            {tap.module for tap in levels[0].blocks}
        )  # a plain network is split into as many stages as the pyramid has, or blocks
        assert len(plan.pairs) >= 2 if len(levels) > 1 else len(plan.pairs) == min(len(partner), depth)
    for level in levels:
        assert level.blocks[-1] == level.exit
        assert level.exit.height * level.exit.width > 1


@pytest.mark.parametrize(("name", "size"), REAL)
def test_trains_from_relations_alone(name: str, size: int | None, partner: list[Level]) -> None:
    """The first layer gets a gradient from edges and transformations; logits and keys stay those of the plain model."""
    torch.manual_seed(0)
    teacher = build_network("resnet18", num_classes=10, input_size=(64, 64))
    student = build_network(name, num_classes=10, input_size=(size, size) if size else None)
    plan = match(partner, student.levels())
    stages = [pair for pair in plan.pairs if pair.transformation()]
    assert bool(stages) == (name not in WIDER_AT_EVERY_BLOCK)
    off = {} if stages else {"transform": {"weight": 0}}
    loss = build_loss(validate({"method": "irg+kd+at", "losses": off}).losses, plan)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    keys = list(student.model.state_dict())
    with torch.no_grad():
        target = Tapped(teacher.model, teacher.preprocess(), **loss.where("teacher")).eval()(images)
        plain = _logits(student, images)
    tapped = Tapped(student.model, student.preprocess(), **loss.where("student"))
    assert torch.equal(tapped.eval()(images).logits, plain)
    raw = loss(Batch(tapped.train()(images), torch.arange(4), target))
    assert all(value.isfinite() for value in raw.values())
    (raw["edges"] + raw.get("transform", 0)).backward()
    first = next(m for m in student.model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert first.weight.grad is not None and first.weight.grad.isfinite().all() and first.weight.grad.any()
    assert list(tapped.release().state_dict()) == keys


def _logits(network: Network, images: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = network.model.eval()(network.preprocess()(images))
    return logits
