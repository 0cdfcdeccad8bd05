"""`cntlora check`: what the pictures are and what the model will read, before anything is
trained."""

from __future__ import annotations

import argparse

from ..events import Event, Notice
from .console import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, metavar="DIR")
    parser.add_argument("--prompt", default="", help="planned, for pictures without a caption")
    parser.add_argument("--trigger", default="", help="planned: fills {trigger}")
    parser.add_argument("--class-name", default="", help="planned: fills {class}")
    parser.add_argument("--masks", metavar="DIR", help="masks with the pictures' names")
    parser.add_argument(
        "--resolution", type=int, default=512, metavar="PX", help="planned (default: %(default)s)"
    )
    parser.add_argument("--sheet", metavar="FILE.png", help="draw a contact sheet")
    parser.add_argument("--overwrite", action="store_true")


def run_check(args: argparse.Namespace) -> None:
    from ..data.captions import prepare_captions
    from ..data.checks import check_pictures
    from ..data.images import find_pictures
    from ..report.charts import contact_sheet

    said: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, Notice):
            said.append(event.text)

    found = find_pictures(args.images, note, masks=args.masks)
    words = (args.trigger, args.class_name)
    pictures, prompt = prepare_captions(found, args.prompt, words, observer=note)
    said += check_pictures(pictures, args.resolution)
    if args.sheet:
        from ..files import check_output

        sheet = check_output(args.sheet, overwrite=args.overwrite, suffix=".png")
        contact_sheet([p.image for p in pictures], [p.name for p in pictures]).save(sheet)
    table = [
        {
            "name": p.name,
            "size": list(p.image.size),
            "caption": before.caption,
            "reads": p.caption or prompt or None,
            "repeats": p.repeats,
            "mask": p.mask is not None,
        }
        for before, p in zip(found, pictures, strict=True)
    ]
    print_json({"pictures": table, "findings": said}, indent=2)
