"""Which pictures train and which validate."""

import pytest
from PIL import Image

from cntlora_core.data.dataset import read_subject
from cntlora_core.data.encoded import with_validation


def save(path, color):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (64, 64), color).save(path)


@pytest.mark.parametrize(
    ("folders", "held"),
    [
        ({"3_cat": 5, "10_dog": 1}, {"3_cat": 1}),
        ({"1_a": 5, "1_b": 6}, {"1_a": 1, "1_b": 1}),
        ({"1_a": 3, "1_b": 2}, {"1_a": 1}),
        ({f"1_{n}": 1 for n in range(6)}, {}),
        ({"1_a": 4}, {}),
    ],
)
def test_a_part_of_the_subject_keeps_a_picture_to_train_on(mini_sd, tmp_path, folders, held):
    for folder, count in folders.items():
        for n in range(count):
            save(tmp_path / folder / f"{n}.png", (n * 40, 90, 200))
    subject = read_subject(mini_sd, tmp_path, "x")
    training, validation = with_validation(subject)
    assert set(training.groups) == set(folders)
    if held:
        assert {g: validation.groups.count(g) for g in set(validation.groups)} == held
        assert not set(training.pictures) & set(validation.pictures)
    else:
        assert training is validation is subject
