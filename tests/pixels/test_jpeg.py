import io
import struct
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from selfray.pixels import codecs, compose, jpeg
from selfray.pixels.augment import apply, augment_batch, draw_views
from selfray.pixels.codecs import BrokenImage, Planes, encode_png, open_image
from selfray.pixels.codecs import decode as decode_whole
from selfray.pixels.headers import TRANSPOSED, TURNS
from selfray.pixels.parameters import draw
from selfray.views import View, Views

SUBSAMPLING = {"4:4:4": 0x111111, "4:2:2": 0x211111, "4:2:0": 0x221111, "4:4:0": 0x121111}
FACTORS = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2), "4:4:0": (2, 1), "4:1:1": (1, 4)}
CROPS: Views = {"global": (View(size=96, crop_scale=(0.2, 1.0)),) * 2}


def photograph(height: int = 203, width: int = 331) -> np.ndarray:
    """Smooth colours with edges and some noise: uint8 [H, W, 3] RGB."""
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(float)
    smooth[height // 3 :, width // 2 :] *= 0.5
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


def saved(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **({"quality": 90} | options))
    return buffer.getvalue()


def saved_by_opencv(pixels: np.ndarray, *options: int) -> bytes:
    done, data = cv2.imencode(".jpg", pixels[:, :, ::-1], options)
    assert done
    return data.tobytes()


def planes_of(
    data: bytes, box: tuple[int, int, int, int], least_factor: float = 1.0
) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """What was decoded of each plane, and where it lies in the plane."""
    found = jpeg.decode(data, box, least_factor)
    assert found is not None
    pixels, layout = found
    planes = []
    for row in layout.tolist():
        start, stored, stride, top, left, rows, columns, _, _ = row
        plane = pixels[start : start + stored * stride].reshape(stored, stride)
        planes.append((plane[: rows - top, : columns - left].astype(int), (top, left)))
    return planes


def luma_by_libjpeg(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("YCbCr" if image.mode == "RGB" else "L", image.size)
    pixels = np.asarray(image).astype(int)
    return pixels if pixels.ndim == 2 else pixels[:, :, 0]


def whole(pixels: np.ndarray) -> tuple[int, int, int, int]:
    return 0, 0, pixels.shape[0], pixels.shape[1]


@pytest.mark.parametrize("quality", [20, 75, 90, 100])
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (16, 16), (203, 331), (130, 17)])
def test_every_plane_is_libjpegs_within_one_level(shape, optimize, quality):
    pixels = photograph(*shape)
    data = saved(pixels, quality=quality, optimize=optimize, subsampling="4:4:4")
    image = Image.open(io.BytesIO(data))
    image.draft("YCbCr", image.size)
    theirs = np.asarray(image).astype(int)
    ours = np.stack([plane for plane, _ in planes_of(data, whole(pixels))], axis=2)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - theirs).mean() < 0.05


@pytest.mark.parametrize("subsampling", sorted(FACTORS))
@pytest.mark.parametrize("interval", [0, 1, 5])
def test_subsampled_and_restarted_scans_are_read_alike(subsampling, interval):
    pixels = photograph()
    code = SUBSAMPLING.get(subsampling, 0x411111)
    options = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, code, cv2.IMWRITE_JPEG_RST_INTERVAL, interval)
    data = saved_by_opencv(pixels, *options)
    assert (b"\xff\xdd" in data) == (interval > 0)
    (luma, _), *chroma = planes_of(data, whole(pixels))
    assert np.abs(luma - luma_by_libjpeg(data)).max() <= 1
    down, across = FACTORS[subsampling]
    size = -(-203 // down), -(-331 // across)
    # The file's colours are those of the image's areas, up to what quantisation changed.
    wanted = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA).astype(float)
    red, green, blue = wanted[:, :, 0], wanted[:, :, 1], wanted[:, :, 2]
    blueness = 128 - 0.168736 * red - 0.331264 * green + 0.5 * blue
    redness = 128 + 0.5 * red - 0.418688 * green - 0.081312 * blue
    for (plane, _), theirs in zip(chroma, (blueness, redness), strict=True):
        assert plane.shape == size
        assert np.abs(plane - theirs).mean() < 2.5


def test_a_grey_image_has_one_plane_and_grey_views():
    pixels = photograph()[:, :, 0]
    data = saved(pixels)
    (luma, _), *others = planes_of(data, whole(pixels))
    assert not others
    assert np.abs(luma - luma_by_libjpeg(data)).max() <= 1
    views = augment_batch([data], CROPS, seed=0, epoch=0).arrays["global"]
    assert (views == views[:, :, :1]).all()


def test_what_lies_under_a_box_is_the_same_whatever_the_box():
    pixels = photograph()
    rng = np.random.default_rng(0)
    for subsampling in ("4:4:4", "4:2:0"):
        data = saved(pixels, subsampling=subsampling)
        complete = [plane for plane, _ in planes_of(data, whole(pixels))]
        for _ in range(30):
            top, bottom = np.sort(rng.choice(204, 2, replace=False)).tolist()
            left, right = np.sort(rng.choice(332, 2, replace=False)).tolist()
            parts = planes_of(data, (top, left, bottom, right))
            for all_of_it, (part, (y, x)) in zip(complete, parts, strict=True):
                height, width = part.shape
                assert np.array_equal(part, all_of_it[y : y + height, x : x + width])
                divided = 203 / all_of_it.shape[0], 331 / all_of_it.shape[1]
                assert y <= top / divided[0]
                assert y + height >= bottom / divided[0] - 1
                assert x <= left / divided[1]
                assert x + width >= right / divided[1] - 1


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced_planes_are_near_the_whole_ones_shrunk(reduction):
    pixels = photograph(400, 640)
    data = saved(pixels, subsampling="4:2:0")
    found = jpeg.decode(data, whole(pixels), reduction + 0.5)
    assert found is not None
    divided = found[1][:, [compose.DOWN, compose.ACROSS]].tolist()
    # Colour that is stored at half the size is reduced half as much.
    assert divided == [[reduction, reduction], [reduction, reduction], [reduction, reduction]]
    complete = planes_of(data, whole(pixels))
    for (small, _), (large, _) in zip(
        planes_of(data, whole(pixels), reduction + 0.5), complete, strict=True
    ):
        shape = small.shape[::-1]
        wanted = cv2.resize(large.astype(np.float32), shape, interpolation=cv2.INTER_AREA)
        assert np.abs(small - wanted).mean() < 1.5


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("side", [320, 900])
def test_views_from_planes_are_those_from_rgb(subsampling, side, monkeypatch):
    """The order of resizing and turning into RGB is another; so is the filter that enlarges
    colour. Both show at edges alone."""
    pixels = photograph(side, side * 4 // 3)
    data = saved(pixels, subsampling=subsampling)
    ours = augment_batch([data] * 4, CROPS, seed=0, epoch=0).arrays["global"].astype(int)
    monkeypatch.setattr(jpeg, "decode", lambda *_: None)
    theirs = augment_batch([data] * 4, CROPS, seed=0, epoch=0).arrays["global"]
    difference = np.abs(ours - theirs)
    assert difference.mean() < 1.0
    assert np.percentile(difference, 99) <= 4
    assert np.abs((ours - theirs).mean(axis=(0, 1, 3, 4))).max() < 0.3  # no shift in any channel


def test_an_image_seen_after_another_is_what_it_would_be_alone():
    first, second = saved(photograph(), optimize=True), saved(photograph(99, 120), quality=40)
    alone = augment_batch([second], CROPS, seed=0, epoch=0).arrays["global"][0]
    after = augment_batch([first, second], CROPS, seed=0, epoch=0).arrays["global"][1]
    assert np.array_equal(alone, after)


def cmyk(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def without_tables(data: bytes, marker: int) -> bytes:
    start = data.index(bytes((0xFF, marker)))
    length = struct.unpack_from(">H", data, start + 2)[0]
    return data[:start] + data[start + 2 + length :]


def frame_of(data: bytes) -> bytes:
    start = data.index(b"\xff\xc0")
    return data[start : start + 2 + struct.unpack_from(">H", data, start + 2)[0]]


JPEG = saved(photograph(), subsampling="4:2:0")
NOT_OURS = {
    "no JPEG": encode_png(photograph()),
    "progressive": saved(photograph(), progressive=True),
    "cmyk": cmyk(photograph()),
    "Adobe's RGB": JPEG[:2] + segment(0xEE, b"Adobe\0\x64\0\0\0\0\0") + JPEG[2:],
    "two frames": JPEG.replace(frame_of(JPEG), frame_of(JPEG) * 2),
    "12 bits": JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"),
    "no quantisation": without_tables(without_tables(JPEG, 0xDB), 0xDB),
    "no codes": without_tables(JPEG, 0xC4),
    "components called RGB": JPEG.replace(
        frame_of(JPEG), frame_of(JPEG)[:10] + b"R\x22\x00G\x11\x01B\x11\x01"
    ).replace(b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03", b"\xff\xda\x00\x0c\x03R\x00G\x11B"),
    "16-bit quantisation": JPEG[:2] + segment(0xDB, b"\x10" + bytes(128)) + JPEG[2:],
    "sampling that does not divide": JPEG.replace(
        frame_of(JPEG),
        frame_of(JPEG).replace(b"\x01\x22", b"\x01\x31").replace(b"\x02\x11", b"\x02\x21"),
    ),
    "no blocks": JPEG.replace(frame_of(JPEG), frame_of(JPEG).replace(b"\x01\x22", b"\x01\x00")),
    "too many blocks": JPEG.replace(
        frame_of(JPEG), frame_of(JPEG)[:4] + frame_of(JPEG)[4:].replace(b"\x11", b"\x44")
    ),
    "a scan of one component of three": JPEG.replace(
        b"\xff\xda\x00\x0c\x03", b"\xff\xda\x00\x0c\x01"
    ),
    "nothing": b"",
    "a start": JPEG[:300],
}


def flat(*samplings: int) -> bytes:
    """Grey everywhere: 16 x 16 pixels of components that are sampled so and have all one table of
    codes, in more blocks than it takes, all zero."""
    data = saved(np.full((16, 16), 128, np.uint8))
    places = range(1, len(samplings) + 1)
    shape = b"\x08\x00\x10\x00\x10" + bytes((len(samplings),))
    frame = b"".join(bytes((place, samplings[place - 1], 0)) for place in places)
    scan = b"".join(bytes((place, 0)) for place in places)
    headers = data[: data.index(b"\xff\xc0")] + segment(0xC0, shape + frame)
    tables = data[data.index(b"\xff\xc4") : data.index(b"\xff\xda")]
    scan = segment(0xDA, bytes((len(samplings),)) + scan + b"\x00\x3f\x00")
    zeros = int("001010" * 64, 2).to_bytes(48)  # no difference of DC, then the end of the block
    return headers + tables + scan + zeros + b"\xff\xd9"


@pytest.mark.parametrize("samplings", [(0x11,), (0x21, 0x11, 0x11), (0x41, 0x21, 0x11)])
def test_a_hand_made_file_is_read(samplings):
    for plane, _ in planes_of(flat(*samplings), (0, 0, 16, 16)):
        assert (plane == 128).all()


@pytest.mark.parametrize(
    "samplings",
    [
        (0x31, 0x21, 0x11),  # 3 columns are no multiple of 2
        (0x13, 0x12, 0x11),
        (0x22, 0x44, 0x44),  # 36 blocks
        (0x20, 0x11, 0x11),
        (0x02, 0x11, 0x11),
        (0x11, 0x11),
    ],
)
def test_units_that_no_decoder_has_to_read_are_not_read(samplings):
    assert jpeg.decode(flat(*samplings), (0, 0, 16, 16), 1.0) is None


def test_a_single_component_has_its_blocks_in_order_whatever_its_sampling():
    pixels = photograph()[:, :, 0]
    data = saved(pixels)
    ((luma, _),) = planes_of(data, whole(pixels))
    other = data.replace(frame_of(data), frame_of(data).replace(b"\x01\x11", b"\x01\x22"))
    assert other != data
    ((same, _),) = planes_of(other, whole(pixels))
    assert np.array_equal(same, luma)


@pytest.mark.parametrize("kind", sorted(NOT_OURS))
def test_what_is_not_for_it_is_left_to_libjpeg(kind):
    assert NOT_OURS[kind] != JPEG
    assert jpeg.decode(NOT_OURS[kind], (0, 0, 203, 331), 1.0) is None


def test_a_box_beyond_the_frame_is_refused():
    assert jpeg.decode(JPEG, (0, 0, 204, 331), 1.0) is None
    assert jpeg.decode(JPEG, (0, 0, 203, 332), 1.0) is None


def test_damage_above_the_boxs_bottom_is_left_to_libjpeg_and_below_it_not_seen():
    start = JPEG.index(b"\xff\xda")
    middle = (start + len(JPEG)) // 2
    cut = JPEG[:middle] + b"\xff\xd9"
    assert jpeg.decode(cut, (0, 0, 203, 331), 1.0) is None
    assert jpeg.decode(JPEG[:-6] + b"\xff\xd9", (0, 0, 203, 331), 1.0) is None
    found = planes_of(cut, (0, 0, 48, 331))
    for (ours, _), (whole_plane, _) in zip(found, planes_of(JPEG, (0, 0, 48, 331)), strict=True):
        assert np.array_equal(ours, whole_plane)
    # As libjpeg has it, what is missing is filled, and the views show what there is.
    views = augment_batch([cut], CROPS, seed=0, epoch=0)
    assert not views.arrays["broken"].any()


@pytest.mark.parametrize("interval", [0, 4])
@pytest.mark.parametrize("value", [1, 6])
def test_damaged_bytes_never_hang_or_harm(interval, value):
    options = (cv2.IMWRITE_JPEG_RST_INTERVAL, interval)
    data = saved_by_opencv(photograph(70, 90), *options)
    data = data[:2] + exif(3, bytes([value, 0, 0, 0])) + data[2:]
    pristine = np.frombuffer(data, np.uint8)
    rng = np.random.default_rng(interval)
    outcomes = {"planes": 0, "left": 0, "views": 0}
    for _ in range(1500):
        data = pristine.copy()
        # Half the time within the headers alone, which are a tenth of the file.
        end = len(data) if rng.random() < 0.5 else 700
        places = rng.integers(2, end, rng.integers(1, 6))
        data[places] = rng.integers(0, 256, len(places))
        if rng.random() < 0.2:
            data = data[: rng.integers(4, len(data))]
        image = data.tobytes()
        try:
            opened = open_image(image, max_pixels=1_000_000)
        except BrokenImage:
            continue
        _, height, width = opened.stored
        found = jpeg.decode(image, (0, 0, height, width), 1.0)
        outcomes["left" if found is None else "planes"] += 1
        if found is not None:
            pixels, layout = found
            for start, stored, stride, *_ in layout.tolist():
                assert start + stored * stride <= len(pixels)
        top, bottom = np.sort(rng.choice(height + 1, 2, replace=False)).tolist()
        left, right = np.sort(rng.choice(width + 1, 2, replace=False)).tolist()
        jpeg.decode(image, (top, left, bottom, right), rng.uniform(0.3, 20))
        try:
            views = augment_batch([image], CROPS, seed=0, epoch=0).arrays["global"]
        except BrokenImage:
            continue
        assert views.shape == (1, 2, 3, 96, 96)
        outcomes["views"] += 1
    assert min(outcomes.values()) > 50  # all were met


def test_one_pixel_of_a_large_images_corner_is_found():
    pixels = np.zeros((1000, 1500, 3), np.uint8)
    pixels[-8:, -8:] = 255
    data = saved(pixels, subsampling="4:4:4", quality=100)
    (plane, (top, left)), *_ = planes_of(data, (999, 1499, 1000, 1500))
    assert plane[999 - top, 1499 - left] >= 254
    assert plane[0, 0] <= 1
    assert decode_whole(data)[999, 1499].min() >= 254


def exif(kind: int, value: bytes) -> bytes:
    """An orientation as a TIFF entry of this type."""
    entry = struct.pack("<HHI", 0x0112, kind, 1) + value
    return segment(0xE1, b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("where", ["before the frame", "behind it"])
@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 7])
def test_an_orientation_that_only_one_decoder_sees_harms_nothing(kind, where, progressive):
    """The crops are drawn for the header's size; an image turned behind its back has another."""
    data = saved(photograph(40, 120), progressive=progressive)
    value = struct.pack("<I", 0x00010006) if kind == 4 else b"\6\0\0\0"
    place = 2 if where == "before the frame" else data.index(b"\xff\xda")
    data = data[:place] + exif(kind, value) + data[place:]
    opened = open_image(data)
    _, height, width = opened.stored
    for bottom in (height // 2, height):
        pixels, reduction = opened.decode(bottom, 1.0)
        assert reduction == 1
        assert pixels.shape[1] == width
        assert pixels.shape[0] >= bottom
    assert not augment_batch([data], CROPS, seed=0, epoch=0).arrays["broken"].any()


def orientation(value: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = value
    return found.tobytes()


@pytest.mark.parametrize("value", range(1, 9))
def test_turned_pixels_give_the_views_of_upright_ones(value):
    stored = photograph(70, 91)
    upright = decode_whole(saved(stored, exif=orientation(value), quality=100))
    planes = Planes.of_interleaved(
        decode_whole(saved(stored, quality=100)), stored=(TURNS[value], 70, 91)
    )
    rng = np.random.default_rng(value)
    view = View(size=32, crop_scale=(0.1, 1.0), flip=0.5)
    for _ in range(30):
        parameters = draw(view, rng, *upright.shape[:2])
        views = np.empty((1, 3, 32, 32), np.uint8)
        draw_views(planes, parameters.row[None], views)
        wanted = apply(upright, parameters, 32).transpose(2, 0, 1)
        # Rows and columns are resized in another order, and rounded in between.
        assert np.abs(views[0].astype(int) - wanted).max() <= (2 if value > 4 else 1)


@pytest.mark.parametrize("value", range(2, 9))
@pytest.mark.parametrize("progressive", [False, True])
def test_a_photograph_that_is_turned_is_decoded_where_the_crops_lie(
    value, progressive, monkeypatch
):
    data = saved(photograph(320, 427), exif=orientation(value), progressive=progressive)
    opened = open_image(data)
    assert (opened.height, opened.width) == decode_whole(data).shape[:2]
    wanted = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(codecs._turned_back(wanted, opened.stored[0]), opened.decode(320, 1)[0])
    ours = augment_batch([data] * 4, CROPS, seed=0, epoch=0).arrays["global"].astype(int)
    monkeypatch.setattr(codecs, "turn_of", lambda _: None)
    assert open_image(data).pixels is not None, "decoded whole, and upright"
    theirs = augment_batch([data] * 4, CROPS, seed=0, epoch=0).arrays["global"]
    difference = np.abs(ours - theirs)
    assert difference.mean() < 1.0
    assert np.percentile(difference, 99) <= 4


@pytest.mark.parametrize("value", range(1, 9))
def test_a_box_of_a_turned_image_lies_where_its_pixels_are(value):
    stored = np.arange(20 * 30 * 3).reshape(20, 30, 3)
    turn = TURNS[value]
    # What stored_box says of boxes, and _turned_back of pixels, are each other's inverse.
    height, width = (30, 20) if turn & TRANSPOSED else (20, 30)
    upright = np.empty((height, width, 3), int)
    for top in range(height):
        for left in range(width):
            box = compose.stored_box((turn, 20, 30), (float(top), float(left), 1.0, 1.0))
            upright[top, left] = stored[int(box[0]), int(box[1])]
    assert np.array_equal(codecs._turned_back(upright, turn), stored)
    top, left, rows, columns = map(int, compose.stored_box((turn, 20, 30), (3.0, 5.0, 7.0, 11.0)))
    part = stored[top : top + rows, left : left + columns]
    assert np.array_equal(codecs._turned_back(upright[3:10, 5:16], turn), part)


def big_endian(kind: int, value: bytes) -> bytes:
    entry = struct.pack(">HHI", 0x0112, kind, 1) + value
    return segment(0xE1, b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + entry + bytes(4))


NO_ENTRIES = segment(0xE1, b"Exif\0\0II*\0" + struct.pack("<IH", 8, 0) + bytes(4))
SIX = exif(3, b"\6\0\0\0")
UNUSUAL = {
    "two": SIX + exif(3, b"\1\0\0\0"),
    "two, the other way round": exif(3, b"\1\0\0\0") + SIX,
    "one behind an empty one": segment(0xE1, b"Exif\0\0") + SIX,
    "one behind one without entries": NO_ENTRIES + SIX,
    "without entries": NO_ENTRIES,
    "big-endian": big_endian(3, b"\0\6\0\0"),
    **{f"big-endian, type {kind}": big_endian(kind, b"\0\0\0\6") for kind in (4, 6, 9, 13)},
    **{f"little-endian, type {kind}": exif(kind, b"\6\0\0\0") for kind in (1, 4, 6, 8, 9, 13)},
    "cut off": segment(0xE1, SIX[4:30]),
    "another version": SIX.replace(b"II*\0", b"II+\0"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_orientation_is_seen_in_training_as_it_is_elsewhere(name):
    data = saved(photograph(40, 120))
    data = data[:2] + UNUSUAL[name] + data[2:]
    opened = open_image(data)
    assert (opened.height, opened.width) == decode_whole(data).shape[:2]


def test_what_only_pillow_can_read_is_turned_back(monkeypatch):
    data = saved(photograph(40, 120), exif=orientation(6))
    wanted = open_image(data).decode(40, 1.0)[0]
    monkeypatch.setattr(codecs.codec_messages, "imdecode", lambda *_: (None, ""))
    assert np.array_equal(open_image(data).decode(40, 1.0)[0], wanted)


def test_a_marker_that_no_header_has_hides_no_second_image():
    hidden = JPEG[:2] + segment(0x00, saved(photograph(16, 16))) + JPEG[2:]
    assert jpeg.decode(hidden, (0, 0, 203, 331), 1.0) is None
    with pytest.raises(BrokenImage, match="corrupt"):
        open_image(hidden)


def test_an_image_that_decodes_to_another_size_than_declared_is_broken():
    opened = open_image(saved(photograph(40, 120), progressive=True))
    with pytest.raises(BrokenImage, match="declares 121 x 40 pixels, but 120 x 40 were decoded"):
        replace(opened, stored=(0, 40, 121)).decode(40, 1.0)
    with pytest.raises(BrokenImage, match="declares 120 x 41 pixels"):
        replace(opened, stored=(0, 41, 120)).decode(41, 1.0)
