"""What the page says in other languages: one table, `locales/words.json`, from which the files that
the host reads are made. Tooltips and errors stay English."""

import importlib
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UPDATE = bool(os.environ.get("UPDATE_NODE_TEXTS"))  # `make node-texts`
LANGUAGES = ("zh", "ja", "ko", "de")
ENDINGS = {"Done", "Cancelled", "Cancelled; what was trained is kept"}
# `say("...")` in the page; a phase where the core begins or reports one
SAID = re.compile(r'\bsay\(\s*"([^"]+)"')
# a phase that holds values; those without are the command line's
STATUS = re.compile(r'\bStatus\(\s*"([^"]*{[^"]*)"')
PHASE = re.compile(r'(?:Progress\(|\.measure\([^)]*?)"([^"]+)"')


def words():
    return json.loads((ROOT / "locales/words.json").read_text(encoding="utf-8"))


def sources(folder, kind):
    return [p.read_text(encoding="utf-8") for p in sorted((ROOT / folder).rglob(kind))]


def panel_words():
    """What the panel says itself, and the core's words that it shows: phases, statuses, endings."""
    (reporter,) = sources("nodes", "reporter.py")
    assert all(f'"{ending}"' in reporter for ending in ENDINGS)
    said = {word for text in sources("web", "*.js") for word in SAID.findall(text)}
    plans = importlib.import_module("cntlora_pack.cntlora_core.training.memory_plan")
    return (
        said
        | ENDINGS
        | {plans.PLAN, plans.TIMED_PLAN, "on", "off"}
        | {w for text in sources("cntlora_core", "*.py") for w in STATUS.findall(text)}
        | {w for text in sources("cntlora_core", "*.py") for w in PHASE.findall(text)}
    )


def check(path, expected, indent=1):
    """The file says `expected`; where texts are updated it is written so."""
    if UPDATE:
        path.parent.mkdir(exist_ok=True)
        text = json.dumps(expected, indent=indent, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == expected


@pytest.fixture
def schemas(pack):
    return [node.define_schema() for node in pack.NODES]


def test_the_english_locale_says_what_the_schema_says(schemas):
    def inputs(schema):
        return {f.id: {"name": f.id, "tooltip": f.options["tooltip"]} for f in schema.inputs}

    def outputs(schema):
        fields = enumerate(schema.outputs)
        return {
            str(i): {"name": f.options["display_name"], "tooltip": f.options["tooltip"]}
            for i, f in fields
        }

    expected = {
        s.node_id: {
            "display_name": s.display_name,
            "description": s.description,
            "inputs": inputs(s),
            "outputs": outputs(s),
        }
        for s in schemas
    }
    check(ROOT / "locales/en/nodeDefs.json", expected, indent=2)


@pytest.mark.parametrize("language", LANGUAGES)
def test_nodes_and_their_inputs_have_a_name_in_every_language(schemas, language):
    table = words()

    def name(word):
        return {"name": table[word][language]}

    expected = {
        s.node_id: {
            "display_name": table[s.display_name][language],
            "inputs": {f.id: name(f.id) for f in s.inputs},
            "outputs": {str(i): name(f.options["display_name"]) for i, f in enumerate(s.outputs)},
        }
        for s in schemas
    }
    check(ROOT / "locales" / language / "nodeDefs.json", expected)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_panel_speaks_every_language(language):
    table = words()
    expected = {"cntlora": {word: table[word][language] for word in sorted(panel_words())}}
    check(ROOT / "locales" / language / "main.json", expected)


def test_every_word_of_the_table_is_used_and_has_all_languages(schemas):
    used = {s.display_name for s in schemas} | {f.id for s in schemas for f in s.inputs}
    used |= {f.options["display_name"] for s in schemas for f in s.outputs}
    assert set(words()) == used | panel_words()
    for word, translations in words().items():
        assert list(translations) == list(LANGUAGES), word
        for text in translations.values():
            assert text, word
            # the same values stand in the sentence, whatever their order
            assert sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", word)), word


def test_the_host_takes_every_text_as_it_is():
    """Its translations have a grammar: braces are filled in, bars part plurals, and what cannot be
    read stops a whole node from being drawn (Vue nodes of ComfyUI 0.8)."""
    files = list((ROOT / "locales").glob("*/nodeDefs.json"))
    assert len(files) == 1 + len(LANGUAGES)
    for path in files:
        texts = re.findall(r'": "(.*)"', path.read_text(encoding="utf-8"))
        assert len(texts) > 80
        assert [text for text in texts if set(text) & set("{}|@")] == []
