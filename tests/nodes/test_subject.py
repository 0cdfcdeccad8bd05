"""Subject Images: what it reads, what it says, and what goes along the wire."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

FOLDER = "example: cat faces (embedded)"
SUBJECT = {"trigger": "sks", "class_name": "cat face emoji"}


@pytest.fixture
def folder(pack, request):
    path = pack.base / "input" / request.node.name.split("[")[0]
    path.mkdir()
    Image.new("RGB", (64, 64), "orange").save(path / "a.png")
    return path


def run(node, **inputs):
    node.hidden = SimpleNamespace(unique_id="12:5", extra_pnginfo=None)
    with torch.inference_mode():  # as ComfyUI does
        return node.execute(**inputs)


@pytest.fixture(scope="module")
def model(pack):
    return run(pack.LoadCheckpoint, checkpoint="mini-sd (embedded)", precision="auto").values[0]


def test_a_missing_folder_is_no_error_where_pictures_are_connected(pack):
    assert pack.SubjectImages.validate_inputs("nowhere", images=None) is True


def test_captions_and_masks_change_the_fingerprint_and_are_refused_as_links(pack, folder, tmp_path):
    first = pack.SubjectImages.fingerprint_inputs(folder.name, **SUBJECT)
    (folder / "a.caption").write_text("hello")
    second = pack.SubjectImages.fingerprint_inputs(folder.name, **SUBJECT)
    Image.new("L", (64, 64), 255).save(folder / "a-masklabel.png")
    third = pack.SubjectImages.fingerprint_inputs(folder.name, **SUBJECT)
    assert len({first, second, third}) == 3
    for name in ("a.caption", "metadata.jsonl"):
        (folder / "a.caption").unlink(missing_ok=True)
        (tmp_path / name).write_text("secret")
        (folder / name).symlink_to(tmp_path / name)
        assert "link to a place outside" in pack.SubjectImages.validate_inputs(folder.name)


def test_masks_from_the_graph_say_what_counts(pack, model):
    masks = torch.zeros(1, 32, 32)
    masks[:, :, :16] = 1
    given = {"folder": FOLDER, "images": torch.rand(2, 64, 64, 3), **SUBJECT}
    out = run(pack.SubjectImages, masks=masks, **given)
    subject = out.values[0]
    assert subject.data.masked
    assert "'image 1': its mask of 32x32 px is resized to 64x64." in out.ui["text"][0]
    encoded = subject.encode_all(model, lambda event: None)
    assert [float(m[0, 0, 0]) for m in encoded.masks] == [1, 1]
    assert [float(m[0, 0, -1]) for m in encoded.masks] == [0, 0]
    other = run(
        pack.SubjectImages,
        folder=FOLDER,
        images=torch.rand(2, 64, 64, 3),
        masks=1 - masks,
        **SUBJECT,
    ).values[0]
    assert float(other.encode_all(model, lambda event: None).masks[0][0, 0, 0]) == 0
    with pytest.raises(ValueError, match="3 masks for 2 pictures"):
        run(pack.SubjectImages, masks=torch.ones(3, 8, 8), **given)


def test_subjects_are_learnt_together(pack, model):
    words = {"folder": FOLDER, "class_name": "thing"}
    first = run(pack.SubjectImages, trigger="sks", images=torch.rand(2, 64, 64, 3), **words).values
    second = run(
        pack.SubjectImages,
        trigger="zwx",
        images=torch.rand(3, 64, 64, 3),
        and_subject=first[0],
        **words,
    ).values
    both = second[0].encode_all(model, lambda event: None)
    assert both.concepts == (0, 0, 0, 1, 1)
    assert both.trigger == "zwx, sks"
    assert set(both.captions) == {"a zwx thing", "a sks thing"}


def test_what_is_left_out_is_said_on_the_node(pack, folder):
    (folder / "film.mp4").write_bytes(b"x")
    (folder / "a.txt").write_text("an orange")
    out = run(pack.SubjectImages, folder=folder.name, **SUBJECT)
    (text,) = out.ui["text"]
    assert "film.mp4" in text
    assert "1 captions lack 'sks', it was put in front: a.png." in text
    assert out.values[0].pictures[0].caption == "sks, an orange"
