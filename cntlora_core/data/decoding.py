"""A picture's file -> RGB in sRGB, upright, on white, and its transparency; a mask's file -> a
mask."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

from .folder import readable

MIN_SIDE = 16  # px; below this there is nothing to learn from
MAX_PIXELS = 100_000_000  # a decompression bomb, not a photograph
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # grey levels of more than 8 bits
MOVING = ("GIF", "WEBP", "PNG", "AVIF", "TIFF")  # a JPEG's second frame is a phone's preview
SAME_COLOUR = 2  # of 255: a profile that moves no colour further is sRGB by another name
UNREADABLE = (
    *(OSError, ValueError, SyntaxError, MemoryError, EOFError, ArithmeticError, LookupError),
    *(TypeError, AttributeError, RuntimeError, struct.error, zlib.error),
    Image.DecompressionBombError,
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
    except UNREADABLE as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise UnusableError(f"it cannot be read ({readable(reason)})") from error


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if min(size) < MIN_SIDE:
        raise UnusableError(f"{width}x{height} px is too small (at least {MIN_SIDE} px a side)")
    if width * height > MAX_PIXELS:
        raise UnusableError(f"{width}x{height} px is too large (at most 100 megapixels)")


def _reader(path: Path) -> Image.Image:
    """The opened file. HEIC, which Pillow does not read, through pillow-heif where installed."""
    suffix = path.suffix.lower()
    if suffix not in (".heic", ".heif"):
        try:
            return Image.open(path)
        except UnidentifiedImageError as error:
            if suffix == ".avif" and ".avif" not in Image.registered_extensions():
                raise UnusableError(
                    "this Pillow does not read AVIF. Update it with `pip install -U pillow` (11.3 "
                    "or newer), or save the picture as PNG"
                ) from error
            raise ValueError("no picture, or of a kind that Pillow does not know") from error
    try:
        import pillow_heif
    except ImportError as error:
        raise UnusableError(
            "HEIC needs the package pillow-heif (`pip install pillow-heif`), or save the picture "
            "as PNG"
        ) from error
    picture: Image.Image = pillow_heif.open_heif(path).to_pillow()
    return picture


def _upright(opened: Image.Image, said: Said) -> tuple[Image.Image, Image.Image | None]:
    """RGB on white as a viewer shows it, and the alpha channel."""
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format in MOVING:
        opened.seek(0)
        said.notices.append(f"the first of its {frames} pictures is used")
    profile, kind = opened.info.get("icc_profile"), opened.format
    image = ImageOps.exif_transpose(opened)
    if image.mode in DEEP:
        image = _eight_bits(image, png=kind == "PNG")
        said.changes.append("scaled from more than 8 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if profile:
            rgba = Image.merge(
                "RGBA", [*_in_srgb(rgba, profile, said).split(), rgba.getchannel("A")]
            )
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB"), rgba.getchannel("A")
    return (_in_srgb(image, profile, said) if profile else image.convert("RGB")), None


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
        if not space or (space == "CMYK") != (image.mode == "CMYK"):
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
