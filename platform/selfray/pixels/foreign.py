"""Recognises files of formats that are not read, so that a refusal can name the format."""

_STARTS = (
    (b"ENVI", "the header of an ENVI image"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (also NetCDF 4 and MATLAB 7.3)"),
    (b"CDF\x01", "a NetCDF file"),
    (b"CDF\x02", "a NetCDF file"),
    (b"MATLAB 5.0", "a MATLAB file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"SIMPLE  =", "a FITS image"),
    (b"NITF", "an NITF image"),
    (b"NRRD", "an NRRD image"),
    (b"ObjectType", "a MetaImage"),
    (b"NDims", "a MetaImage"),
    (b"GRIB", "a GRIB file"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image"),
    (b"8BPS", "a Photoshop image"),
    (b"ZISRAWFILE", "a Zeiss CZI image"),
    (b"\xda\xce\xbe\x0a", "a Nikon ND2 image"),
    (b"PK\x03\x04", "a zip archive (also .npz)"),
    (b"\x1f\x8b", "a gzip file (also .nii.gz)"),
    (b"%PDF", "a PDF"),
)
_INSIDE = (
    (344, b"n+1\0", "a NIfTI image"),
    (344, b"ni1\0", "the header of a NIfTI image"),
    (208, b"MAP ", "an MRC image"),
    (8, b"AVI ", "an AVI video"),
    (4, b"ftypheic", "a HEIC image"),
    (4, b"ftypmp4", "an MP4 video"),
    (4, b"ftypisom", "an MP4 video"),
    (4, b"ftypqt", "a QuickTime video"),
)

ENVI_DATA = frozenset({"bil", "bip", "bsq", "dat", "img", "raw"})
"""Extensions of files that hold the values of an image whose header is the .hdr file of the same
name."""


def foreign_format(data: bytes) -> str | None:
    """The format of a file that is not read, in words; None for one that is not known."""
    for start, words in _STARTS:
        if data.startswith(start):
            return words
    for place, mark, words in _INSIDE:
        if data[place : place + len(mark)] == mark:
            return words
    return None
