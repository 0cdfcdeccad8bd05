"""Subjects for fine-tuning: small sets of Fluent 3D drawings, with others of the same kind held
out.

    python benchmarks/mini_sd/subjects.py --output subjects
    python benchmarks/mini_sd/subjects.py --output subjects --subject fish fish
    ".*fish|dolphin|whale|shark|.*whale|seal|octopus|squid|crab" "blowfish|squid|^whale"

Writes <output>/<name>/{train,heldout}/*.png, each with a metadata.jsonl. `--subject` takes a name,
a class, a pattern that whole emoji names must match, and a pattern found in the names to hold out;
without it all of SUBJECTS are made.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import load
from PIL import Image

TRAINING, HELD_OUT = (6, 8), (3, 8)  # fewest and most pictures


@dataclass(frozen=True)
class Subject:
    """`pattern` matches whole emoji names; those in which `held_out` is found are kept from
    training."""

    class_name: str
    pattern: str
    held_out: str


# The first three are the sets that the model's makers fixed; the test names every picture of
# theirs.
SUBJECTS = {
    "cat_faces": Subject("cat face", r"cat face with.+|.+ cat face.*", r"kissing|open mouth|weary"),
    "hearts": Subject(
        "heart",
        (
            r"(heavy black|light blue|blue|brown|green|pink|purple|white|yellow|"
            r"black|grey|orange) heart"
        ),
        r"^(black|grey|light blue|orange)",
    ),
    "animal_faces": Subject(
        "animal face",
        r"(bear|dog|fox|hamster|mouse|panda|tiger|cat|cow|lion|monkey|pig|rabbit|wolf) face|koala",
        r"cat|cow|lion|monkey|pig|rabbit|wolf",
    ),
    "cars": Subject(
        "car",
        (
            r".*(automobile|taxi|police car)|racing car|bus|oncoming bus|"
            r"trolleybus|minibus|ambulance|fire engine|delivery truck|"
            r"recreational vehicle|pickup truck"
        ),
        r"oncoming|minibus|ambulance",
    ),
    "fruits": Subject(
        "fruit",
        (
            r"grapes|(water)?melon|tangerine|lemon|banana|pineapple|mango|(red|"
            r"green) apple|pear|peach|cherries|strawberry|tomato"
        ),
        r"melon|pear|tangerine|strawberry|mango",
    ),
    "flowers": Subject(
        "flower",
        (
            r"tulip|(cherry )?blossom|rose|hibiscus|sunflower|bouquet|wilted "
            r"flower|rosette|hyacinth|lotus"
        ),
        r"rose$|blossom$|lotus",
    ),
    "moons": Subject("moon", r".*\bmoon (symbol|with face)|crescent moon", r"waning|last quarter"),
    "clocks": Subject("clock", r"clock face.+", r"thirty"),
    "books": Subject(
        "book",
        r"(green|blue|orange|closed|open) book|books|notebook.*|ledger",
        r"orange|ledger|books",
    ),
    "balls": Subject(
        "ball",
        (
            r"(soccer |volley|base|soft|basket)ball.*|(rugby|american) football|"
            r"ball of yarn|billiards|crystal ball|mirror ball"
        ),
        r"volley|rugby|billiards",
    ),
    "hand_signs": Subject(
        "hand sign",
        (
            r"(waving|clapping|open|ok|fisted) hands? sign|.*backhand index|"
            r"thumbs .+|(raised|.+wards) hand|.+ facing fist|victory hand"
        ),
        r"raised|left|down",
    ),
    "smileys": Subject(
        "smiley face",
        (
            r"(grinning|smiling|winking|smirking|relieved|kissing|neutral|"
            r"expressionless|pensive|confused) face.*"
        ),
        r"eyes",
    ),
    "drinks": Subject(
        "drink",
        (
            r"wine glass|cocktail glass|tropical drink|beer mug|tumbler glass|"
            r"glass of milk|cup with straw|bubble tea|hot beverage|beverage box|"
            r"teacup without handle|mate drink"
        ),
        r"beer|milk|tea",
    ),
    "sweets": Subject(
        "dessert",
        (
            r"(soft |shaved )?ice( cream)?|doughnut|cookie|custard|shortcake|"
            r"birthday cake|pie|cupcake|moon cake|lollipop|candy|chocolate bar"
        ),
        r"^ice|cup|moon|candy",
    ),
    "birds": Subject(
        "bird",
        (
            r"(front facing )?baby chick|(hatching )?chick(en)?|rooster|(black "
            r")?bird|penguin|duck|owl|parrot|swan|goose|eagle|turkey|dove"
        ),
        r"black|goose|owl|front",
    ),
    "buildings": Subject(
        "building",
        (
            r"house building|house with garden|office building|(japanese|"
            r"european) post office|hospital|bank|(love )?hotel|convenience store|"
            r"school|department store|factory"
        ),
        r"love|garden|japanese|department",
    ),
}


def choose(rows: list[dict], subject: Subject) -> dict[str, list[int]]:
    """Indices of the training and held-out pictures, at most 8 of each, in the data's order.

    Raises ValueError when fewer than 6 and 3 are left.
    """
    parts: dict[str, list[int]] = {"train": [], "heldout": []}
    seen = set()
    for i, row in enumerate(rows):
        # Two emoji can share a name, which would be one file.
        if re.fullmatch(subject.pattern, row["name"]) and row["name"] not in seen:
            seen.add(row["name"])
            parts["heldout" if re.search(subject.held_out, row["name"]) else "train"].append(i)
    for part, (fewest, most) in (("train", TRAINING), ("heldout", HELD_OUT)):
        if len(parts[part]) < fewest:
            raise ValueError(
                f"The patterns '{subject.pattern}' and '{subject.held_out}' leave "
                f"{len(parts[part])} pictures for {part}, fewer than {fewest}. Match more names "
                "(they are in data/fluent.jsonl)."
            )
        parts[part] = parts[part][:most]
    return parts


def make_subject(
    images: np.ndarray, rows: list[dict], subject: Subject, folder: Path
) -> tuple[int, int]:
    """Write `folder`/{train,heldout} from pictures uint8 `[n, 64, 64, 3]` and their facts; returns
    how many of each."""
    parts = choose(rows, subject)
    files = {
        i: re.sub(r"\W+", "_", rows[i]["name"]) + ".png"
        for indices in parts.values()
        for i in indices
    }
    _refuse_strangers(
        folder, {part: {files[i] for i in indices} for part, indices in parts.items()}
    )
    prompts = {
        "prompt": f"a sks {subject.class_name} emoji",
        "class_prompt": f"a {subject.class_name} emoji",
    }
    for part, indices in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        lines = []
        for i in indices:
            name = rows[i]["name"]
            Image.fromarray(images[i]).save(folder / part / files[i])
            about = {"file_name": files[i], "text": f"{name} emoji, fluent style", "name": name}
            lines.append(json.dumps(about | prompts) + "\n")
        (folder / part / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(parts["train"]), len(parts["heldout"])


def _refuse_strangers(folder: Path, wanted: dict[str, set[str]]) -> None:
    """A picture left over from another pattern could be trained on and held out at once."""
    for part, files in wanted.items():
        if strangers := {file.name for file in (folder / part).glob("*.png")} - files:
            raise ValueError(
                f"'{folder / part}' already holds {len(strangers)} other pictures, such as "
                f"'{min(strangers)}'. Remove the folder or give another --output."
            )


def make_subjects(data: Path, folder: Path, subjects: dict[str, Subject]) -> None:
    images, rows = load(data, "fluent")
    for name, subject in subjects.items():
        train, held_out = make_subject(images, rows, subject, folder / name)
        print(f"{name}: {train} for training, {held_out} held out")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("mini-sd-build/data"), help="made by prepare_data.py"
    )
    parser.add_argument("--output", type=Path, default=Path("mini-sd-build/subjects"))
    names = ("NAME", "CLASS", "PATTERN", "HELD_OUT")
    parser.add_argument(
        "--subject", nargs=4, action="append", metavar=names, help="only this one; may be repeated"
    )
    args = parser.parse_args()
    given = {name: Subject(*rest) for name, *rest in args.subject or []}
    try:
        make_subjects(args.data, args.output, given or SUBJECTS)
    except (ValueError, re.error) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
