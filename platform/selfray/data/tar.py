"""Reads the samples of WebDataset tars, also of untrusted ones, in one pass and bounded memory.

Nothing is unpacked to disk. A member that is not a plain file inside the archive (a link, a device,
an absolute name, a name with ..) is quarantined, and reading continues.
"""

import json
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from selfray.data.beside import MAX_IMAGE_BYTES
from selfray.data.columns import LABEL_COLUMNS
from selfray.data.files import Quarantined, is_ignored
from selfray.data.layout import IMAGE_EXTENSIONS, extension
from selfray.data.rows import MIB, Row, Sample, raise_if_outage, too_large
from selfray.storage import Location, one_line

MAX_LABEL_BYTES = 64 * 1024
MAX_HEADER_BYTES = MIB
"""Largest header of a long name or of extended attributes, which tarfile reads into memory."""
MAX_MEMBERS = 1000
"""Names kept of the members of one sample; further ones are only counted."""
_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _StrictTarInfo(tarfile.TarInfo):
    """Raises an error for a damaged or missing header; tarfile would treat it as the archive's
    end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "tarfile.TarInfo":  # type: ignore[override]
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the archive's regular end
                raise
            raise tarfile.ReadError(
                f"{error or 'no header'} at byte {tarfile_.offset}: truncated or damaged"
            ) from None

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size < 0 or (self.type in _HEADERS and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of {self.size:,} bytes at byte {self.offset}")
        return super()._proc_member(archive)  # type: ignore[misc]


@dataclass
class _Sample:
    """The members of one key, in the order in which they come."""

    key: str | None = None
    image: str | None = None
    """The image that is used: `0001.jpg` rather than `0001.mask.png`."""
    data: bytes = b""
    cls: str | None = None
    json: str | None = None
    others: list[str] = field(default_factory=list)
    more: int = 0

    def note(self, name: str) -> None:
        if len(self.others) < MAX_MEMBERS:
            self.others.append(name)
        else:
            self.more += 1


def read_tar(
    root: Location, name: str, label_column: str | None = None, only_labels: bool = False
) -> Iterator[Row]:
    """The samples of a WebDataset tar, one for each key. `only_labels` leaves out the images."""
    location = root / name
    sample = _Sample()
    try:
        with (
            location.filesystem.open_input_stream(location.path) as stream,
            tarfile.open(
                fileobj=stream,  # type: ignore[arg-type]
                mode="r|",
                bufsize=MIB,
                tarinfo=_StrictTarInfo,
                errors="surrogateescape",
            ) as archive,
        ):
            while (member := archive.next()) is not None:
                # tarfile remembers every member, and a tar may have millions.
                archive.members.clear()  # type: ignore[attr-defined]
                archive.pax_headers.clear()  # type: ignore[attr-defined]
                if member.isdir() or is_ignored(member.name):
                    continue
                folder, base = posixpath.split(member.name)
                key = posixpath.join(folder, base.partition(".")[0])
                if key != sample.key:
                    yield from _finished(name, sample)
                    sample = _Sample(key)
                refused = _why_not(name, member)
                if refused is not None:
                    yield refused
                else:
                    content = archive.extractfile(member)
                    assert content is not None  # a plain file has content
                    yield from _add(name, sample, member, content, label_column, only_labels)
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        raise_if_outage(error, root)
        yield from _finished(name, sample)
        yield Quarantined(name, "unreadable", one_line(error))
    else:
        yield from _finished(name, sample)


def shown(name: str) -> str:
    """A member's name as valid UTF-8; in tars names may have any encoding."""
    return name.encode(errors="backslashreplace").decode()


def _why_not(archive: str, member: tarfile.TarInfo) -> Quarantined | None:
    """Why a member is refused; None for a plain file inside the archive."""
    what = f"{archive}!{shown(member.name)}"
    if not member.isreg() or member.issparse():
        kinds = {
            tarfile.SYMTYPE: "a symbolic link",
            tarfile.LNKTYPE: "a hard link",
            tarfile.CHRTYPE: "a device",
            tarfile.BLKTYPE: "a device",
            tarfile.FIFOTYPE: "a pipe",
        }
        kind = "a sparse file" if member.issparse() else kinds.get(member.type, "of unknown type")
        return Quarantined(what, "unreadable", f"the member is {kind}, not a plain file")
    if member.name.startswith("/") or ".." in member.name.split("/") or "\0" in member.name:
        return Quarantined(what, "unreadable", "the member's name leads out of the archive")
    is_label = member.name.endswith((".cls", ".json"))
    if is_label and member.size > MAX_LABEL_BYTES:
        return Quarantined(what, "too large", f"a label of {member.size:,} bytes")
    if extension(member.name) in IMAGE_EXTENSIONS and member.size > MAX_IMAGE_BYTES:
        return too_large(what, member.size)
    return None


def _add(
    archive: str,
    sample: _Sample,
    member: tarfile.TarInfo,
    content: IO[bytes],
    label_column: str | None,
    only_labels: bool,
) -> Iterator[Row]:
    name = member.name
    if name.endswith(".cls"):
        sample.cls = _text(content.read())
        sample.note(name)
    elif name.endswith(".json"):
        sample.json = _json_label(content.read(), label_column)
        sample.note(name)
    elif extension(name) not in IMAGE_EXTENSIONS:
        sample.note(name)  # known to be there; its bytes are not used
    elif sample.image is None:
        sample.image, sample.data = name, b"" if only_labels else content.read()
    else:
        second = name
        if _dots(name) < _dots(sample.image):
            second, sample.image = sample.image, name
            sample.data = b"" if only_labels else content.read()
        message = f"the sample already has {shown(posixpath.basename(sample.image))}"
        yield Quarantined(f"{archive}!{shown(second)}", "second image", message)


def _dots(name: str) -> int:
    return posixpath.basename(name).count(".")


def _finished(archive: str, sample: _Sample) -> Iterator[Row]:
    if sample.image is not None:
        text = sample.cls if sample.cls is not None else sample.json
        yield Sample(f"{archive}!{shown(sample.image)}", sample.data, text=text)
    elif sample.others:
        found = ", ".join(shown(posixpath.basename(name)) for name in sample.others[:10])
        more = len(sample.others) - 10 + sample.more
        found += f" and {more:,} more" if more > 0 else ""
        what = f"{archive}!{shown(sample.key or '')}"
        yield Quarantined(what, "no image", f"the sample has only {found}")


def _text(content: bytes) -> str | None:
    """A label as text; None for an empty, negative or undecodable one."""
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        return None
    return text if text and not text.startswith("-") else None


def _json_label(content: bytes, column: str | None) -> str | None:
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return _label_text(values)
    lower = {key.lower(): value for key, value in values.items()}
    columns: Sequence[str] = LABEL_COLUMNS if column is None else (column,)
    for name in columns:
        value = values.get(name, lower.get(name.lower()))
        if (text := _label_text(value)) is not None:
            return text
    return None


def _label_text(value: object) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return _text(str(value).encode(errors="replace")) if isinstance(value, str | int) else None
