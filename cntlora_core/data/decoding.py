"""A picture's file -> RGB in sRGB, upright, on white, and its transparency; a mask's file -> a
mask."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, UnidentifiedImageError

from .folder import readable

MIN_SIDE = 16  # px; below this there is nothing to learn from
MAX_PIXELS = 120_000_000  # a telephone's 108 megapixels; more is no photograph, or wants a GB
# What Pillow may read: it goes by the content, and of other kinds starts programs (PostScript).
KINDS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "GIF")
HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")  # brands
ORIENTATION = 0x0112  # of EXIF; what makes each value upright
UPRIGHT: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # grey levels of more than 8 bits
MOVING = ("GIF", "WEBP", "PNG", "AVIF", "TIFF")  # a JPEG's second frame is a phone's preview
SMALLER = f"at most {MAX_PIXELS // 1_000_000} megapixels: save it smaller"
SAME_COLOUR = 2  # of 255: a profile that moves no colour further is sRGB by another name
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, MemoryError, EOFError, ArithmeticError, LookupError),
    *(TypeError, AttributeError, RuntimeError, struct.error, zlib.error),
)  # what Pillow's readers raise over damaged files


class UnusableError(Exception):
    """Why a picture cannot be used, to stand after its name."""


class Said:
    """What is to be told of a picture, and what was done to it that a cache must know."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.changes: list[str] = []


def decode(path: Path, said: Said) -> tuple[Image.Image, Image.Image | None]:
    """A file's picture and its transparency. Raises UnusableError."""
    try:
        with _reader(path) as opened:
            _check_size(opened.size)
            return _upright(opened, said)
    except Image.DecompressionBombError as error:  # of which Pillow tells no size
        raise UnusableError(f"it is too large ({SMALLER})") from error
    except UNREADABLE as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise UnusableError(f"it cannot be read ({readable(reason)})") from error


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise UnusableError(f"{width}x{height} px is too small (at least {MIN_SIDE} px a side)")
    if width * height > MAX_PIXELS:
        raise UnusableError(f"{width}x{height} px is too large ({SMALLER})")


def _reader(path: Path) -> Image.Image:
    """The opened file, by what it holds and not by its name. HEIC, which Pillow does not read,
    through pillow-heif where installed."""
    if _is_heic(path):
        return _heic(path)
    try:
        Image.init()
        return Image.open(path, formats=[kind for kind in KINDS if kind in Image.OPEN])
    except UnidentifiedImageError as error:
        if path.suffix.lower() == ".avif" and "AVIF" not in Image.OPEN:
            raise UnusableError(
                "this Pillow does not read AVIF. Update it with `pip install -U pillow` (11.3 or "
                "newer), or save the picture as PNG"
            ) from error
        raise ValueError("no picture, or of a kind that is not read") from error


def _is_heic(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:] in HEIC and path.suffix.lower() != ".avif"


def _heic(path: Path) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise UnusableError(
            "HEIC needs the package pillow-heif (`pip install pillow-heif`), or save the picture "
            "as PNG"
        ) from error
    opened = pillow_heif.open_heif(path)
    _check_size(opened.size)  # before it is unpacked
    picture: Image.Image = opened.to_pillow()
    return picture


def _upright(opened: Image.Image, said: Said) -> tuple[Image.Image, Image.Image | None]:
    """RGB on white as a viewer shows it, and the alpha channel."""
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format in MOVING:
        opened.seek(0)
        said.notices.append(f"the first of its {frames} pictures is used")
    profile, kind = opened.info.get("icc_profile"), opened.format
    image = _turned(opened, said)
    if image.mode in DEEP:
        image = _eight_bits(image, png=kind == "PNG")
        said.changes.append("scaled from more than 8 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        return _on_white(image.convert("RGBA"), profile, said)
    return (_in_srgb(image, profile, said) if profile else image.convert("RGB")), None


def _turned(opened: Image.Image, said: Said) -> Image.Image:
    """As its EXIF says that it is seen. Read on its own: the rest of that is often damaged, and
    Pillow's `exif_transpose` writes it all anew."""
    opened.load()
    try:
        turn = UPRIGHT.get(opened.getexif().get(ORIENTATION))
    except UNREADABLE:
        said.notices.append("its EXIF cannot be read: it is taken as it is stored")
        turn = None
    return opened.copy() if turn is None else opened.transpose(turn)


def _on_white(
    rgba: Image.Image, profile: bytes | None, said: Said
) -> tuple[Image.Image, Image.Image]:
    """The picture where alpha shows it, and the alpha channel."""
    alpha = rgba.getchannel("A")
    colours = _in_srgb(rgba, profile, said) if profile else rgba.convert("RGB")
    if not alpha.getbbox():
        said.notices.append(
            "it is transparent everywhere, and so all white: save it without transparency"
        )
    white = Image.new("RGBA", rgba.size, "white")
    shown = Image.merge("RGBA", [*colours.split(), alpha])
    return Image.alpha_composite(white, shown).convert("RGB"), alpha


def _eight_bits(image: Image.Image, *, png: bool) -> Image.Image:
    """Grey levels of 16 or 32 bits, or floating point, scaled to mode L; Pillow's own conversion
    clips them."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(min=0)
    top = float(values.max())
    if png or image.mode.startswith("I;16"):
        white = 65535.0
    else:  # the file does not say what is white: the first usual range that holds all
        white = next((w for w in (1.0, 255.0, 65535.0) if top <= w), top)
        if image.mode == "I" and white == 1.0:
            white = 255.0
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes, said: Said) -> Image.Image:
    """RGB with the colours that the embedded ICC profile means."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(
            source.profile.xcolor_space.strip(), ""
        )
        fits = (space == "CMYK") == (image.mode == "CMYK")
        if not space or not fits or (space == "L" and _coloured(image)):
            raise ValueError(f"it is for {source.profile.xcolor_space.strip()}, not {image.mode}")
        plain = image.convert(space)
        meant = ImageCms.profileToProfile(
            plain, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        assert meant is not None
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError) as error:
        said.notices.append(f"its colour profile is left out ({readable(error)})")
        return image.convert("RGB")
    asis = image.convert("RGB")
    if np.asarray(ImageChops.difference(asis, meant)).max() <= SAME_COLOUR:
        return asis
    said.changes.append("colour profile")
    return meant


def _coloured(image: Image.Image) -> bool:
    """Whether it is anything but grey: a profile for greys would make it so."""
    red, green, blue = image.convert("RGB").split()
    return any(ImageChops.difference(red, other).getbbox() for other in (green, blue))


def mask_file(path: Path, size: tuple[int, int], said: Said) -> Image.Image | None:
    """A mask, white where the subject is, at the picture's size; None for one that cannot be used,
    which is told."""
    try:
        shown, alpha = decode(path, Said())
    except UnusableError as error:
        said.notices.append(f"its mask '{readable(path.name)}' is left out: {error}")
        return None
    # What paints without transparency may be stored with it: then black and white count.
    seen = alpha if alpha is not None and not _opaque(alpha) else shown.convert("L")
    return fitted_mask(seen, size, said.notices)


def _opaque(alpha: Image.Image) -> bool:
    lowest, _ = alpha.getextrema()
    return lowest == 255


def fitted_mask(mask: Image.Image, size: tuple[int, int], notices: list[str]) -> Image.Image | None:
    """The mask at the picture's size; None for one that shows nothing. What was done is told."""
    if not mask.getbbox():
        notices.append("its mask is black everywhere and is left out")
        return None
    if mask.size == size:
        return mask
    notices.append(
        f"its mask of {mask.size[0]}x{mask.size[1]} px is resized to {size[0]}x{size[1]}"
    )
    return mask.resize(size, Image.Resampling.BILINEAR)
