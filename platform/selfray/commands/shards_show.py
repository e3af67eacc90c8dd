"""`selfray shards show`: what is known of a set of images, and a picture of some of them."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import Positional

from selfray.check import require
from selfray.commands.flags import flag
from selfray.commands.shards_text import known
from selfray.commands.words import nearest
from selfray.storage import Location

if TYPE_CHECKING:
    from PIL import Image

    from selfray.console import Console
    from selfray.data.chosen import Chosen
    from selfray.experiment import Experiment

IMAGES = 64
"""Images on the contact sheet."""
VIEWED = 4
"""Images whose views are shown."""


@dataclass(frozen=True)
class ShowShards:
    """Look at images before they are trained on: print what the manifest knows of them, and draw a
    contact sheet of 64 of them, with the views that a recipe would make of some.
    $ selfray shards show scans/ --recipe simclr-adapt
    """

    interrupted: ClassVar[str] = "nothing was changed"

    folder: Annotated[
        Positional[str],
        flag(
            """Folder that `selfray shards build` wrote, other Parquet files, or a folder of raw
            images; local, s3:// or gs://.""",
            "DST",
        ),
    ]
    recipe: Annotated[
        str | None,
        flag("Also draw the views that this recipe makes.", "NAME", "no views"),
    ] = None
    to: Annotated[
        str | None,
        flag("The picture, a .png file.", "FILE", "NAME-images.png here, by the folder's name"),
    ] = None
    seed: Annotated[int, flag("Seed of the choice of images.", "N")] = 0

    def run(self, console: "Console") -> int:
        from selfray.data.chosen import choose

        require(
            self.to is None or self.to.endswith(".png"), f"--to takes a .png file, got {self.to}"
        )
        recipe = None if self.recipe is None else _recipe(self.recipe)
        console.live(f"reading {self.folder}")
        folder = Location.of(self.folder)
        found = choose(self.folder, IMAGES, self.seed)
        manifest = found.manifest
        for line in _seen(found, folder) if manifest is None else known(manifest, folder):
            console.say(line)
        for line in found.broken[:3]:
            console.say(f"cannot be read: {line}")
        require(
            bool(found.pixels),
            f"none of {len(found.broken)} images of {folder} can be read; the first: "
            f"{next(iter(found.broken), 'the folder is empty')}",
        )
        for line in _displayed(found):
            console.say(line)
        picture, refused = _picture(found, folder, recipe)
        to = Location.of(self.to or f"{folder.name or 'images'}-images.png")
        _write(picture, to)
        console.say(
            f"{to}: {len(found.pixels)} of {found.total:,} images, chosen by seed {self.seed}"
        )
        require(not refused, f"--recipe {self.recipe} makes no views of these images: {refused}")
        return 0


def _recipe(name: str) -> "Experiment":
    from selfray import plugins
    from selfray.recipes import every

    recipes = {**every(), **plugins.recipes()}
    require(name in recipes, f"--recipe: there is no recipe {name}{nearest(name, recipes)}")
    return recipes[name]


def _seen(found: "Chosen", folder: Location) -> Iterator[str]:
    """What the chosen images of a folder without a manifest say about all of them."""
    yield f"{folder} has no manifest: what follows is of some images only"
    yield from found.notes
    if not found.pixels:
        return
    looked = f"of the {len(found.pixels)} images that were read"
    for name, axis in (("width", 1), ("height", 0)):
        sides = sorted(pixels.shape[axis] for pixels in found.pixels)
        spread = f"{sides[0]} / {sides[len(sides) // 2]} / {sides[-1]}"
        yield f"{name} (min / median / max) {looked}: {spread}"
    counts = {n: found.channels.count(n) for n in sorted(set(found.channels))}
    yield f"channels {looked}: " + ", ".join(f"{n} ({count})" for n, count in counts.items())
    for done in sorted(set(found.done) - {""}):
        yield f"`selfray shards build` would convert {found.done.count(done)} of them: {done}"
    yield f"not known before `selfray shards build {folder} DST`: mean, deviation, duplicates"


def _displayed(found: "Chosen") -> Iterator[str]:
    """How the picture differs from the values of the images."""
    from selfray.report.contact import channels_shown

    for count in sorted({pixels.shape[2] for pixels in found.pixels}):
        if text := channels_shown(count):
            yield f"the picture shows {text}"
    if found.manifest is not None and found.manifest.options.get("keep_depth"):
        yield "the picture shows the upper 8 of the 16 stored bits, as the views of a run do"


def _picture(
    found: "Chosen", folder: Location, recipe: "Experiment | None"
) -> tuple["Image.Image", str]:
    """(the picture, why a recipe makes no views of these images)."""
    from selfray.report.contact import channels_shown, contact_sheet, stacked

    shown = " and ".join(filter(None, map(channels_shown, sorted(set(found.channels)))))
    subtitle = f"{len(found.pixels)} of {found.total:,} images" + (f"; {shown}" if shown else "")
    captions = found.classes if any(found.classes) else ()
    sheet = contact_sheet(found.pixels, f"Images of {folder.name}", subtitle, captions)
    if recipe is None:
        return sheet, ""
    try:
        return stacked(sheet, _views(found, recipe)), ""
    except ValueError as error:
        return sheet, str(error)


def _views(found: "Chosen", recipe: "Experiment") -> "Image.Image":
    """The views of the first images. Raises ValueError if the recipe cannot take their channels."""
    from selfray.data.measured import kind_of_most
    from selfray.pixels.augment import augment_batch
    from selfray.report.contact import views_sheet
    from selfray.report.sheets import hide
    from selfray.report.tiles import as_rgb

    kind = kind_of_most({str(n): found.channels.count(n) for n in set(found.channels)})
    experiment = replace(
        recipe,
        encoder=replace(recipe.encoder, in_channels=kind),
        data=replace(recipe.data, channels=kind),
    )
    alike = [i for i, pixels in enumerate(found.pixels) if pixels.shape[2] in (kind, 3)][:VIEWED]
    arrays = augment_batch(
        [found.encoded[i] for i in alike], experiment.views, experiment.seed, 0, channels=kind
    ).arrays
    names, views = [], [[] for _ in alike]
    for group, own in experiment.views.items():
        drawn = as_rgb(arrays[group])  # [n, V, 3, h, w]
        if f"{group}_mask" in arrays:
            drawn = hide(drawn, arrays[f"{group}_mask"])
        names += [f"{group} {view + 1}" if len(own) > 1 else group for view in range(len(own))]
        for place, images in enumerate(drawn):
            views[place] += list(images)
    originals = [found.pixels[i] for i in alike]
    return views_sheet(originals, views, f"Views that {recipe.name} makes of them", names)


def _write(picture: "Image.Image", to: Location) -> None:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    try:
        to.write_bytes(file.getvalue())
    except OSError as error:
        raise OSError(f"--to {to} cannot be written ({error}): give another file") from None
