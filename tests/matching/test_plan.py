"""Which stages meet."""

from __future__ import annotations

import pytest
import timm
import torch

from irgdistill.config.schema import MatchingConfig
from irgdistill.errors import UserError
from irgdistill.matching.levels import Level, Tap, find_levels
from irgdistill.matching.plan import Plan, ends, match
from irgdistill.models.build import build_network


def level(k: int, width: int = 8, blocks: int = 3) -> Level:
    taps = tuple(Tap(f"l{k}.{i}", width, 64 >> k, 64 >> k, "NCHW") for i in range(blocks))
    return Level(k, taps[0], taps[-1], "block", taps)


def meets(plan: Plan) -> list[tuple[int, int]]:
    return [(pair.teacher.level, pair.student.level) for pair in plan.pairs]


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ([2, 3, 4, 5], [2, 3, 4, 5], [(2, 2), (3, 3), (4, 4), (5, 5)]),
        ([0, 1, 2], [1, 2, 3], [(1, 1), (2, 3)]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4], [(2, 2), (3, 3), (5, 4)]),
        ([3, 4], [2, 3, 4, 5], [(3, 3), (4, 5)]),
        ([4, 5, 6], [2, 3], [(5, 2), (6, 3)]),
        ([0, 2, 3, 4], [0, 1, 2, 3, 4], [(2, 2), (3, 3), (4, 4)]),
    ],
)
def test_equal_levels_meet_and_the_last_ones_always(
    teacher: list[int], student: list[int], expected: list[tuple[int, int]]
) -> None:
    plan = match([level(k) for k in teacher], [level(k) for k in student])
    assert meets(plan) == expected


def test_what_is_left_out_is_said() -> None:
    plan = match([level(k) for k in (0, 1, 2)], [level(k) for k in (1, 2, 3)])
    assert any("teacher /1 " in note for note in plan.notes)
    assert any("last stages meet although /4 and /8 differ" in note for note in plan.notes)
    assert any("student /4 " in note for note in plan.notes)


def test_a_network_of_one_level_is_split_by_depth() -> None:
    isotropic = [level(4, blocks=12)]
    plan = match(isotropic, [level(k) for k in (2, 3, 4, 5)])
    assert [(p.teacher.blocks[0].module, p.teacher.exit.module) for p in plan.pairs] == [
        ("l4.0", "l4.2"),
        ("l4.3", "l4.5"),
        ("l4.6", "l4.8"),
        ("l4.9", "l4.11"),
    ]
    assert len(match(isotropic, isotropic).pairs) == 4


def test_a_single_block_is_entered_where_the_one_before_ends() -> None:
    plan = match([level(4, blocks=3)], [level(k) for k in (3, 4, 5)])
    moved = [ends(pair.teacher) for pair in plan.pairs]
    assert moved[0] is None
    assert [(a.module, b.module) for a, b in filter(None, moved)] == [("l4.0", "l4.1"), ("l4.1", "l4.2")]


def test_a_branch_of_another_width_beside_the_last_one_does_not_count() -> None:
    taps = tuple(Tap(f"b{i}.{j}", (8, 16)[j], 4, 4, "BLC", 1) for i in range(4) for j in range(2))
    plan = match([Level(4, taps[1], taps[-1], "block", taps)], [level(4, blocks=4)])
    assert [pair.teacher.exit.module for pair in plan.pairs] == ["b0.1", "b1.1", "b2.1", "b3.1"]


def test_an_exit_of_another_width_has_a_partner() -> None:
    """MobileNetV2's last stage: three blocks of 160 and one of 320."""
    taps = tuple(Tap(f"b.{i}", width, 7, 7, "NCHW") for i, width in enumerate((160, 160, 160, 320)))
    found = ends(Level(5, taps[0], taps[-1], "block-inner", taps))
    assert found == (taps[0], taps[2])


PYRAMID = [level(k) for k in (2, 3, 4, 5)]


def test_overrides() -> None:
    assert meets(match(PYRAMID, PYRAMID, MatchingConfig(skip=[8]))) == [(2, 2), (4, 4), (5, 5)]
    assert meets(match(PYRAMID, PYRAMID, MatchingConfig(levels=2))) == [(4, 4), (5, 5)]
    named = match(PYRAMID, PYRAMID, MatchingConfig(taps_student=["l3.1", "l5.2"], taps_teacher=["l4.2", "l5.2"]))
    assert [(p.teacher.exit.module, p.student.exit.module) for p in named.pairs] == [("l4.2", "l3.1"), ("l5.2", "l5.2")]
    assert [tap.module for tap in named.pairs[0].student.blocks] == ["l3.0", "l3.1"]
    one_side = match(PYRAMID, PYRAMID, MatchingConfig(taps_student=["l5.1"]))
    assert [(p.teacher.exit.module, p.student.exit.module) for p in one_side.pairs] == [("l5.2", "l5.1")]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"taps_student": ["l5.3"]}, "the student has no block 'l5.3'; did you mean l5"),
        ({"taps_teacher": ["l5.2", "l3.0"]}, "in the order of its depth"),
        ({"taps_teacher": ["l3.0"], "taps_student": ["l3.0", "l4.0"]}, "1 teacher taps and 2 student taps"),
        ({"skip": [64]}, "--skip-level 64: neither network has it (levels: 4, 8, 16, 32)"),
        ({"skip": [4, 8, 16, 32]}, "no stage left"),
    ],
)
def test_wrong_overrides_are_one_line(config: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UserError) as error:
        match(PYRAMID, PYRAMID, MatchingConfig(**config))  # type: ignore[arg-type]
    assert message in str(error.value)


def test_one_to_many_takes_the_last_blocks_of_the_last_stage() -> None:
    plan = match([level(k) for k in (2, 3)], [level(k, blocks=4) for k in (2, 3)])
    assert [tap.module for tap in plan.student_tail(2)] == ["l3.2", "l3.3"]
    assert [tap.module for tap in plan.student_tail(9)] == ["l3.0", "l3.1", "l3.2", "l3.3"]
    assert [tap.module for tap in plan.student_taps(2)] == ["l2.0", "l2.3", "l3.0", "l3.3", "l3.2"]


def test_no_level_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="the student has no stage"):
        match([level(2)], [])


PYRAMIDS = {
    "cifar_resnet20": [0, 1, 2],
    "cifar_shufflenet_x0_5": [0, 1, 2],
    "resnet18": [2, 3, 4, 5],
    "resnet50": [2, 3, 4, 5],
    "mobilenetv2_100": [1, 2, 3, 4, 5],
    "efficientnet_b0": [1, 2, 3, 4, 5],
    "regnety_008": [2, 3, 4, 5],
    "convnext_atto": [2, 3, 4, 5],
}


@pytest.mark.parametrize("name", PYRAMIDS)
def test_levels_of_convolutional_pyramids(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert [found.level for found in find_levels(model, model.pretrained_cfg["input_size"])] == PYRAMIDS[name]


def test_resnet50_to_mobilenetv2_without_a_layer_name() -> None:
    teacher, student = build_network("resnet50"), build_network("mobilenetv2_100")
    plan = match(teacher.levels(), student.levels())
    assert meets(plan) == [(2, 2), (3, 3), (4, 4), (5, 5)]
    assert [pair.teacher.exit.module for pair in plan.pairs] == ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]
    assert [pair.student.exit.module for pair in plan.pairs] == ["blocks.1.1", "blocks.2.2", "blocks.4.2", "blocks.6.0"]
    assert all(pair.transformation() is not None for pair in plan.pairs)
    assert "/2 is left out: finer than /4" not in plan.notes, "resnet50 has no /2 block"


def test_the_plan_survives_metadata() -> None:
    import json

    plan = match([level(2), level(3)], [level(2), level(3)])
    assert json.loads(json.dumps(plan.to_dict()))["pairs"][1]["teacher"]["exit"]["module"] == "l3.2"
