"""The experiments' own arithmetic, and that docs/results.md shows what their JSON holds."""

import json
from importlib import import_module

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from experiments import MEASURED, report
from experiments.composition import join
from experiments.spatial import cell_centre, centre
from vlv.scenes import WORLD, Scene, SceneObject


@pytest.mark.parametrize("place, cell", zip(WORLD.places, ((0, 0), (16, 0), (0, 16), (16, 16)), strict=True))
def test_the_centre_of_an_object_is_its_centre_of_mass(place, cell):
    item = SceneObject("small", "red", "square", place)
    scene = Scene((item,), "mint")
    picture = Image.new("RGB", (32, 32), WORLD.backgrounds["mint"])
    left, top = cell[0] + 3, cell[1] + 5
    picture.paste(WORLD.colours["red"], (left, top, left + 6, top + 4))
    np.testing.assert_allclose(centre(picture, scene, item), (left + 3, top + 2))
    np.testing.assert_allclose(cell_centre(item), (cell[0] + 8, cell[1] + 8))


def test_joined_embeddings_are_the_first_ones_of_one_and_then_the_others():
    first, second = torch.arange(5.0)[None, :, None], 10 + torch.arange(5.0)[None, :, None]
    assert join(first, second, 2, "from its start").flatten().tolist() == [0, 1, 10, 11, 12]
    assert join(first, second, 2, "in its place").flatten().tolist() == [0, 1, 12, 13, 14]
    for how in ("from its start", "in its place"):
        assert torch.equal(join(first, second, 0, how), second)
        assert torch.equal(join(first, second, 5, how), first)


def test_a_table_shows_settings_and_measurements():
    rows = [{"steps": 20, "share": {"value": 0.51, "n": 10, "standard_error": 0.02}, "FID": 1.23456}]
    assert report.table(rows).splitlines() == [
        "| steps | share | FID |",
        "| --- | --- | --- |",
        "| 20 | 0.510 ± 0.020 | 1.235 |",
    ]
    assert report.fill("a\n<!-- x -->\nold\n<!-- /x -->\nb", "x", "new\n") == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    with pytest.raises(ValueError, match="no place for y"):
        report.fill("text", "y", "new")


@pytest.mark.parametrize("name", MEASURED)
def test_the_page_shows_what_was_measured(name):
    page = (report.DOCS / "results.md").read_text(encoding="utf-8")
    rows = json.loads((report.DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    assert report.table(rows) in page
    figure = Figure()
    import_module(f"experiments.{name}").plot(rows, figure)
    assert all(axes.lines for axes in figure.axes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spatial", "composition"])
def test_an_experiment_can_be_run_again(name):
    from vlv.loading import load_whole

    model, processor = load_whole(None)
    rows = import_module(f"experiments.{name}").run(model.float().eval(), processor, 4)
    recorded = json.loads((report.DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    assert [row.keys() for row in rows] == [row.keys() for row in recorded]
