"""A font of this machine that has the letters of a text, and lines that fit a width."""
from __future__ import annotations

from functools import cache

from PIL import Image, ImageDraw, ImageFont

from ..samplers.wording import legible
from .notices import show_notice

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Fonts with Chinese letters, most with Japanese and Korean ones, by the file names of the common systems; Pillow looks
# for them where each system keeps its fonts.
WIDE_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf", "NotoSansSC-Regular.ttf",
    "SourceHanSansSC-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf", "uming.ttc", "msyh.ttc", "msyh.ttf", "simhei.ttf", "simsun.ttc", "msgothic.ttc",
    "malgun.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Light.ttc", "Arial Unicode.ttf", "unifont.otf",
    "DejaVuSans.ttf", "Arial.ttf",
)


def load_default(size: int) -> Font:
    """Pillow's own; its only size where Pillow is older than 10.1 or lacks FreeType."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError, OSError):
        return ImageFont.load_default()


def has_letters(font: Font, text: str) -> bool:
    """Whether a font draws each letter of a text as something of its own, not as the box of an unknown one."""
    if not isinstance(font, ImageFont.FreeTypeFont):
        return text.isascii()
    unknown = draw_letter(font, "\uffff")
    return all(letter.isspace() or draw_letter(font, letter) != unknown for letter in set(text))


def draw_letter(font: ImageFont.FreeTypeFont, letter: str) -> bytes:
    side = 2 * int(font.size)
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).text((0, 0), letter, fill=255, font=font)
    return picture.tobytes()


@cache
def list_wide_fonts() -> tuple[str, ...]:
    """Those of `WIDE_FONTS` that are here; looked for once, since that walks through folders."""
    found = []
    for name in WIDE_FONTS:
        try:
            ImageFont.truetype(name, 16)
        except (OSError, ImportError):
            continue
        found.append(name)
    return tuple(found)


def choose_font(text: str, size: int) -> Font:
    """The first font with all letters of a text; where there is none a notice says so, and boxes stand for them."""
    plain = load_default(size)
    if has_letters(plain, text):
        return plain
    for name in list_wide_fonts():
        font = ImageFont.truetype(name, size)
        if has_letters(font, text):
            return font
    missing = "".join(sorted(letter for letter in set(text) if not has_letters(plain, letter)))
    show_notice(
        f"Labelled Grid found no font on this machine with the letters '{legible(missing, 40)}', so it draws boxes for "
        f"them; install one that has them, such as Noto Sans CJK, and restart ComfyUI.")
    return plain


def wrap_text(text: str, font: Font, width: int) -> list[str]:
    """A text in lines of at most `width` pixels, broken between words, and within what is longer than a line."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
