import itertools
import math
import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from selfray.losses import masked_pixel_error
from selfray.models.decoder import patchify
from selfray.models.encoder import normalize
from selfray.report import canvas, charts, live_map, maps
from selfray.report.charts import Compared, comparison, training_curves
from selfray.report.maps import embedding_maps
from selfray.report.projection import project_2d
from selfray.report.sheets import (
    HIDDEN,
    hide,
    neighbours,
    rebuild,
    reconstructions,
    views_grid,
)
from selfray.report.style import AGREES, DIFFERS, FAINT, MARGIN, UNKNOWN, WIDTH
from selfray.report.tiles import HEADINGS
from selfray.views import RandomMask

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOSSES = {
    "SimCLR": [(256.0 * i, 5 / (1 + i)) for i in range(200)],
    "MAE": [(256.0 * i, 1 / (1 + i)) for i in range(20)],
}
PROBES = {
    "SimCLR": {"knn": [(0.0, 0.5), (51200.0, 0.9)], "linear": [(0.0, 0.6), (51200.0, 0.95)]},
    "MAE": {"linear": [(5120.0, 0.7)]},
}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def plain(*colours: tuple[int, int, int], size: int = 8) -> np.ndarray:
    """Images of one colour each: uint8 [n, 3, size, size]."""
    colour = np.array(colours, np.uint8)[:, :, None, None]
    return np.broadcast_to(colour, (len(colours), 3, size, size)).copy()


def masks(n: int, grid: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([RandomMask(0.75).draw(rng, grid) for _ in range(n)])


def tiles(picture: Image.Image) -> np.ndarray:
    """The sheet below its headings, uint8 [H, W, 3]: antialiased letters can have any colour."""
    return np.asarray(picture)[MARGIN + HEADINGS - 5 :]


def count(picture: Image.Image, colour: tuple[int, ...]) -> int:
    return int((tiles(picture) == colour).all(-1).sum())


def left_of(picture: Image.Image, colour: tuple[int, ...]) -> int:
    """The first column that has pixels of this colour."""
    return int(np.nonzero((tiles(picture) == colour).all(-1).any(0))[0][0])


def frame(picture: Image.Image, colour: tuple[int, ...]) -> tuple[int, ...]:
    """The colour just left of the tile of this plain colour."""
    pixels = tiles(picture)
    row = int(np.nonzero((pixels == colour).all(-1).any(1))[0].mean())
    return tuple(int(value) for value in pixels[row, left_of(picture, colour) - 1])


# Sheets of images


def test_hidden_patches_are_greyed_and_visible_ones_untouched():
    images, mask = noise(3, 2, 3, 8, 12), masks(6, 4).reshape(3, 2, 16)
    hidden = hide(images, mask)
    for i in range(3):
        for v in range(2):
            for p in range(16):
                rows, columns = slice(p // 4 * 2, p // 4 * 2 + 2), slice(p % 4 * 3, p % 4 * 3 + 3)
                patch = hidden[i, v, :, rows, columns]
                if mask[i, v, p]:
                    assert (patch == np.reshape(HIDDEN, (3, 1, 1))).all()
                else:
                    np.testing.assert_array_equal(patch, images[i, v, :, rows, columns])
    np.testing.assert_array_equal(images, noise(3, 2, 3, 8, 12))


def test_a_views_grid_greys_the_hidden_share_of_the_views_and_nothing_of_the_originals():
    original, view = (10, 20, 30), (40, 150, 60)
    views = plain(view, view, size=16).reshape(1, 2, 3, 16, 16)
    picture = views_grid(plain(original), views, masks(2, 4).reshape(1, 2, 16), method="MAE")
    tile = count(picture, original)
    assert math.isqrt(tile) ** 2 == tile
    assert tile >= 64**2
    assert count(picture, view) == tile / 2  # A quarter of each of two views.
    assert count(picture, HIDDEN) == 2 * tile * 3 / 4
    assert count(views_grid(plain(original), views), view) == 2 * tile


def test_small_images_are_enlarged_to_exact_squares():
    image = noise(1, 3, 8, 8)
    image[:, 2] = 77  # A blue that marks the tile.
    sheet = tiles(views_grid(image, plain((1, 2, 3)).reshape(1, 1, 3, 8, 8)))
    rows, columns = np.nonzero(sheet[:, :, 2] == 77)
    tile = sheet[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    factor = len(tile) // 8
    assert factor >= 8
    enlarged = image[0].transpose(1, 2, 0).repeat(factor, 0).repeat(factor, 1)
    np.testing.assert_array_equal(tile, enlarged)


@pytest.mark.parametrize("size", [8, 32, 96, 224])
@pytest.mark.parametrize(("n", "views"), [(1, 1), (3, 2), (8, 2), (12, 1), (2, 10), (1, 30)])
def test_sheets_stay_readable_at_any_number_and_size(n: int, views: int, size: int):
    picture = views_grid(noise(n, 3, size, size), noise(n, views, 3, size, size))
    assert picture.mode == "RGB"
    assert 400 <= picture.width <= 1400
    assert picture.height <= 1400


def test_originals_may_have_another_size_and_shape_than_their_views():
    assert views_grid(noise(2, 3, 30, 50), noise(2, 2, 3, 16, 16)).width > 400


def test_reconstructions_show_each_image_masked_and_rebuilt():
    original, rebuilt = (200, 30, 30), (30, 200, 30)
    picture = reconstructions(plain(original, size=16), masks(1, 8), plain(rebuilt, size=16))
    tile = count(picture, rebuilt)
    assert count(picture, original) == tile + tile / 4
    assert count(picture, HIDDEN) == tile * 3 / 4
    assert left_of(picture, original) < left_of(picture, HIDDEN) < left_of(picture, rebuilt)


def test_frames_are_green_where_the_class_agrees_and_red_where_not():
    query, same, other, unlabelled = (9, 9, 200), (9, 200, 9), (200, 9, 9), (9, 200, 200)
    picture = neighbours(
        plain(query),
        plain(same, other, unlabelled)[None],
        np.array([3]),
        np.array([[3, 4, -1]]),
    )
    assert frame(picture, same) == ImageColor.getrgb(AGREES)
    assert frame(picture, other) == ImageColor.getrgb(DIFFERS)
    assert frame(picture, unlabelled) == ImageColor.getrgb(UNKNOWN)
    assert frame(picture, query) == ImageColor.getrgb(FAINT)


def test_names_add_captions_below_neighbours_and_are_cut_where_they_are_long():
    arguments = (noise(2, 3, 8, 8), noise(2, 5, 3, 8, 8), np.array([0, 1]), np.zeros((2, 5), int))
    bare = neighbours(*arguments)
    named = neighbours(*arguments, label_names=["cat", "a very long name of a class" * 9])
    assert named.width == bare.width
    assert named.height > bare.height


@pytest.mark.parametrize("normalize_pixels", [True, False])
def test_rebuild_inverts_a_perfect_prediction_exactly(normalize_pixels: bool):
    originals, mask = noise(4, 3, 16, 16), masks(4, 4)
    originals[0] = 255  # Constant patches have no deviation.
    target = patchify(normalize(torch.from_numpy(originals), MEAN, STD), 4)
    predicted = target
    if normalize_pixels:
        variance = target.var(-1, keepdim=True)
        predicted = (target - target.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    error = masked_pixel_error(predicted, target, torch.from_numpy(mask), normalize_pixels)
    assert error < 1e-10
    rebuilt = rebuild(predicted, originals, mask, 4, normalize_pixels, MEAN, STD)
    np.testing.assert_array_equal(rebuilt, originals)


def test_rebuild_changes_hidden_patches_alone_and_clips_them():
    originals, mask = noise(2, 3, 8, 8), masks(2, 4)
    for value, pixel in ((1e3, 255), (-1e3, 0)):
        predicted = np.full((2, 16, 12), value, np.float32)
        rebuilt = rebuild(predicted, originals, mask, 2, False, MEAN, STD)
        hidden = np.all(hide(plain((0, 0, 0), (0, 0, 0)), mask) > 0, axis=1)  # [n, H, W]
        assert rebuilt.dtype == np.uint8
        assert (rebuilt.transpose(0, 2, 3, 1)[hidden] == pixel).all()
        visible = ~hidden[:, None] & np.ones((2, 3, 1, 1), bool)
        np.testing.assert_array_equal(rebuilt[visible], originals[visible])


# Charts


def test_training_curves_name_every_method_probe_and_baseline():
    figure = charts._curves_figure(LOSSES, PROBES, {"raw pixels": 0.4}, "Two methods")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "SimCLR: loss",
        "MAE: loss",
        "probe accuracy on test images",
    ]
    texts = {text.get_text() for text in figure.texts}
    assert {"SimCLR, kNN", "SimCLR, linear", "MAE, linear", "raw pixels"} <= texts
    assert {"90.0 %", "95.0 %", "70.0 %", "40.0 %", "Two methods"} <= texts
    assert figure.axes[-1].get_xlabel() == "images seen"


def test_probe_names_stand_in_the_order_of_their_last_values_and_apart():
    close = {f"method {i}": {"knn": [(0.0, 0.1), (9.0, 0.9 - i / 1000)]} for i in range(7)}
    figure = charts._curves_figure({}, close, {}, "Close")
    heights = [
        text.get_position()[1] * figure.bbox.height
        for name in close
        for text in figure.texts
        if text.get_text().startswith(name)
    ]
    assert len(heights) == 7
    assert (np.diff(heights) < -20).all()
    assert max(heights) < figure.axes[0].get_window_extent().y1 + 1


def test_names_that_collide_move_as_little_as_need_be():
    assert charts._spread_out([0, 100], 10) == [0, 100]
    assert charts._spread_out([50, 50], 10) == [45, 55]
    assert charts._spread_out([50, 50, 61], 10) == pytest.approx([131 / 3 + d for d in (0, 10, 20)])
    assert charts._spread_out([98, 99], 10, 0, 100) == [90, 100]
    assert charts._spread_out([1, 2], 10, 0, 100) == [0, 10]


@pytest.mark.parametrize("methods", [1, 3, 4, 7])
@pytest.mark.parametrize("with_probes", [True, False])
def test_every_method_has_a_loss_panel_within_the_picture(methods: int, with_probes: bool):
    names = [f"method {i}" for i in range(methods)]
    losses = dict.fromkeys(names, LOSSES["SimCLR"])
    probes = dict.fromkeys(names, PROBES["SimCLR"]) if with_probes else {}
    figure = charts._curves_figure(losses, probes, {}, "Pretraining")
    assert len(figure.axes) == methods + with_probes
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for i, inner in enumerate(boxes):
        assert inner is not None
        assert inner.x0 >= 0
        assert inner.y0 >= 0
        assert inner.x1 <= WIDTH
        assert inner.y1 <= figure.bbox.height - 60  # Below the title.
        for other in boxes[:i]:
            assert other is not None
            assert not inner.overlaps(other)


def test_a_diverged_or_unsorted_loss_is_drawn_all_the_same():
    curve = [(3.0, math.nan), (2.0, 1.0), (1.0, math.inf), (0.0, 2.0)]
    picture = training_curves({"MAE": curve, "SimCLR": [(0.0, math.nan)]}, {})
    assert picture.width == WIDTH


def test_a_running_mean_is_the_mean_of_the_window_around_each_value():
    values = np.random.default_rng(0).normal(size=30)
    slow = [values[max(0, i - 2) : i + 3].mean() for i in range(30)]
    np.testing.assert_allclose(charts._running_mean(values, 5), slow)


def test_images_seen_are_written_short():
    assert [canvas._count(n) for n in (0, 800, 25_000, 1.5e6, 2e9)] == [
        "0", "800", "25k", "1.5M", "2G",
    ]  # fmt: skip


COMPARED = {
    "simclr": Compared({"knn": 0.5, "linear": 0.6}, {"knn": 0.9, "linear": 0.95}, "knn"),
    "mae": Compared({"knn": 0.3, "linear": 0.7}, {"knn": 0.4, "linear": 0.85}, "linear"),
}


def test_a_comparison_shows_every_accuracy_and_its_gain_in_its_probes_panel():
    figure = charts._comparison_figure(COMPARED, {"knn": 0.8, "linear": 0.9}, "All")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["kNN accuracy on test images", "linear accuracy on test images"]
    texts = {text.get_text() for text in figure.texts}
    assert {"All", "simclr", "mae", "raw pixels"} <= texts
    assert {"90.0 %", "40.0 %", "95.0 %", "85.0 %", "+40.0", "+10.0", "+35.0", "+15.0"} <= texts
    for axes, ends, baseline in zip(
        figure.axes, ([[50, 90], [30, 40]], [[60, 95], [70, 85]]), (80, 90), strict=True
    ):
        lines = [list(line.get_xdata()) for line in axes.lines]  # type: ignore[arg-type]
        assert [line for line in lines if len(line) == 2][:2] == ends
        assert lines[-1] == [baseline, baseline]


def test_a_comparison_has_the_number_in_bold_that_judges_the_method():
    figure = charts._comparison_figure(COMPARED, {}, "All")
    bold = {t.get_text() for t in figure.texts if "Bold" in str(t.get_fontproperties().get_file())}
    assert bold == {"All", "simclr", "mae", "90.0 %", "85.0 %"}
    assert "raw pixels" not in {text.get_text() for text in figure.texts}


@pytest.mark.parametrize("methods", [1, 7, 14])
def test_the_rows_of_a_comparison_stand_apart_and_within_the_picture(methods: int):
    compared = {f"method {i}": COMPARED["simclr"] for i in range(methods)}
    figure = charts._comparison_figure(compared, {"knn": 0.8, "linear": 0.9}, "Many")
    canvas.render(figure)
    names = [text for text in figure.texts if text.get_text().startswith("method")]
    heights = [text.get_window_extent() for text in names]
    assert all(a.y0 > b.y1 for a, b in itertools.pairwise(heights))
    for drawn in (*figure.texts, *figure.axes):
        box = drawn.get_window_extent()
        assert 0 <= box.x0 <= box.x1 <= WIDTH
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.height


def test_the_legend_of_maps_holds_the_names_that_occur():
    points, labels = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 4 - 1
    names = ["cat", "costs $5 or $6", "dog", "absent"]
    figure = maps._maps_figure({"untrained": points, "MAE": -points}, labels, names, "Maps")
    canvas.render(figure)  # Dollar signs are no formula.
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["untrained", "MAE"]
    texts = [text.get_text() for text in figure.texts]
    assert texts == ["Maps", *names[:3], "no label"]


def test_only_the_commonest_classes_are_coloured():
    labels = np.concatenate([np.arange(100), np.arange(50, 70)])
    points = np.random.default_rng(0).normal(size=(len(labels), 2))
    figure = maps._maps_figure({"": points}, labels, None, "Many")
    texts = [text.get_text() for text in figure.texts]
    assert texts == ["Many", *map(str, range(50, 70)), "80 more"]


def test_a_map_is_drawn_alone_and_beside_others():
    points, labels = np.random.default_rng(0).normal(size=(50, 2)), np.arange(50) % 5
    alone = embedding_maps({"": points}, labels, list("abcde"), title="Alone")
    six = embedding_maps({str(i): points for i in range(6)}, labels)
    assert alone.width == six.width == WIDTH
    assert alone.mode == six.mode == "RGB"


def test_the_same_arrays_give_the_same_picture():
    points, labels = np.random.default_rng(0).normal(size=(50, 2)), np.arange(50) % 5
    images, views = noise(2, 3, 8, 8), noise(2, 2, 3, 8, 8)
    for draw in (
        lambda: embedding_maps({"": points}, labels),
        lambda: training_curves(LOSSES, PROBES, {"raw pixels": 0.4}),
        lambda: comparison(COMPARED, {"knn": 0.4}),
        lambda: views_grid(images, views),
    ):
        assert draw().tobytes() == draw().tobytes()


def test_drawing_leaves_matplotlibs_global_state_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = matplotlib.rcParams.copy()
    training_curves(LOSSES, PROBES)
    embedding_maps({"": np.zeros((3, 2))}, np.arange(3))
    assert matplotlib.rcParams.copy() == before
    assert "matplotlib.pyplot" not in sys.modules


def test_projection_is_deterministic_and_keeps_clusters_apart():
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    features = (np.eye(64)[labels] * 5 + rng.normal(size=(120, 64)) * 0.3).astype(np.float32)
    points = project_2d(features)
    np.random.seed(1)
    np.testing.assert_array_equal(project_2d(features), points)
    assert points.shape == (120, 2)
    assert points.dtype == np.float32
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.eye(120) * 1e9
    assert (labels[distances.argmin(1)] == labels).all()


def test_few_features_are_projected_on_their_principal_components():
    features = np.eye(9)[:, :4] + 1
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    variances = np.linalg.eigvalsh(np.cov(unit.T, bias=True))[::-1]
    np.testing.assert_allclose(project_2d(features).var(axis=0), variances[:2], rtol=1e-5)
    assert project_2d(features[:1]).tolist() == [[0, 0]]
    assert project_2d(features[:5, :1]).shape == (5, 2)


def test_collapsed_features_lie_at_one_point():
    np.testing.assert_allclose(project_2d(np.full((50, 8), 3.0)), 0, atol=1e-12)
    np.testing.assert_allclose(project_2d(np.zeros((50, 8))), 0, atol=1e-12)


# What is refused

IMAGES, MASK, LABELS = noise(2, 3, 8, 8), masks(2, 4), np.array([0, 1])
PATCHES = np.zeros((2, 16, 12), np.float32)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: views_grid(IMAGES / 255, IMAGES[:, None]), "images must be uint8"),
        (lambda: views_grid(IMAGES, IMAGES), r"views must be uint8 \[2, V, 3, h, w\]"),
        (lambda: views_grid(IMAGES, IMAGES[:1, None]), r"views must be uint8 \[2, V, 3, h, w\]"),
        (lambda: views_grid(IMAGES[:0], IMAGES[:0, None]), "not empty"),
        (lambda: views_grid(IMAGES, IMAGES[:, None], MASK), r"mask must be bool \[2, 1, N\]"),
        (lambda: hide(IMAGES, MASK[:, :15]), "15 patches, which do not form a square grid"),
        (lambda: hide(IMAGES, np.ones((2, 9), bool)), "not form a square grid on images of 8 x 8"),
        (lambda: reconstructions(IMAGES, MASK.astype(int), IMAGES), "mask must be bool"),
        (lambda: reconstructions(IMAGES, MASK, IMAGES[..., :4]), "shape of originals"),
        (lambda: neighbours(IMAGES, IMAGES[:, None], LABELS, LABELS), r"integers \[2, 1\]"),
        (
            lambda: neighbours(IMAGES, IMAGES[:, None], LABELS, LABELS[:, None], ["cat"]),
            "query_labels holds 1, but label_names has 1 names",
        ),
        (lambda: training_curves({}, {}), "nothing to draw"),
        (lambda: training_curves({"MAE": []}, {}), r"losses\['MAE'\] must be"),
        (
            lambda: training_curves({}, {"MAE": {"knn": [(0, 93.0)]}}),
            r"probes\['MAE'\]\['knn'\] is an accuracy and must lie in \[0, 1\], got 93.0",
        ),
        (lambda: training_curves(LOSSES, PROBES, {"raw": 40.0}), r"baselines\['raw'\]"),
        (lambda: training_curves({}, {"MAE": {}}), "nothing to draw"),
        (lambda: comparison({}), "no method to compare"),
        (
            lambda: comparison({"MAE": Compared({"knn": 30.0}, {"knn": 0.4}, "knn")}),
            r"methods\['MAE'\].untrained\['knn'\] is an accuracy",
        ),
        (
            lambda: comparison({"MAE": Compared({"knn": 0.3}, {"knn": 0.4}, "linear")}),
            "judged_by 'linear' is not one of knn",
        ),
        (
            lambda: comparison({"MAE": Compared({}, {"knn": 0.4}, "knn")}),
            "not those of the first method, knn",
        ),
        (lambda: embedding_maps({}, LABELS), "no map"),
        (lambda: embedding_maps({"": np.zeros((2, 3))}, LABELS), r"must be \[n, 2\]"),
        (lambda: embedding_maps({"": np.zeros((3, 2))}, LABELS), r"labels must be integers \[3\]"),
        (lambda: project_2d(np.zeros((0, 4))), "not empty"),
        (lambda: project_2d(np.full((20, 4), np.nan)), "NaN"),
        (lambda: rebuild(PATCHES, IMAGES, MASK, 3, True, MEAN, STD), "patch 3 does not divide"),
        (lambda: rebuild(PATCHES[:, :9], IMAGES, MASK, 2, True, MEAN, STD), "predicted must be"),
        (lambda: rebuild(PATCHES, IMAGES, MASK[:1], 2, True, MEAN, STD), "mask must be bool"),
        (lambda: rebuild(PATCHES * np.nan, IMAGES, MASK, 2, True, MEAN, STD), "NaN"),
        (lambda: rebuild(PATCHES, IMAGES[..., :4], MASK, 2, True, MEAN, STD), "must be square"),
    ],
)
def test_bad_input_is_refused_by_name(draw, message: str):
    with pytest.raises(ValueError, match=message):
        draw()


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_thumbnails_of_any_number_of_channels_are_drawn(channels):
    images = np.full((5, channels, 8, 8), 200, np.uint8)
    sheet = live_map.thumbnails(images)
    assert sheet.size == (3 * live_map.SIDE, 2 * live_map.SIDE)
    assert sheet.getpixel((5, 5)) == (200, 200, 200)
