"""Text of any script in pictures: characters are drawn by a font that has them, or escaped."""

from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from carclass.reporting import fonts
from carclass.reporting.fonts import PLAIN, fit_font


def draw(text: str, font: ImageFont.FreeTypeFont) -> bytes:
    """Return the pixels of a line of text."""
    image = Image.new("L", (400, 40))
    ImageDraw.Draw(image).text((4, 4), text, 255, font)
    return image.tobytes()


@pytest.fixture
def installed(tmp_path: Path):
    """Install a font of squares with characters of two kinds, and remove it afterwards."""
    path, codes = tmp_path / "squares.ttf", [*PLAIN, *map(ord, "日本")]
    pen = TTGlyphPen(None)
    for i, point in enumerate([(0, 0), (0, 700), (500, 700), (500, 0)]):
        (pen.lineTo if i else pen.moveTo)(point)
    pen.closePath()
    builder = FontBuilder(1000)
    names = [".notdef", "square"]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(dict.fromkeys(codes, "square"))
    builder.setupGlyf({name: pen.glyph() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (600, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    before = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(path)
    fonts._system_fonts.cache_clear()
    yield path
    font_manager.fontManager.ttflist = before
    fonts._system_fonts.cache_clear()


def test_plain_text_is_drawn_by_pillows_own_font():
    text, font = fit_font("photos/car-1.jpg", 13)
    assert (text, font.getname()) == ("photos/car-1.jpg", ImageFont.load_default(13).getname())


@pytest.mark.parametrize("text", ["яж", "Škoda Ő", "ΔΩλ", "عربة"])
def test_scripts_of_the_font_that_comes_along_are_drawn_as_they_are(text):
    found, font = fit_font(text, 13)
    assert (found, font.getname()[0]) == (text, "DejaVu Sans")


def test_a_script_without_a_font_is_escaped():
    assert fit_font("\U000e0fff/a.jpg", 13)[0] == "\\U000e0fff/a.jpg"


def test_a_font_of_the_system_that_has_the_characters_is_chosen(installed):
    text, font = fit_font("日本/1.jpg", 13)
    assert (text, font.path) == ("日本/1.jpg", str(installed))


def test_characters_that_the_best_font_lacks_are_escaped(installed):
    assert fit_font("日本ж.jpg", 13)[0] == "日本\\u0436.jpg"


@pytest.mark.parametrize("pair", ["яж", "日本", "กข", "🚗🚙"])
def test_different_characters_look_different(pair):
    one, other = (fit_font(text, 13) for text in pair)
    assert draw(*one) != draw(*other)


@pytest.mark.parametrize(
    ("text", "drawn"),
    [("e\u0301", "é"), ("a\u202eb", "a\\u202eb"), ("\udcff", "\\udcff"), ("a\n\tb", "a b"), ("", "")],
    ids=["decomposed", "direction", "undecodable", "line end", "empty"],
)
def test_special_characters(text, drawn):
    assert fit_font(text, 13)[0] == drawn


def test_placeholders_of_a_last_resort_font_are_never_drawn():
    assert not [font.path for font in fonts._system_fonts() if "LastResort" in font.path]
