"""What a run tells, on its way to the page."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def events(pack, report):
    text = pack.host.events_file(report.folder, report.run).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("saved", "says"), [(False, "Cancelled"), (True, "Cancelled; what was trained is kept")]
)
def test_a_cancelled_node_says_that_something_is_kept_only_when_it_is(pack, saved, says):
    """Calibrate and Prior Images train nothing, and Train may not have got so far."""
    report = pack.reporter.Reporter(pack.host.Identity("", "8"), "CNTLoRACalibrate")
    if saved:
        report(pack.reporter.Saved("people/anna.safetensors"))
    with pytest.raises(pack.host.Cancelled), report:
        raise pack.host.Cancelled
    last = events(pack, report)[-1]
    assert (last["type"], last["ok"], last["text"]) == ("end", False, says)


def test_the_page_handles_every_event_there_is_and_no_other(pack):
    def kinds(event):
        return {event.type}.union(*map(kinds, event.__subclasses__()))

    event = pack.reporter.Event
    told = kinds(event) - {event.type, "done"}  # `done` is the command line's last line
    script = (ROOT / "web/run_state.js").read_text(encoding="utf-8")
    (handlers,) = re.findall(r"^const HANDLERS = \{\n(.*?)^\};", script, re.S | re.M)
    handled = set(re.findall(r"^  (\w+):", handlers, re.M)) | {"run"}
    assert 'event.type === "run"' in script
    assert told == handled


def test_a_later_run_leaves_the_earlier_one_for_the_cache_to_show(pack):
    node = pack.host.Identity("w", "3")
    first, second = (pack.reporter.Reporter(node, "CNTLoRATrain") for _ in range(2))
    for report in (first, second):
        with report:
            pass
    assert pack.host.events_file(node.path) == second.lines.path
    assert pack.host.events_file(node.path, first.run) == first.lines.path
    assert pack.host.events_file(node.path, "../../etc") is None


def test_a_page_is_told_of_its_own_last_run_or_else_of_anybodys(pack):
    """Two pages may have the same file open."""
    runs = {}
    for client in ("a", "b", "a", "b"):
        with pack.reporter.Reporter(pack.host.Identity("two", "3", client), "x") as report:
            runs[client] = report
    folder = pack.host.Identity("two", "3").path
    for client in ("a", "b"):
        assert pack.host.events_file(folder, client=client) == runs[client].lines.path
        assert runs[client].trace["client"] == client
    assert pack.host.events_file(folder, client="later") == runs["b"].lines.path


def test_samples_of_one_step_are_two_files(pack):
    """Those of the weights that are given out may be of a step that was drawn before."""
    with pack.reporter.Reporter(pack.host.Identity("", "8"), "x") as report:
        for _ in range(2):
            report.picture(4, [Image.new("RGB", (8, 8))])
        assert len([*report.folder.glob(f"{report.run}_000004_*.png")]) == 2


def test_the_bar_is_full_at_the_end_only(pack, monkeypatch):
    bar = []
    monkeypatch.setattr(pack.host, "progress_bar", lambda node: lambda *at: bar.append(at))
    for steps in (0, 4):
        with pack.reporter.Reporter(pack.host.Identity("", "9"), "x", steps) as report:
            for done in (1, 2):
                report(pack.reporter.Progress("encoding pictures", done, 2))
            report(pack.reporter.Step(1, 0.1, 1e-3))
    assert bar == [(1, 2), (0, 2), (1, 0), (1, 4)]
