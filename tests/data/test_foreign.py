"""Formats that are not read: the quarantine names the format and the way out."""

import json

import numpy as np
import pytest
from test_data_layouts import build_here

from helpers import write
from selfray.data.options import BuildOptions
from selfray.pixels.codecs import decode, encode_png
from selfray.pixels.limits import BrokenImage
from selfray.storage import Location

NIFTI = bytes(344) + b"n+1\0" + bytes(100)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"ENVI\nsamples = 43\n", "the header of an ENVI image"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
        (b"CDF\x01" + bytes(50), "a NetCDF file"),
        (b"SIMPLE  =                    T", "a FITS image"),
        (NIFTI, "a NIfTI image"),
        (b"\x1f\x8b\x08" + bytes(50), "a gzip file (also .nii.gz)"),
        (b"RIFF\0\0\0\0AVI LIST", "an AVI video"),
        (b"PK\x03\x04" + bytes(50), "a zip archive (also .npz)"),
    ],
)
def test_a_format_that_is_not_read_is_named(data, words):
    with pytest.raises(BrokenImage) as refused:
        decode(data)
    assert refused.value.reason == "unsupported"
    assert f"{words}" in str(refused.value)
    assert str(refused.value).endswith("which is not read: convert it to TIFF or PNG")


def test_both_files_of_an_envi_image_are_quarantined_with_the_format(tmp_path):
    picture = encode_png(np.zeros((4, 4, 3), np.uint8))
    files = {
        "in/scene.hdr": b"ENVI\nsamples = 4\n",
        "in/scene.raw": bytes(64),
        "in/photo.img": picture,  # without a header it is what its bytes are
        "in/a.png": picture,
    }
    write(tmp_path, files)
    manifest = build_here(
        Location.of(tmp_path / "in"), Location.of(tmp_path / "out"), BuildOptions()
    )
    assert manifest.images == 2
    lines = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    found = {entry["file"]: (entry["reason"], entry["message"]) for entry in map(json.loads, lines)}
    assert found["scene.raw"] == (
        "unsupported",
        "the values of an ENVI image, described by scene.hdr: convert it to TIFF",
    )
    assert found["scene.hdr"][0] == "unsupported"
    assert "the header of an ENVI image" in found["scene.hdr"][1]
