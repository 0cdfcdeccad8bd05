"""Captions that are cut are named before anything is loaded."""

import json

import pytest
from PIL import Image

from cntlora_core.cli.main import main
from cntlora_core.data.lengths import PIECES, too_long
from cntlora_core.model.loader import MINI_SD_FOLDER

WORDS = "it's a cat, 12 hats_and 3.5 mm; sitting..."


@pytest.fixture(autouse=True)
def no_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)


@pytest.mark.parametrize("limit", [75, 225])
def test_only_what_is_longer_is_told(limit):
    fits, cut = " ".join(["cat"] * limit), " ".join(["dog"] * (limit + 1))
    assert too_long([fits], limit) == []
    (says,) = too_long([fits, cut, cut], limit)
    assert says.startswith(f"1 caption is longer than the {limit} tokens that the text encoder")
    assert says.endswith("the rest is not seen: dog dog dog dog dog dog dog dog dog dog ....")


def test_pieces_are_never_more_than_tokens(mini_sd):
    assert PIECES.findall(WORDS) == [
        *("it", "'s", "a", "cat", ",", "1", "2", "hats", "_", "and"),
        *("3", ".", "5", "mm", ";", "sitting", "..."),
    ]
    assert len(PIECES.findall(WORDS)) <= len(mini_sd.prompts._ids(0, [WORDS])[0])


def test_a_vocabulary_counts_what_words_do_not_show(monkeypatch):
    """The embedded model's own stands for CLIP's: it cuts words into more tokens than one."""
    folder = MINI_SD_FOLDER / "model" / "tokenizer"
    monkeypatch.setattr("cntlora_core.model.tokenizers.check_tokenizer", lambda *given: None)
    text = "antidisestablishmentarianism " * 60
    assert too_long([text], 75) == []
    assert len(too_long([text], 75, [folder])) == 1


def test_what_is_counted_is_what_is_read(mini_sd, monkeypatch):
    """Booru tags escape their brackets; the model reads no backslash."""
    folder = MINI_SD_FOLDER / "model" / "tokenizer"
    monkeypatch.setattr("cntlora_core.model.tokenizers.check_tokenizer", lambda *given: None)
    text = r"anna \(b\) " * 8
    (read,) = mini_sd.prompts._ids(0, [text])
    assert too_long([text], len(read), [folder]) == []
    (said,) = too_long([text], len(read) - 1, [folder])
    assert r"anna \(b\)" in said, "it is shown as it is written"


def test_check_tells_it(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("word " * 100)
    for limit, count in (("75", 1), ("225", 0)):
        assert main(["check", "--images", str(tmp_path), "--max-tokens", limit]) == 0
        findings = json.loads(capsys.readouterr().out)["findings"]
        assert sum("tokens" in text for text in findings) == count
