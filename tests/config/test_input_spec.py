"""Input sizes: the crop that several networks share."""

from __future__ import annotations

import pytest

from irgdistill.config import InputSpec

Size = tuple[int, int]


def spec(size: Size, mean: float = 0.5) -> InputSpec:
    return InputSpec(size, (mean,) * 3, (0.2,) * 3, "bicubic", 0.9)


@pytest.mark.parametrize(
    ("own", "others", "crop"),
    [
        ((32, 96), [(64, 32)], (64, 96)),
        ((64, 32), [(32, 96)], (64, 96)),
        ((32, 32), [(64, 64)], (64, 64)),
        ((64, 64), [(32, 32)], (64, 64)),
        ((10, 10), [(20, 5), (5, 30)], (20, 30)),
        ((10, 20), [], (10, 20)),
        ((10, 20), [None], (10, 20)),
    ],
)
def test_a_crop_covers_the_height_and_the_width_of_all(own: Size, others: list[Size | None], crop: Size) -> None:
    assert spec(own).covering(*(None if other is None else spec(other) for other in others)).size == crop


def test_a_crop_keeps_everything_else() -> None:
    covered = spec((8, 16), mean=0.1).covering(spec((16, 8), mean=0.9))
    assert covered == InputSpec((16, 16), (0.1,) * 3, (0.2,) * 3, "bicubic", 0.9)
    assert covered.shape == (3, 16, 16)
