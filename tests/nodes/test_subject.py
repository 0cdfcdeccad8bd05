"""Subject Images: what it reads, what it says, and what goes along the wire."""

import pytest
import torch
from PIL import Image

FOLDER = "example: cat faces (embedded)"
SUBJECT = {"trigger": "sks", "class_name": "cat face emoji"}


def test_a_missing_folder_is_no_error_where_pictures_are_connected(pack):
    assert pack.SubjectImages.validate_inputs(["nowhere"], images=(None,)) is True


def test_a_folder_that_another_node_names_is_judged_when_it_is_known(pack):
    assert pack.SubjectImages.validate_inputs([None]) is True
    assert pack.SubjectImages.fingerprint_inputs([None], **SUBJECT)
    with pytest.raises(ValueError, match="nowhere"):
        pack.run(pack.SubjectImages, folder=["nowhere"], **SUBJECT)


def test_a_folder_that_another_node_names_is_looked_at_again(pack, folder):
    """Which one is not known, so all count; with pictures connected none does."""
    fingerprint = pack.SubjectImages.fingerprint_inputs
    linked = [fingerprint([None], **SUBJECT)]
    unread = [fingerprint([folder.name], images=(None,), **SUBJECT)]
    Image.new("RGB", (64, 64)).save(folder / "one more.png")
    linked.append(fingerprint([None], **SUBJECT))
    unread.append(fingerprint([folder.name], images=(None,), **SUBJECT))
    assert len({*linked}) == 2
    assert len({*unread}) == 1


@pytest.mark.parametrize("name", ["John Jr.", "Who?", "a: b", "con"])
def test_every_folder_in_the_list_can_be_chosen(pack, name):
    """Also those that no other system would have made."""
    folder = pack.base / "input" / name
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    assert name in pack.picture_folders.folders()
    assert pack.SubjectImages.validate_inputs(name) is True


def test_a_list_of_folders_is_not_cut_to_its_first(pack):
    with pytest.raises(ValueError, match="folder came as a list of 2, and this node takes one"):
        pack.run(pack.SubjectImages, folder=[FOLDER, FOLDER], **SUBJECT)


def test_connected_captions_are_off_with_the_others(pack):
    given = {"folder": FOLDER, "images": [torch.rand(2, 64, 64, 3)], "captions": ["one", "two"]}
    out = pack.run(pack.SubjectImages, **given, use_captions=[False], **SUBJECT)
    assert [p.caption for p in out.values[0].pictures] == [None, None]
    assert "The captions have no effect: use_captions is off." in out.ui["text"][0]


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (torch.full((1, 64, 64, 3), torch.nan), "Image 3 is not of numbers"),
        (torch.rand(1, 1, 9, 3), "Image 3 is 9x1 px, which is too small"),
    ],
)
def test_an_image_that_shows_nothing_is_named(pack, image, says):
    """A VAE that overflowed, a crop that went wrong."""
    images = [torch.rand(2, 64, 64, 3), image]
    with pytest.raises(ValueError, match=says):
        pack.run(pack.SubjectImages, folder=[FOLDER], images=images, **SUBJECT)


@pytest.mark.parametrize("images", [[], [torch.zeros(0, 64, 64, 3)]])
def test_no_pictures_from_the_graph_are_not_the_folders(pack, images):
    with pytest.raises(ValueError, match="No pictures came in"):
        pack.run(pack.SubjectImages, folder=FOLDER, images=images, **SUBJECT)


@pytest.mark.parametrize(("channels", "seen"), [(1, (51, 51, 51)), (4, (153, 153, 153))])
def test_pictures_of_other_channels(pack, channels, seen):
    """Grey ones; cut-outs, on white like those of a folder: 0.2 at half the opacity is 0.6."""
    batch = torch.full((1, 16, 16, channels), 0.2)
    batch[..., 3:] = 0.5
    subject = pack.run(pack.SubjectImages, folder=FOLDER, images=[batch], **SUBJECT).values[0]
    assert subject.pictures[0].image.getpixel((0, 0)) == seen


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
    given = {"folder": FOLDER, "images": [torch.rand(2, 64, 64, 3)], **SUBJECT}
    out = pack.run(pack.SubjectImages, masks=[masks], **given)
    subject = out.values[0]
    assert subject.data.masked
    assert "'image 1': its mask of 32x32 px is resized to 64x64." in out.ui["text"][0]
    encoded = subject.encode_all(model, lambda event: None)
    assert [float(m[0, 0, 0]) for m in encoded.masks] == [1, 1]
    assert [float(m[0, 0, -1]) for m in encoded.masks] == [0, 0]
    other = pack.run(
        pack.SubjectImages,
        folder=FOLDER,
        images=[torch.rand(2, 64, 64, 3)],
        masks=[1 - masks],
        **SUBJECT,
    ).values[0]
    assert float(other.encode_all(model, lambda event: None).masks[0][0, 0, 0]) == 0
    with pytest.raises(ValueError, match="3 masks for 2 pictures"):
        pack.run(pack.SubjectImages, masks=[torch.ones(3, 16, 16)], **given)


def test_subjects_are_learnt_together(pack, model):
    words = {"folder": FOLDER, "class_name": "thing"}
    first = pack.run(
        pack.SubjectImages, trigger="sks", images=[torch.rand(2, 64, 64, 3)], **words
    ).values
    second = pack.run(
        pack.SubjectImages,
        trigger="zwx",
        images=[torch.rand(3, 64, 64, 3)],
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
    out = pack.run(pack.SubjectImages, folder=folder.name, **SUBJECT)
    (text,) = out.ui["text"]
    assert "film.mp4" in text
    assert "1 caption lacks 'sks', it was put in front: a.png." in text
    assert out.values[0].pictures[0].caption == "sks, an orange"


def test_a_caption_that_will_be_cut_is_said_on_the_node(pack, folder):
    (folder / "a.txt").write_text("word " * 226)
    (text,) = pack.run(pack.SubjectImages, folder=folder.name, **SUBJECT).ui["text"]
    assert "1 caption is longer than the 225 tokens that the text encoder reads" in text


def test_a_list_of_pictures_of_any_sizes_has_a_list_of_captions(pack):
    sizes = [torch.rand(1, 64, 48, 3), torch.rand(2, 32, 64, 3)]
    given = {"folder": [FOLDER], "trigger": ["sks"], "class_name": ["cat"], "images": sizes}
    out = pack.run(pack.SubjectImages, **given, captions=["red, a hat", "", "sks in blue"])
    subject = out.values[0]
    assert [p.image.size for p in subject.pictures] == [(48, 64), (64, 32), (64, 32)]
    assert [p.caption for p in subject.pictures] == ["sks, red, a hat", None, "sks in blue"]
    assert subject.prompt == "a sks cat"
    assert "image 1: sks, red, a hat\nimage 3: sks in blue" in out.ui["text"][0]
    one = pack.run(pack.SubjectImages, **given, captions=["blue"]).values[0]
    assert {p.caption for p in one.pictures} == {"sks, blue"}
    with pytest.raises(ValueError, match="2 captions for 3 pictures: connect one for each"):
        pack.run(pack.SubjectImages, **given, captions=["a", "b"])


def test_the_table_shows_what_the_model_will_read(pack, folder):
    (folder / "a.txt").write_text("red, blue, green")
    out = pack.run(pack.SubjectImages, folder=folder.name, shuffle_tags=True, **SUBJECT)
    line = out.ui["text"][0].splitlines()[-1]
    assert line.startswith("a.png: sks, ")
    assert line.endswith(" orders)")
    off = pack.run(pack.SubjectImages, folder=folder.name, use_captions=False, **SUBJECT)
    assert off.values[0].pictures[0].caption is None
    assert "\n" not in off.ui["text"][0]


def test_a_preset_sets_what_nobody_set_all_the_way_down(pack):
    out = pack.run(pack.SubjectImages, folder=FOLDER, preset="style", tag_dropout=0.2, **SUBJECT)
    subject = out.values[0]
    assert (subject.data.flip, subject.data.tag_dropout, subject.preset) == (True, 0.2, "style")
    assert "Preset style: rank 16, flip true" in out.ui["text"][0]


def test_the_hosts_dataset_folders_are_read(pack, monkeypatch):
    root = pack.base / "datasets"
    (root / "dogs").mkdir(parents=True)
    Image.new("RGB", (64, 64), "orange").save(root / "dogs" / "a.png")
    (root / "encoded").mkdir()
    (root / "encoded" / "shard_0000.pkl").write_bytes(b"x")
    monkeypatch.setattr(pack.host, "dataset_roots", lambda: [root])
    assert {"datasets/dogs", "datasets/encoded"} <= set(pack.picture_folders.folders())
    assert pack.run(pack.SubjectImages, folder="datasets/dogs", **SUBJECT).values[0].pictures
    says = pack.SubjectImages.validate_inputs("datasets/encoded")
    assert says.startswith("No images in 'datasets/encoded': found 0 of")
    assert "only shard_0000.pkl" in says
    assert "is not a name inside" in pack.SubjectImages.validate_inputs("datasets/../x")
