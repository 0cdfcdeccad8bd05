"""What the command line shows: in any encoding, JSON for everybody, the speed of this run."""

import io
import json
import sys

import pytest

from cntlora_core.cli import console
from cntlora_core.cli.console import Console, EventFile, print_json
from cntlora_core.events import Notice, Status, Step, Training, Validation


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding)

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
def test_words_that_the_console_lacks_are_shown_all_the_same(monkeypatch, encoding):
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console() as shown:
        shown(Status("Calibrating 猫"))
    assert "Calibrating" in terminal.text()
    monkeypatch.setattr(sys, "stdout", terminal)
    print_json({"trigger": "猫 é"})
    assert json.loads(terminal.text().splitlines()[-1]) == {"trigger": "猫 é"}


def test_no_number_is_nan_in_json(tmp_path, capsys):
    print_json({"loss": float("nan"), "more": [float("inf"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "more": [None, 1.5]}
    with EventFile(tmp_path / "log.jsonl") as events:
        events(Validation(1, float("nan")))
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line) == {"type": "validation", "step": 1, "loss": None}


def test_events_go_on_where_a_run_goes_on(tmp_path):
    for step in (1, 2):
        with EventFile(tmp_path / "log.jsonl", append=step == 2) as events:
            events(Step(step, 0.5, 1e-3))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_events_that_cannot_be_written_are_told_once(tmp_path):
    told = []
    with EventFile(tmp_path / "missing" / "log.jsonl", told.append) as events:
        for step in (1, 2):
            events(Step(step, 0.5, 1e-3))
    (notice,) = told
    assert isinstance(notice, Notice)
    assert "the run goes on without" in notice.text


def test_the_speed_after_a_resume_is_that_of_the_steps_made_now(monkeypatch):
    made = []
    real = console.tqdm

    def bar(**options):
        made.append(real(**options | {"file": io.StringIO()}))
        return made[-1]

    monkeypatch.setattr(console, "tqdm", type("Bars", (), {"__call__": lambda _, **o: bar(**o)})())
    monkeypatch.setattr(console.Console, "_line", lambda self, text: None)
    with Console() as shown:
        shown(Training(1000, 900))
        shown(Step(901, 0.5, 1e-3))
        assert (made[0].initial, made[0].n, made[0].total) == (900, 901, 1000)
