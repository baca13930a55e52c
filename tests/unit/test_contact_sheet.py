"""Panels and contact sheets of masked photos of any shape."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFont

from carclass.masking import contact_sheet
from carclass.masking.contact_sheet import (
    CELL_HEIGHT,
    CELL_WIDTH,
    GAP,
    MaskedPhoto,
    draw_contact_sheet,
    draw_panel,
    shrink_photo,
)
from tests.helpers.pages import make_masked_photo, make_photo_without_vehicle

PANEL_WIDTH = 3 * CELL_WIDTH + 2 * GAP


def cells(masked: MaskedPhoto) -> list[np.ndarray]:
    """Return the three pictures of a panel."""
    strip = draw_panel(masked)
    return [strip[:, i * (CELL_WIDTH + GAP) :][:, :CELL_WIDTH] for i in range(3)]


def size_of(jpeg: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(jpeg)).size


def test_a_panel_shows_photo_and_result_unchanged():
    masked = make_masked_photo(result=make_masked_photo(seed=1).photo)
    photo, _, result = cells(masked)
    assert np.array_equal(photo, masked.photo)
    assert np.array_equal(result, masked.result)


def test_the_mask_overlay_changes_pixels_of_the_mask_only():
    masked = make_masked_photo(box=None)
    changed = (cells(masked)[1] != masked.photo).any(axis=2)
    assert np.array_equal(changed, masked.mask)


def test_the_contour_lies_inside_the_mask():
    masked = make_masked_photo(box=None)
    white = (cells(masked)[1] == contact_sheet.CONTOUR).all(axis=2)
    inner = np.zeros_like(masked.mask)
    inner[47:133, 62:178] = True
    assert np.array_equal(white, masked.mask & ~inner)


def test_a_truncated_vehicle_has_no_contour_along_the_photos_edge():
    mask = np.zeros((CELL_HEIGHT, CELL_WIDTH), bool)
    mask[:, :100] = True
    middle = cells(make_masked_photo(box=None, mask=mask))[1]
    assert not (middle[:, 0] == contact_sheet.CONTOUR).all(axis=1).any()
    assert (middle[:, 99] == contact_sheet.CONTOUR).all()


def test_a_box_without_a_mask_is_drawn_two_pixels_wide():
    masked = make_masked_photo(mask=None)
    changed = (cells(masked)[1] != masked.photo).any(axis=2)
    frame = np.zeros_like(changed)
    frame[45:136, 60:181] = True
    frame[47:134, 62:179] = False
    assert np.array_equal(changed, frame)


def test_a_box_beyond_the_photo_is_clipped():
    middle = cells(make_masked_photo(mask=None, box=np.array([-50.0, -50, 5000, 5000])))[1]
    assert (middle[0] == contact_sheet.BOX).all()
    assert (middle[:, -1] == contact_sheet.BOX).all()


def test_drawing_does_not_modify_the_photo():
    masked = make_masked_photo()
    before = masked.photo.copy()
    draw_panel(masked)
    assert np.array_equal(masked.photo, before)


def test_without_a_vehicle_the_middle_picture_has_a_caption():
    masked = make_photo_without_vehicle()
    _, middle, _ = cells(masked)
    changed = np.argwhere((middle != masked.photo).any(axis=2))
    assert len(changed) > 500  # the caption
    assert changed[:, 0].min() > CELL_HEIGHT * 0.75
    assert masked.headline == "no vehicle"


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (9, 9), (2400, 3600), (500, 20)])
def test_a_photo_of_any_shape_fits_into_its_cell(shape):
    masked = make_masked_photo(*shape, result=np.zeros((1, 7, 3), np.uint8))
    assert draw_panel(masked).shape == (CELL_HEIGHT, PANEL_WIDTH, 3)


def test_a_tiny_photo_is_enlarged_at_most_three_times():
    photo = cells(make_masked_photo(10, 10))[0]
    filled = np.argwhere((photo != contact_sheet.PADDING).any(axis=2))
    assert (filled.max(axis=0) - filled.min(axis=0) + 1).tolist() == [30, 30]


def test_the_aspect_ratio_is_kept():
    photo = cells(make_masked_photo(400, 1200))[0]
    filled = np.argwhere((photo != contact_sheet.PADDING).any(axis=2))
    assert (filled.max(axis=0) - filled.min(axis=0) + 1).tolist() == [80, 240]


def test_a_shrunk_photo_takes_little_memory_and_gives_the_same_panel():
    masked = make_masked_photo(900, 1200)
    small = shrink_photo(masked)
    assert small.photo.nbytes < 140_000
    assert np.array_equal(draw_panel(small), draw_panel(masked))


def test_a_mask_of_another_shape_than_its_photo_fails_an_assertion():
    with pytest.raises(AssertionError, match=r"photos/0\.jpg"):
        make_masked_photo(mask=np.ones((3, 3), bool))


def test_a_contact_sheet_has_a_row_for_every_two_photos():
    heights = [size_of(draw_contact_sheet([make_masked_photo()] * count))[1] for count in (1, 2, 3, 4, 5)]
    row = heights[2] - heights[1]
    assert row > CELL_HEIGHT
    assert heights == [heights[0], heights[0], heights[0] + row, heights[0] + row, heights[0] + 2 * row]


def test_all_contact_sheets_have_the_same_width():
    sheets = [draw_contact_sheet([make_masked_photo()] * count) for count in (0, 1, 3)]
    assert len({size_of(sheet)[0] for sheet in sheets}) == 1


def test_a_title_increases_the_height():
    assert (
        size_of(draw_contact_sheet([make_masked_photo()], "v2"))[1]
        > size_of(draw_contact_sheet([make_masked_photo()]))[1]
    )


def test_captions_of_any_length_and_script_do_not_change_the_size():
    plain = make_masked_photo()
    odd = make_masked_photo(key="long/" * 300 + "照片\n\t🚗.jpg", notes=["covers 2 % of the photo"] * 40)
    assert size_of(draw_contact_sheet([odd])) == size_of(draw_contact_sheet([plain]))


@pytest.mark.parametrize("keys", [("яж", "жя"), ("日本", "本日"), ("กข", "ขก")])
def test_keys_of_any_script_can_be_told_apart(keys):
    one, other = (draw_contact_sheet([make_masked_photo(key=key)]) for key in keys)
    assert one != other


def test_a_long_key_keeps_its_end():
    font = ImageFont.load_default(size=13)
    text = contact_sheet._fit_text("folder/" * 50 + "photo.jpg", font, 200, keep_end=True)
    assert text.startswith("…")
    assert text.endswith("photo.jpg")
    assert font.getlength(text) <= 200
