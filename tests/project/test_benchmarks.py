"""The arithmetic of the benchmarks, and that docs/speed.md shows the measurements."""

import json
import sys

import pytest
import torch
from paths import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))  # as when one of them is run as a script

import cost  # noqa: E402
import measure  # noqa: E402
import refill  # noqa: E402
import utilisation  # noqa: E402

from benchmarks import report  # noqa: E402


def test_sides_take_turns_and_the_first_turn_warms_up():
    turns, seconds = [], iter(range(100))

    def side(name):
        def work():
            turns.append(name)
            return next(seconds)

        return work

    measured = measure.take_turns({"paper": side("paper"), "as shipped": side("as shipped")})
    assert turns == ["paper", "as shipped"] * 6
    assert measured == {"paper": [2, 4, 6, 8, 10], "as shipped": [3, 5, 7, 9, 11]}


def test_ratios_are_of_medians():
    found = measure.compare({"paper": [4.0, 1.0, 100.0, 5.0, 4.0], "as shipped": [1.0, 0.1, 2.0, 3.0, 2.0]}, "paper")
    assert [side["ratio"] for side in found.values()] == [1.0, 2.0]
    assert [side["images_per_second"] for side in found.values()] == [0.25, 0.5]


def test_lengths_are_drawn_as_stated():
    lengths = torch.tensor(measure.draw_lengths(20_000), dtype=torch.float)
    assert lengths.min() >= 1 and lengths.max() == 300
    assert abs(lengths.median() - 90) < 2
    assert abs(lengths.log().std() - 0.4) < 0.02
    assert measure.draw_lengths(5) == lengths[:5].int().tolist()


def test_a_refilled_batch_is_full_until_no_image_waits():
    lengths = [5, 1, 2, 2]  # in pairs: five steps and two; refilled: the second row has 1, 2, 2 in the first five
    assert refill.seconds_of_engines(lengths, 2, lambda rows: 1.0) == (7, 5)
    assert refill.seconds_of_engines(lengths, 2, float) == (10, 10)  # no step computes a caption that has ended
    assert refill.between({1: 0.0, 2: 1.0, 4: 3.0}, 3) == 2.0


def test_scenes_of_one_caption_are_wrong_together():
    ours = [{"wrong": ["a", "a", "b"]}, {"wrong": ["a", "a", "b", "c", "c"]}]
    assert report.difference(ours, [{"wrong": ["b"]}]) == "3.0 ± 2.2"  # 2 of a, none of b, 1 of c: the root of 5


def test_a_benchmark_of_nothing_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit):
        measure.parser("", default_images=1).parse_args(["--images", "0"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("argument --images: 0 is too few: it must be 1 or more")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_published_size_needs_a_gpu():
    with pytest.raises(SystemExit, match="needs a GPU with 70 GiB of memory, and there is none here"):
        measure.find_device("published")


def test_cost_of_the_recipe(tmp_path, monkeypatch, capsys):
    for stage, speed in (("stage-1", 100.0), ("stage-2", 8.0)):
        sides = {"as shipped": {"images_per_second": speed}}
        record = {"sides": sides, "machine": {"device": "a GPU"}}
        (tmp_path / f"{stage}-published.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["cost.py", "--price", "2.5", "--results", str(tmp_path)])
    cost.main()
    lines = capsys.readouterr().out.splitlines()
    # 102.4 million images at 100 a second are 284.4 hours; 6.4 million at 8 a second 222.2.
    assert "| stage 1 | as shipped | 100.00 | 284 | 711 | 0.71 |" in lines
    assert "| stage 2 | as shipped | 8.00 | 222 | 556 | 0.56 |" in lines
    assert "need 75.6 images/s" in lines[-1]  # 108.8 million in 400 hours
    (tmp_path / "stage-2-published.json").unlink()
    with pytest.raises(SystemExit, match="There is no .*stage-2-published.json"):
        cost.main()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_utilisation_of_a_recipe_is_operations_by_time_and_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(utilisation, "WARM_UP", 1)
    monkeypatch.setattr(utilisation, "STEPS", 1)
    changes = {"bf16": False, "dataloader_num_workers": 0, "per_device_train_batch_size": 2}
    monkeypatch.setitem(utilisation.SIDES, "stage 1", ("stage1", changes))
    monkeypatch.setitem(utilisation.SIDES, "stage 2", ("stage2", changes))
    output, argv = tmp_path / "utilisation.json", ["utilisation.py", "--size", "tiny", "--peak", "0.5"]
    for side in ("stage 1", "stage 2"):  # the second command keeps what the first one measured
        monkeypatch.setattr(sys, "argv", [*argv, side, "--output", str(output)])
        utilisation.main()
    record = json.loads(output.read_text())
    stage_1, stage_2 = record["sides"]["stage 1"], record["sides"]["stage 2"]
    assert stage_1["samples_of_a_step"] == 2 * 2 * 8  # images, accumulated twice, noise levels
    assert stage_2["samples_of_a_step"] == 2 and stage_2["tokens"] > 1
    for one, units in ((stage_1, 102_400_000), (stage_2, 6_400_000)):
        per_second = one["operations_of_a_sample"] * one["samples_per_second"]
        assert one["utilisation"] == pytest.approx(per_second / 0.5e12) and 0 < one["utilisation"] < 1
        assert one["dollars"] == pytest.approx(2.5 * units / one["samples_per_second"] / 3600)


def test_the_pages_show_what_was_measured():
    pages = [page.read_text(encoding="utf-8") for page in report.PAGES]
    speed, training, *_ = pages
    for page in pages:
        assert report.filled(page) == page
    assert "<!-- training_levers-tiny -->" in training
    # The table of targets: a row for each subject, the ratio of the mid size and then that of vlv-tiny.
    rows = {row[1].strip(): row for row in (line.split("|") for line in speed.splitlines()) if len(row) > 5}
    files = {"a step of stage 1": "stage-1", "a step of stage 2": "stage-2"}
    for subject, name in ({name: name for name in ("captioning", "reconstruction")} | files).items():
        for size, cell in zip(("mid", "tiny"), rows[subject][3:5], strict=True):
            sides = json.loads((report.RESULTS / f"{name}-{size}.json").read_text())["sides"]
            assert cell.split()[0] == f"{sides['as shipped']['ratio']:.1f}x"
    sides = json.loads((report.RESULTS / "stage-2-tiny.json").read_text())["sides"]
    bf16 = sides["as shipped"]["images_per_second"] / sides["paper"]["images_per_second"]
    assert rows["the same, the paper in bf16"][4].strip() == f"{bf16:.0f}x" and f", {bf16:.0f}x on `tiny`," in speed


def test_the_page_shows_what_the_mid_size_would_cost(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost.py", "--price", "0.1", "--size", "mid"])
    cost.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "\n".join(table) in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
