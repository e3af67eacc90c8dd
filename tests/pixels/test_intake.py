"""Files as people have them -> stored images: depth, windows, pages, DICOM, multispectral TIFF."""

import contextlib
import io

import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from selfray.pixels.codecs import BrokenImage, check, decode, encode_jpeg
from selfray.pixels.intake import Intake, Taken, take


def tiff(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def png16(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def ramp(low: float, high: float, kind: type, channels: int = 1) -> np.ndarray:
    steps = np.linspace(low, high, 40 * 50).reshape(40, 50, 1)
    return np.repeat(steps, channels, 2).astype(kind)


def only(data: bytes, intake: Intake | None = None) -> Taken:
    (taken,) = take(data, intake or Intake())
    check(taken.data)
    return taken


def pixels(taken: Taken) -> np.ndarray:
    return decode(taken.data, channels=taken.channels)


def test_what_every_program_reads_alike_is_kept_byte_for_byte() -> None:
    picture = ramp(0, 255, np.uint8, 3)
    for data in (encode_jpeg(picture), tiff(picture, photometric="rgb")):
        assert only(data) == Taken(data, 3)


def test_a_depth_map_fills_the_range_and_the_manifest_says_how() -> None:
    taken = only(png16(ramp(0, 2702, np.uint16)[:, :, 0]))
    found = pixels(taken)
    assert (taken.channels, found.min(), found.max()) == (1, 0, 255)
    low, high, meaning = taken.done["window"]
    assert (taken.done["from"], taken.done["bits"]) == ("uint16 x 1", 8)
    assert meaning == "percentiles 0.5 99.5"
    assert 0 < low < 30 < 2600 < high < 2702


@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.float32, np.float64])
def test_a_fixed_window_maps_its_ends_to_black_and_white(kind: type) -> None:
    low = 0 if kind == np.uint16 else -2000
    values = ramp(low, 3000, kind)
    taken = only(tiff(values), Intake((low + 500.0, 1500.0)))
    wanted = (values.astype(float) - low - 500) / (1000 - low) * 255
    assert np.abs(pixels(taken) - np.clip(wanted, 0, 255)).max() <= 0.51
    assert taken.done["window"] == [low + 500.0, 1500.0, "fixed"]


def test_two_numbers_within_100_are_percentiles_unless_told_otherwise() -> None:
    values = ramp(0, 1000, np.uint16)
    assert only(tiff(values), Intake((10.0, 90.0))).done["window"][2] == "percentiles 10 90"
    fixed = only(tiff(values), Intake((10.0, 90.0), "fixed"))
    assert fixed.done["window"] == [10.0, 90.0, "fixed"]
    with pytest.raises(ValueError, match="window -1000 400 is not a pair of percentiles"):
        Intake((-1000, 400), "image")
    for window in ((5.0, 5.0), (9.0, 1.0), (0.0, float("nan"))):
        with pytest.raises(ValueError, match="two numbers, the lower first"):
            Intake(window)


def test_the_depth_is_kept_on_request() -> None:
    values = ramp(0, 4000, np.uint16, 5)
    taken = only(
        tiff(values, photometric="minisblack", planarconfig="contig"),
        Intake((0, 4000), keep_depth=True),
    )
    with Image.open(io.BytesIO(taken.data)) as stored:
        deep = np.asarray(stored).reshape(5, 40, 50)
    assert deep.dtype.kind in "ui"
    assert np.abs(deep[0] - values[:, :, 0] * (65535 / 4000)).max() <= 0.51
    assert pixels(taken).shape == (40, 50, 5)


@pytest.mark.parametrize("channels", [2, 5, 13])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_multispectral_tiff_keeps_its_channels_in_their_order(channels: int, planar) -> None:
    values = np.stack([np.full((40, 50), 10 * c + 1, np.uint8) for c in range(channels)], axis=2)
    given = values if planar == "contig" else values.transpose(2, 0, 1)
    taken = only(tiff(given, photometric="minisblack", planarconfig=planar))
    assert taken.channels == channels
    assert np.array_equal(pixels(taken), values)


def test_each_page_is_an_image_or_the_one_that_is_asked_for() -> None:
    pages = [np.full((8, 9), 1000 * n, np.uint16) for n in range(1, 4)]
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for page in pages:
            writer.write(page, photometric="minisblack")
    fixed = (0.0, 65535.0)
    taken = list(take(buffer.getvalue(), Intake(fixed)))
    assert [(t.page, int(pixels(t)[0, 0, 0])) for t in taken] == [(0, 4), (1, 8), (2, 12)]
    assert [int(pixels(t)[0, 0, 0]) for t in take(buffer.getvalue(), Intake(fixed, page=1))] == [8]
    with pytest.raises(BrokenImage, match="page 3 of a file that has 3"):
        list(take(buffer.getvalue(), Intake(fixed, page=3)))


def test_an_empty_window_and_values_that_are_no_numbers_are_told() -> None:
    with pytest.raises(BrokenImage, match=r"empty window: from 7 to 7 .* give --window"):
        only(tiff(np.full((8, 8), 7, np.uint16)))
    with pytest.raises(BrokenImage, match="no finite value"):
        only(tiff(np.full((8, 8), np.nan, np.float32)))
    some = ramp(0, 1, np.float32)
    some[0, :4, 0] = np.nan, np.inf, -np.inf, 0.5
    found = pixels(only(tiff(some), Intake((0, 1), "fixed")))
    assert found[0, :4, 0].tolist() == [0, 255, 0, 128]


def test_hostile_tiffs_are_refused_with_a_reason() -> None:
    contig = {"photometric": "minisblack", "planarconfig": "contig"}
    data = tiff(ramp(0, 5000, np.uint16, 5), **contig)
    rng = np.random.default_rng(0)
    for _ in range(100):
        noisy = np.frombuffer(data, np.uint8).copy()
        places = rng.integers(0, min(len(noisy), 400), 3)
        noisy[places] = rng.integers(0, 256, 3)
        with contextlib.suppress(BrokenImage):
            for taken in take(noisy.tobytes(), Intake()):
                check(taken.data)
    huge = tiff(np.zeros((4, 4, 5), np.uint16), **contig)
    with pytest.raises(BrokenImage, match="the limit is 15"):
        list(take(huge, Intake(), max_pixels=15))
    many = tiff(np.zeros((4, 4, 17), np.uint8), **contig)
    with pytest.raises(BrokenImage, match="has 17 channels; the limit is 16"):
        list(take(many, Intake()))


def dicom(values: np.ndarray, **tags) -> bytes:
    """A DICOM of int16 [H, W] or of frames [n, H, W]."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.PatientName, dataset.PatientID = "Doe^Jane", "SECRET-42"
    dataset.Modality = "CT"
    dataset.Rows, dataset.Columns = values.shape[-2:]
    if values.ndim == 3:
        dataset.NumberOfFrames = len(values)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    dataset.PixelData = values.astype("<i2").tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def test_a_dicom_is_rescaled_windowed_and_inverted() -> None:
    values = ramp(0, 2000, np.int16)[:, :, 0]
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1000}
    fixed = only(dicom(values, **tags), Intake((-1000.0, 400.0)))
    wanted = np.clip(values / 1400 * 255, 0, 255)
    assert np.abs(pixels(fixed)[:, :, 0] - wanted).max() <= 0.51
    own = only(dicom(values, WindowCenter=[40, 300], WindowWidth=[400, 1500], **tags))
    assert own.done["window"] == [-160.0, 240.0, "the file's"]
    assert own.done["modality"] == "CT"
    inverted = only(
        dicom(values, PhotometricInterpretation="MONOCHROME1", **tags), Intake((-1000.0, 400.0))
    )
    assert np.abs(pixels(inverted).astype(int) + pixels(fixed) - 255).max() <= 1


def test_frames_of_a_dicom_are_images_and_nobody_is_named() -> None:
    data = dicom(np.stack([ramp(0, 100 * n, np.int16)[:, :, 0] for n in (1, 2)]))
    taken = list(take(data, Intake()))
    assert [t.page for t in taken] == [0, 1]
    for one in taken:
        told = repr(one.done).encode() + one.data
        assert b"Doe" not in told
        assert b"SECRET" not in told
        assert set(one.done) == {"from", "bits_stored", "modality", "window", "bits"}


def test_a_dicom_without_pixels_or_cut_off_is_refused() -> None:
    whole = dicom(ramp(0, 100, np.int16)[:, :, 0])
    dataset = pydicom.dcmread(io.BytesIO(whole))
    del dataset.PixelData
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset)
    with pytest.raises(BrokenImage, match="the DICOM has no pixels"):
        only(buffer.getvalue())
    for length in (140, 300, len(whole) - 500):
        with pytest.raises(BrokenImage):
            only(whole[:length])
    big = dicom(np.zeros((4, 4), np.int16), Rows=60000, Columns=60000)
    with pytest.raises(BrokenImage, match="the limit is"):
        only(big)
