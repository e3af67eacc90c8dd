"""selfray from Python, as docs/library.md shows it."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import selfray
from helpers import MAE, VIT, experiment, start
from selfray.pixels.codecs import encode_png
from selfray.runs import checkpoint
from selfray.storage import Location

PAGE = Path(__file__).parents[2] / "docs" / "library.md"


def test_importing_selfray_imports_nothing_heavy():
    code = "import sys, selfray; print([m for m in ('torch', 'ray', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = selfray.nothing  # type: ignore[attr-defined]


def test_a_run_embeds_files_bytes_pictures_and_arrays_alike_by_its_best_checkpoint(tmp_path):
    wanted = experiment(MAE, VIT)
    run = Location.of(tmp_path / "run")
    best = start(wanted)
    checkpoint.save(best, wanted, run, loss=1.0)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    file = tmp_path / "image.png"
    file.write_bytes(encode_png(pixels))
    trained = selfray.load(run.uri)
    alike = [str(file), file, file.read_bytes(), Image.fromarray(pixels), pixels]
    features = trained.embed(alike)
    assert features.shape == (5, 64)
    np.testing.assert_allclose(features, features[:1].repeat(5, 0), rtol=1e-5, atol=1e-6)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1 of 2 are not images, such as .*text.png"):
        trained.embed([file, tmp_path / "text.png"])
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\], got float64 \[2, 2\]"):
        trained.embed([np.zeros((2, 2))])


@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_the_guides_calls_run_in_its_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        assert len(block.splitlines()) <= 10
        exec(block, names)
    assert names["features"].shape[0] == 4
    assert names["numbers"]
    assert names["adapt"].encoder.name == "vit_small_patch14_dinov2"
