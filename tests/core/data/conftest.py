"""Pictures made here: a folder of those that people have, in every format, depth and colour
space, and what is no picture at all."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

RED = (230, 30, 30)
WHITE = (255, 255, 255)
SIZE = (40, 32)  # px, width and height


def _tag(kind, body):
    return kind + b"\0\0\0\0" + body


def _fixed(*values):
    return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))


def profile(space, tags):
    """An ICC profile, version 2, of a monitor: header, table of tags, their data."""
    tags = {
        b"desc": _tag(b"desc", struct.pack(">I", 5) + b"test\0" + bytes(78)),
        b"wtpt": _tag(b"XYZ ", _fixed(0.9642, 1.0, 0.8249)),
        **tags,
    }
    at, table, data = 132 + 12 * len(tags), b"", b""
    for name, body in tags.items():
        table += name + struct.pack(">II", at + len(data), len(body))
        data += body + bytes(-len(body) % 4)
    head = struct.pack(
        ">I4sI4s4s4s", at + len(data), b"\0\0\0\0", 0x02400000, b"mntr", space, b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + _fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def display_p3():
    """Phones' colours: wider primaries, sRGB's curve."""
    curve = _tag(
        b"para",
        struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045),
    )
    columns = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    tags = {name: _tag(b"XYZ ", _fixed(*column)) for name, column in columns.items()}
    return profile(b"RGB ", tags | {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")})


def linear_grey():
    return profile(b"GRAY", {b"kTRC": _tag(b"curv", struct.pack(">I", 0))})


def png_of_16_bits(value):
    """A PNG of three channels of 16 bits, which Pillow does not write."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    width, height = SIZE
    row = b"\0" + struct.pack(">3H", *value) * width
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">2I5B", width, height, 16, 2, 0, 0, 0)),
            chunk(b"IDAT", zlib.compress(row * height)),
            chunk(b"IEND", b""),
        ]
    )


def ramp(top):
    """Grey levels from black on the left to `top` on the right."""
    return np.linspace(0, top, SIZE[0])[None].repeat(SIZE[1], 0)


def make(folder):
    """Fills the folder. What each file gives: the colour in its middle, or words of the sentence
    that leaves it out (None: passed over in silence)."""
    red = Image.new("RGB", SIZE, RED)
    gives = {}

    def save(name, image, gives_, **options):
        image.save(folder / name, **options)
        gives[name] = gives_

    def write(name, content, gives_):
        (folder / name).write_bytes(content)
        gives[name] = gives_

    for name in ("a.png", "b.bmp", "c.tif", "scan.TIFF"):
        save(name, red, RED)
    for name in ("d.JPG", "e.jpeg", "f.jfif", "g.webp", "h.avif"):
        save(name, red, RED, **({"format": "JPEG"} if name == "f.jfif" else {}))
    save("still.gif", red, RED)
    frames = [Image.new("RGB", SIZE, c) for c in ("blue", "black")]
    for name in ("moves.gif", "moves.webp", "moves.png", "pages.tiff"):
        save(name, red, RED, save_all=True, append_images=frames)
    save("named_wrong.png", red, RED, format="JPEG")

    grey = Image.new("L", SIZE, 100)
    save("grey.png", grey, (100,) * 3)
    save("grey16.png", Image.fromarray(ramp(65535).astype(np.uint16)), (131,) * 3)
    save("grey16.tiff", Image.fromarray(ramp(65535).astype(np.uint16)), (131,) * 3)
    save("grey32.tiff", Image.fromarray(ramp(65535).astype(np.int32)), (131,) * 3)
    save("float.tiff", Image.fromarray(ramp(1).astype(np.float32)), (131,) * 3)
    write("deep.png", png_of_16_bits([v * 257 for v in RED]), RED)
    save("one_bit.png", Image.new("1", SIZE, 1), WHITE)
    save("cmyk.jpg", Image.new("CMYK", SIZE, (0, 255, 255, 0)), (255, 0, 0))
    save("palette.png", red.quantize(4), RED)
    save("palette_clear.png", red.quantize(4), WHITE, transparency=0)
    save("clear.png", Image.new("RGBA", SIZE, (*RED, 0)), WHITE)
    save("grey_clear.png", Image.new("LA", SIZE, (0, 0)), WHITE)
    phone, cyan_off = display_p3(), Image.new("CMYK", SIZE, (0, 255, 255, 0))
    save("phone.png", red, (252, 0, 0), icc_profile=phone)
    save("phone.jpg", red, (252, 0, 0), icc_profile=phone, quality=100)
    opaque = Image.new("RGBA", SIZE, (*RED, 255))
    save("phone_clear.png", opaque, (252, 0, 0), icc_profile=phone)
    save("linear.png", grey, (168,) * 3, icc_profile=linear_grey())
    save("bad_profile.png", red, RED, icc_profile=b"no profile")
    save("other_profile.jpg", cyan_off, (255, 0, 0), icc_profile=phone)
    turned = Image.Exif()
    turned[0x0112] = 6
    save("turned.jpg", red, RED, exif=turned)

    for name in ("猫.png", "cafe\u0301.png", "x" * 200 + ".png", " space .png", "a.b.c.png"):
        save(name, red, RED)
    bad = os.fsdecode(b"\xff\n.png")
    save(bad, red, RED, format="PNG")
    gives["\ufffd\ufffd.png"] = gives.pop(bad)

    save("dot.png", Image.new("RGB", (1, 1)), "dot.png': 1x1 px is too small")
    save("line.png", Image.new("RGB", (20000, 2)), "line.png': 20000x2 px is too small")
    write("empty.png", b"", "empty.png': it cannot be read")
    write("text.jpg", b"not a picture", "text.jpg': it cannot be read")
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    save("cut.png", Image.fromarray(noise), "cut.png': it cannot be read")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:4000])
    write("raw.heic", b"\0\0\0\x18ftypheic" + bytes(40), "raw.heic'")
    write("film.mp4", b"x", "film.mp4")
    write("drawing.psd", b"x", "drawing.psd")
    write("dots.png.", b"x", "dots.png.")
    write("notes.txt", b"x", "notes.txt")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    gives["gone.png"] = "gone.png"
    for name in (".hidden.png", "._a.png", "Thumbs.db", "desktop.ini"):
        write(name, b"x", None)
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.png").write_bytes(b"x")
    return gives


@pytest.fixture
def phone_profile():
    return display_p3()


@pytest.fixture
def grey_profile():
    return linear_grey()


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    """The folder, and what each of its files gives."""
    folder = tmp_path_factory.mktemp("odd")
    return folder, make(folder)
