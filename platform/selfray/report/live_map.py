"""A run's map of features as data, for a page that shows the image of the dot under the mouse.

A run's folder of pictures holds `embedding.json`, the dots, and `thumbnails.png`, one sheet of all
images in small.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from selfray.storage import Location, read_object

POINTS, THUMBNAILS = "embedding.json", "thumbnails.png"
SIDE = 40
"""Side of a thumbnail in pixels."""
MOST_POINTS = 2_000


def as_json(
    maps: Mapping[str, np.ndarray], labels: np.ndarray, label_names: Sequence[str] | None
) -> dict[str, Any]:
    """JSON of maps float [n, 2] by name, and of the labels int [n] of their images."""
    return {
        "maps": {name: np.round(points, 3).tolist() for name, points in maps.items()},
        "labels": labels.tolist(),
        "names": list(label_names or ()),
    }


def thumbnails(images: np.ndarray) -> Image.Image:
    """Images uint8 [n, C, H, W] on one square sheet, row by row; of more than three channels, the
    first three."""
    from selfray.report.tiles import as_rgb  # imports matplotlib

    images = as_rgb(images)
    across = _across(len(images))
    sheet = Image.new("RGB", (across * SIDE, math.ceil(len(images) / across) * SIDE))
    for number, image in enumerate(images):
        small = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        place = (number % across * SIDE, number // across * SIDE)
        sheet.paste(small.resize((SIDE, SIDE), Image.Resampling.LANCZOS), place)
    return sheet


def _across(count: int) -> int:
    return max(1, math.ceil(math.sqrt(count)))


def read(pictures: Location) -> dict[str, Any] | None:
    """The map in a run's folder of pictures, with its sheet as a data URI; None if there is none or
    it is not as `as_json` writes it."""
    found = read_object(pictures / POINTS)
    try:
        labels = [int(label) for label in found["labels"]]
        names = [str(name) for name in found["names"]]
        maps = {
            str(name): np.array(points, np.float64).reshape(len(labels), 2)
            for name, points in found["maps"].items()
        }
        with Image.open(io.BytesIO((pictures / THUMBNAILS).read_bytes())) as image:
            across = _across(len(labels))
            if image.size != (across * SIDE, math.ceil(len(labels) / across) * SIDE):
                return None
            packed = io.BytesIO()
            image.convert("RGB").save(packed, "WEBP", quality=70)
    except Exception:  # a damaged or foreign file counts as no map
        return None
    is_whole = all(np.isfinite(points).all() for points in maps.values())
    if not maps or not is_whole or not 0 < len(labels) <= MOST_POINTS:
        return None
    sheet = f"data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}"
    return {
        "maps": maps, "labels": labels, "names": names, "sheet": sheet, "across": across,
        "side": SIDE,
    }  # fmt: skip


def aligned(found: Mapping[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The maps of runs by run number, as JSON. Maps of the same images are shifted, scaled and
    rotated (or mirrored) onto the first one, so that a cluster is at the same place in all."""
    first: dict[tuple[int, ...], np.ndarray] = {}
    shown = {}
    for number, one in found.items():
        maps = {}
        units = {name: _unit(points) for name, points in one["maps"].items()}
        # The last of a run's maps is the pretrained encoder's.
        target = first.setdefault(tuple(one["labels"]), list(units.values())[-1])
        for name, unit in units.items():
            # Orthogonal Procrustes: the rotation with the least squared distance.
            left, _, right = np.linalg.svd(unit.T @ target)
            maps[name] = np.round(unit @ left @ right, 3).tolist()
        shown[str(number)] = {**one, "maps": maps}
    return shown


def _unit(points: np.ndarray) -> np.ndarray:
    """Points [n, 2], centred and scaled to a mean squared norm of 1 (unscaled if all are equal)."""
    centred = points - points.mean(0)
    return centred / (np.sqrt((centred**2).sum(1).mean()) or 1.0)
