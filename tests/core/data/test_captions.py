"""What the model reads of each picture, however its caption came."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from cntlora_core.cli.checks import uncalled
from cntlora_core.config import CalibrationConfig, DataConfig
from cntlora_core.data.caption_files import decode_text
from cntlora_core.data.captions import fill_words, prepare_captions
from cntlora_core.data.dataset import encode_subject, read_subject
from cntlora_core.data.images import Picture, find_pictures
from cntlora_core.events import Notice
from cntlora_core.run.saving import save_run


def save(path, color="red"):
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (64, 64), color).save(path)


def read(folder, prompt="a photo", trigger="", class_name="", **options):
    """What the model reads of each picture by name, and what was said."""
    said = []
    pictures, prompt = prepare_captions(
        find_pictures(folder, said.append),
        prompt,
        (trigger, class_name),
        observer=said.append,
        **options,
    )
    return {p.name: p.caption or prompt for p in pictures}, [e.text for e in said]


@pytest.mark.parametrize(
    "raw",
    [
        "a cät\r\n sitting".encode(),
        "\ufeffa cät\n sitting\n".encode(),
        "a cät sitting".encode("utf-16"),
        "a cät sitting".encode("utf-16-le"),
        "a cät sitting".encode("utf-16-be"),
        b"\xfe\xff" + "a cät sitting".encode("utf-16-be"),
        "a cät sitting".encode() + b"\0",
    ],
)
@pytest.mark.parametrize("name", ["cat.txt", "CAT.TXT", "cat.caption", "cat.png.txt"])
def test_captions_of_any_program(tmp_path, raw, name):
    save(tmp_path / "cat.png")
    (tmp_path / name).write_bytes(raw)
    assert read(tmp_path) == ({"cat.png": "a cät sitting"}, [])


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"x" * 10_000_000, "more than 10000 bytes"),
        (b"caf\xe9", "neither UTF-8 nor UTF-16"),
        (b"\xff\xfe\x00", "neither UTF-8 nor UTF-16"),
        (b"\x1b[31mred", "control characters"),
        (b" \n", "is empty"),
    ],
)
def test_captions_that_cannot_be_meant_are_left_out_and_named(tmp_path, raw, says):
    save(tmp_path / "cat.png")
    (tmp_path / "cat.txt").write_bytes(raw)
    texts, said = read(tmp_path)
    assert texts == {"cat.png": "a photo"}
    assert len(said) == 1
    assert "'cat.txt'" in said[0]
    assert says in said[0]


@pytest.mark.parametrize("text", ["“cat” on mat", "一 cat on mat", "x"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_known_by_its_letters(text, encoding):
    assert decode_text(text.encode(encoding)) == text


@given(st.binary(max_size=60))
@settings(deadline=None)
def test_no_bytes_crash_the_caption_reader(raw):
    try:
        text = decode_text(raw)
    except ValueError:
        return
    assert text == " ".join(text.split())
    assert "\0" not in text


def lines(*rows):
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


@pytest.mark.parametrize(
    "text",
    [
        lines({"file_name": "a.png", "text": "one sks"}, {"file_name": "b.png", "text": "two sks"}),
        lines(
            {"image_path": "/x/a.png", "caption": "one sks"},
            {"image": "b.png", "prompt": "two sks"},
        ),
        lines({"a.png": {"caption": "one", "tags": "sks"}, "b.png": {"tags": "two sks"}}),
        "\ufeff"
        + lines(
            {"file_name": "sub\\A.PNG", "text": "one sks"},
            "",
            {"file_name": "b.png", "text": "two sks"},
        ),
    ],
)
def test_captions_of_a_metadata_file(tmp_path, text):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", "blue")
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8")
    texts, said = read(tmp_path, trigger="sks")
    assert {name: words.replace(",", "") for name, words in texts.items()} == {
        "a.png": "one sks",
        "b.png": "two sks",
    }
    assert said == []


def test_a_metadata_file_is_read_without_a_trigger_unless_captions_are_off(mini_sd, tmp_path):
    save(tmp_path / "cat.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat.png", "text": "a cat"}')
    assert read(tmp_path)[0] == {"cat.png": "a cat"}
    assert read_subject(mini_sd, tmp_path, "x").captions == ("a cat",)
    off = DataConfig(use_captions=False)
    assert read_subject(mini_sd, tmp_path, "x", off).captions == ("x",)


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\r"])
def test_a_line_of_metadata_ends_at_its_newline(tmp_path, mark):
    """JSON may hold, as they are, marks that Python takes for line ends too."""
    save(tmp_path / "a.png")
    text = '{"file_name": "a.png", "text": "one' + mark.replace("\r", "") + ' cat"}' + mark + "\n"
    (tmp_path / "metadata.jsonl").write_bytes(text.replace(mark + "\n", "\r\n").encode())
    texts, said = read(tmp_path, trigger="cat")
    assert texts == {"a.png": "one cat"}
    assert said == []


def test_wrong_lines_and_strangers_of_a_metadata_file_are_told(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(
        lines(
            "not json",
            [1],
            {"text": "no file"},
            {"file_name": "a.png", "text": "a \ud800 cat"},
            {"file_name": "z\ud83d.png", "text": "of nobody"},
            "[" * 100_000,
        )
    )
    texts, said = read(tmp_path, trigger="sks")
    assert texts == {"a.png": "sks, a ? cat"}
    assert "line 1, 2, 3 and 1 more was left out" in said[0]
    assert "1 caption of metadata.jsonl is of no picture here: z\ufffd.png." in said[1]


def by_place(folder):
    said = []
    pictures = find_pictures(folder, said.append)
    return {(p.group, p.name): p.caption for p in pictures}, [e.text for e in said]


@pytest.mark.parametrize("prefix", ["", "./", "/home/me/set/", "C:\\set\\"])
def test_a_line_is_of_the_picture_in_the_folder_that_it_names(tmp_path, prefix):
    """Pictures of one name in several folders, as Hugging Face's scripts lay them out."""
    for name in ("1.png", "10_dog/1.png", "10_cat/1.png"):
        save(tmp_path / name)
    (tmp_path / "10_cat" / "1.txt").write_text("a cat")
    rows = lines(
        {"file_name": "1.png", "text": "all"}, {"file_name": f"{prefix}10_Dog/1.png", "text": "dog"}
    )
    (tmp_path / "metadata.jsonl").write_text(rows)
    texts, said = by_place(tmp_path)
    assert texts == {("", "1.png"): "all", ("10_dog", "1.png"): "dog", ("10_cat", "1.png"): "a cat"}
    assert said == []


def test_lines_above_subfolders_alone_are_theirs(tmp_path):
    save(tmp_path / "10_dog" / "1.png")
    save(tmp_path / "10_cat" / "2.png")
    rows = [{"file_name": "10_dog/1.png", "text": "a dog"}, {"file_name": "3.png", "text": "none"}]
    (tmp_path / "metadata.jsonl").write_text(lines(*rows))
    texts, said = by_place(tmp_path)
    assert texts == {("10_dog", "1.png"): "a dog", ("10_cat", "2.png"): None}
    assert said == ["1 caption of metadata.jsonl is of no picture here: 3.png."]


def test_a_line_stands_in_for_an_empty_file_and_is_no_strangers(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("own")
    (tmp_path / "b.txt").write_text(" ")
    (tmp_path / "d.png").write_bytes(b"damaged")
    rows = [{"file_name": f"{n}.png", "text": f"line {n}"} for n in "abccd"]
    (tmp_path / "metadata.jsonl").write_text(lines(*rows))
    texts, said = read(tmp_path)
    assert texts == {"a.png": "own", "b.png": "line b", "c.png": "line c"}
    assert said == [
        "metadata.jsonl: 1 picture has a second line, which counts: c.png.",
        "The caption 'b.txt' is empty.",
        "Skipped 'd.png': it cannot be read (no picture, or of a kind that is not read).",
    ]


def test_the_trigger_is_put_in_front_of_captions_that_lack_it(tmp_path):
    for name, text in {
        "a": "a cat",
        "b": "SKS on a sofa",
        "c": "asksb",
        "d": "{trigger} {Class} asleep",
    }.items():
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    save(tmp_path / "e.png")
    texts, said = read(tmp_path, "a {trigger} {class}", "sks", "cat")
    assert texts == {
        "a.png": "sks, a cat",
        "b.png": "SKS on a sofa",
        "c.png": "sks, asksb",
        "d.png": "sks cat asleep",
        "e.png": "a sks cat",
    }
    assert said == ["2 captions lack 'sks', it was put in front: a.png, c.png."]
    texts, said = read(tmp_path, "a {trigger} {class}", "sks", "cat", add_trigger=False)
    assert texts["a.png"] == "a cat"
    assert said == ["2 captions lack 'sks', what they show will not answer to it: a.png, c.png."]


def test_a_prompt_that_lacks_the_trigger_is_told(tmp_path):
    save(tmp_path / "a.png")
    texts, said = read(tmp_path, "a cat", "sks")
    assert texts == {"a.png": "sks, a cat"}
    assert said == ["The prompt lacks 'sks', it was put in front."]


def test_placeholders_that_nothing_fills_are_told(tmp_path):
    save(tmp_path / "a.png")
    texts, said = read(tmp_path, "a {trigger} {class} by {artist}")
    assert texts == {"a.png": "a by {artist}"}
    assert said == [
        "{trigger} stands for nothing: no trigger was given, it is left out.",
        "{class} stands for nothing: no class was given, it is left out.",
        "{artist} stays as it is: only {trigger} and {class} are filled in.",
    ]


def test_words_with_any_characters_are_filled_in_as_they_are():
    assert fill_words("a {trigger}  {class}", r"s\1(k", "{trigger}") == r"a s\1(k {trigger}"


def test_captions_that_differ_only_where_the_encoder_stops_are_told(mini_sd):
    start = "cat " * 100  # three chunks of the miniature are 90 tokens
    pictures = [
        Picture(f"{n}", Image.new("RGB", (64, 64)), f"{n}", caption=start + end)
        for n, end in enumerate(("red", "blue"))
    ]
    said = []
    encode_subject(mini_sd, pictures, "x", observer=said.append)
    (text,) = [e.text for e in said if isinstance(e, Notice)]
    assert text.startswith("2 captions are longer than the 90 tokens")
    assert "2 of them are the same to it" in text


def test_changed_captions_are_other_data(mini_sd, tmp_path):
    """A run does not go on from a checkpoint of other words."""
    save(tmp_path / "a.png")
    plain = read_subject(mini_sd, tmp_path, "x").digest
    (tmp_path / "a.txt").write_text("one")
    one = read_subject(mini_sd, tmp_path, "x").digest
    (tmp_path / "a.txt").write_text("two")
    assert len({plain, one, read_subject(mini_sd, tmp_path, "x").digest}) == 3


def test_half_a_letter_from_a_workflow_stops_nothing(mini_sd):
    picture = Picture("a", Image.new("RGB", (64, 64)), "0", caption="a cat \ud83d")
    (read,), prompt = prepare_captions([picture], "a \ud83d {trigger}", ("sks\ud83d", "cat"))
    json.dumps([read.caption, prompt], ensure_ascii=False).encode()
    assert len(mini_sd.prompts.encode(["a cat \ud83d"], torch.device("cpu")))


def test_a_prompt_that_captions_take_the_place_of_calls_nothing(mini_sd, tmp_path):
    """On the command line, where its words may be the trigger's."""
    prompt = "a photo of sks cat"
    assert uncalled(["a photo of sks cat, sitting"], prompt, "") == []
    assert uncalled(["a red cat"], prompt, "sks") == []
    (said,) = uncalled(["a red cat", "a cat"], prompt, "")
    assert said.startswith("2 captions are read in place of the prompt 'a photo of sks cat'")
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a red cat")
    for trigger, phrase in (("sks", "sks"), ("", None)):
        subject = read_subject(mini_sd, tmp_path, prompt, words=(trigger, ""))
        file = save_run(
            tmp_path / f"x{trigger}.safetensors",
            {},
            mini_sd,
            subject,
            steps=0,
            calibration=CalibrationConfig(),
        )
        with safe_open(file, "pt") as opened:
            assert opened.metadata().get("modelspec.trigger_phrase") == phrase
