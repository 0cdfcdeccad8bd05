"""`cntlora check`: what the pictures are and what the model will read, before anything is
trained."""

from __future__ import annotations

import argparse

from ..config import DataConfig, ModelConfig
from ..events import Event, Notice
from ..settings import read_settings
from .console import print_json
from .options import add_settings

# The settings that decide what the model reads.
READ = (
    *("add_trigger", "use_captions", "shuffle_tags"),
    *("keep_tags", "tag_dropout", "caption_variants"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, metavar="DIR")
    parser.add_argument("--prompt", default="", help="planned, for pictures without a caption")
    parser.add_argument("--trigger", default="", help="planned: fills {trigger}")
    parser.add_argument("--class-name", default="", help="planned: fills {class}")
    parser.add_argument("--masks", metavar="DIR", help="masks with the pictures' names")
    parser.add_argument(
        "--resolution",
        type=int,
        default=512,
        metavar="PX",
        help="planned; 1024 for SDXL (default: %(default)s)",
    )
    add_settings(parser, DataConfig, READ)
    add_settings(parser, ModelConfig, ["max_tokens"])
    parser.add_argument("--sheet", metavar="FILE.png", help="draw a contact sheet")
    parser.add_argument("--overwrite", action="store_true")


def run_check(args: argparse.Namespace) -> None:
    from ..data.captions import prepare_captions, without_captions
    from ..data.checks import check_pictures
    from ..data.images import find_pictures
    from ..data.lengths import too_long
    from ..data.tags import what_is_read
    from ..report.charts import contact_sheet
    from .checks import uncalled

    said: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, Notice):
            said.append(event.text)

    data = read_settings(DataConfig, {name: getattr(args, name) for name in READ})
    found = find_pictures(args.images, note, masks=args.masks)
    if not data.use_captions:
        found = without_captions(found)
    words = (args.trigger, args.class_name)
    pictures, prompt = prepare_captions(
        found, args.prompt, words, add_trigger=data.add_trigger, observer=note
    )
    said += uncalled([p.caption for p in pictures if p.caption], prompt, args.trigger)
    said += check_pictures(pictures, args.resolution)
    read = what_is_read(pictures, prompt, data, args.trigger)
    said += too_long([text for texts in read for text in texts], args.max_tokens)
    if args.sheet:
        from ..files import check_output

        sheet = check_output(args.sheet, overwrite=args.overwrite, suffix=".png")
        contact_sheet((p.image for p in pictures), [p.name for p in pictures]).save(sheet)
    table = [
        {
            "name": p.name,
            "size": list(p.size),
            "caption": before.caption,
            "reads": texts[0] or None,
            "orders": texts if len(texts) > 1 else [],
            "repeats": p.repeats,
            "mask": p.held_mask is not None,
        }
        for before, p, texts in zip(found, pictures, read, strict=True)
    ]
    print_json({"pictures": table, "findings": said}, indent=2)
