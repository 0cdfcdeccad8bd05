"""docs/cli.md lists every command and option as the parser has them."""

import argparse
import os
from pathlib import Path

from cntlora_core.cli.main import _parser

PAGE = Path(__file__).resolve().parents[3] / "docs/cli.md"
UPDATE = bool(os.environ.get("UPDATE_NODE_TEXTS"))  # `make node-texts` writes the tables


def shown(action):
    """`--option VALUE`, what it does and its default where the text has none."""
    value = ""
    if action.choices:
        value = " " + "/".join(map(str, action.choices))
    elif action.nargs != 0 and action.option_strings:
        several = isinstance(action.metavar, tuple)
        value = " " + (
            " ".join(action.metavar) if several else action.metavar or action.dest.upper()
        )
    names = ", ".join(action.option_strings) or action.dest
    text = (action.help or "") % {**vars(action), "prog": "cntlora"}
    text += " (required)" * action.required
    return f"| `{names}{value}` | {text.strip()} |\n".replace("PATH|", "PATH, ")


def tables():
    commands = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        yield f"\n### {name}\n\n{parser.description[:1].upper()}{parser.description[1:]}.\n"
        for group in parser._action_groups:
            options = [a for a in group._group_actions if a.dest != "help"]
            if options:
                general = group.title.startswith(("option", "positional"))
                yield f"\n| {'general' if general else group.title} | |\n|---|---|\n"
                yield from map(shown, options)


def test_the_reference_lists_the_options_as_they_are():
    prose, mark, written = PAGE.read_text(encoding="utf-8").partition("<!-- options -->\n")
    if UPDATE:
        written = "".join(tables())
        PAGE.write_text(prose + mark + written, encoding="utf-8")
    assert mark
    assert written == "".join(tables())


def test_the_page_tells_of_every_command():
    table = PAGE.read_text(encoding="utf-8").split("| command |")[1].split("\n\n")[0]
    listed = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    commands = next(a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert sorted(listed) == sorted(commands.choices)
