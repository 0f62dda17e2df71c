"""The page of a sweep: what it ranks and draws, and that it loads nothing and lets nothing through."""

from __future__ import annotations

import html
import itertools
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import dumped
from PIL import Image

from kdcache.sweep.page import sweep_page
from kdcache.sweep.runs import SweepRun

AXES = {"feature_weight": [0.0, 0.5, 2.0], "student_tap": ["encoder", "decoder"], "seed": [0, 1, 2]}
BASE = {"epochs": 4, "batch_size": 4}
HOSTILE = "<script>alert(\"x\")</script> & 'q' $a_b$ 人\n\x00\udcff"


def make_run(values, *, state="done", score=0.5, epochs=4, **changes):
    history = [
        {
            "epoch": n,
            "train_total": 2.0 / n,
            "val_student_miou": score * n / epochs,
            "val_teacher_miou": 0.9,
            "val_agreement": 0.7,
            "val_kl": None,
        }
        for n in range(1, epochs + 1)
    ]
    settings = {
        "name": "_".join(f"{axis}={value}" for axis, value in values.items()) or "run",
        "path": Path("runs"),
        "values": values,
        "state": state,
        "error": "",
        "best_epoch": epochs or None,
        "metrics": history[-1] if history else {},
        "history": history,
        "config": BASE | values,
        "picture": None,
    }
    return SweepRun(**(settings | changes))


def sweep(axes, **changes):
    """A run for each combination, scored at random."""
    rng = random.Random(0)
    return [
        make_run(dict(zip(axes, values, strict=True)), score=rng.uniform(0.4, 0.9), **changes)
        for values in itertools.product(*axes.values())
    ]


def unvalidated(run):
    """The run as a cache without validation rows gives it."""
    history = [{"epoch": row["epoch"], "train_total": row["train_total"]} for row in run.history]
    return replace(run, history=history, metrics=history[-1])


def table(page, name):
    """A table's rows of cell texts, the headings first."""
    body = re.search(rf'<table id="{name}".*?</table>', page, re.DOTALL)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[html.unescape(re.sub("<.*?>", "", cell)).strip() for cell in row] for row in cells]


def column(page, name, heading):
    headings, *rows = table(page, name)
    return [row[headings.index(heading)] for row in rows]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "epoch_004.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 80, 3), np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG")
    return path


def test_the_ranking_is_best_first_and_ends_with_what_is_not_done():
    runs = sweep(AXES)
    runs[3] = replace(runs[3], state="failed", error="out of memory")
    runs[5] = replace(runs[5], state="stopped")
    runs[7] = make_run(runs[7].values, state="waiting", epochs=0)
    page = sweep_page("sweep", runs, AXES, BASE)
    ranks, scores = column(page, "ranking", "rank"), column(page, "ranking", "val mIoU")
    assert ranks == [*map(str, range(1, 16)), "stopped", "failed", "waiting"]
    best_first = sorted(run.metrics["val_student_miou"] for run in runs if run.state == "done")
    assert scores[:15] == [f"{score:.4f}" for score in best_first[::-1]]
    assert column(page, "ranking", "error")[15:] == ["", "out of memory", ""]
    assert "15 done" in page
    assert "1 failed · 1 stopped · 1 waiting" in page


def test_columns_that_no_run_has_are_left_out():
    headings = table(sweep_page("sweep", sweep(AXES), AXES, BASE), "ranking")[0]
    assert headings == ["rank", *AXES, "val mIoU", "agreement", "best epoch", "of epochs", "run"]


def test_a_rank_leads_to_the_runs_settings_where_what_differs_is_marked():
    runs = sweep({"kl_weight": [1, 2]})
    runs[0] = replace(runs[0], config=runs[0].config | {"batch_size": 8})
    page = sweep_page("sweep", runs, {"kl_weight": [1, 2]}, BASE)
    for number in (1, 2):
        assert f'href="#run-{number}"' in page
        assert page.count(f'id="run-{number}"') == 1
    marked = re.findall(r'<tr class="marked"><td>(\w+)</td><td>(\w+)</td>', page)
    expected = {("kl_weight", "1"), ("kl_weight", "2"), ("batch_size", "8"), ("batch_size", "4")}
    assert set(marked) == expected
    assert "<td>epochs</td><td>4</td>" in page


def test_settings_are_compared_over_their_seeds():
    runs = sweep(AXES)
    runs[4] = replace(runs[4], state="failed")
    runs[6:8] = [replace(run, state="failed") for run in runs[6:8]]
    page = sweep_page("sweep", runs, AXES, BASE)
    expected = []
    for values in itertools.product(AXES["feature_weight"], AXES["student_tap"]):
        same = [run for run in runs if tuple(run.values.values())[:2] == values]
        done = [run.metrics["val_student_miou"] for run in same if run.state == "done"]
        deviation = f"{np.std(done, ddof=1):.4f}" if len(done) > 1 else "–"
        n = "3" if len(done) == 3 else f"{len(done)} of 3"
        span = f"{min(done):.4f} – {max(done):.4f}"
        mean = np.mean(done)
        expected.append((mean, [f"{values[0]:g}", values[1], f"{mean:.4f}", deviation, n, span]))
    assert table(page, "settings")[1:] == [row for _, row in sorted(expected, reverse=True)]


def test_no_table_over_seeds_without_several_of_them():
    axes = AXES | {"seed": [0]}
    assert 'id="settings"' not in sweep_page("sweep", sweep(axes), axes, BASE)


def test_without_validation_rows_the_loss_ranks_and_lower_is_better():
    axes = {"kl_weight": [1, 2, 4]}
    runs = [unvalidated(run) for run in sweep(axes)]
    for run, loss in zip(runs, (0.3, 0.1, 0.2), strict=True):
        run.metrics["train_total"] = loss
    page = sweep_page("sweep", runs, axes, BASE)
    assert "No validation rows: ranked by training loss" in page
    assert column(page, "ranking", "kl_weight") == ["2", "4", "1"]
    assert "val mIoU" not in page


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        (AXES, ["feature_weight", "student_tap"]),
        ({"kl_weight": [0, 0.01, 10]}, ["kl_weight"]),
        ({"kl_weight": [0.1, 10], "compile": [True, False]}, ["kl_weight", "compile"]),
        ({"a": [1, 2], "b": [1, 2, 3], "c": ["人", "$x$"], "seed": [1]}, ["a", "b", "c"]),
        ({"learning_rate": [n * 1e-4 for n in range(1, 30)]}, ["learning_rate"]),
        ({"encoder_weights": [f"weights/{'x' * 40}/{n}" for n in range(8)]}, ["encoder_weights"]),
    ],
)
def test_every_axis_but_the_seed_has_a_plot(axes, names):
    page = sweep_page("sweep", sweep(axes), axes, BASE)
    plots = re.search(r'<section id="effects">.*?</section>', page, re.DOTALL)[0]
    assert re.findall(r"<h3>(.*?)</h3>", plots) == names
    labels = re.findall(r'<svg[^>]*role="img" aria-label="val mIoU against (\w+)', plots)
    assert labels == names


def test_ids_are_unique_and_references_lead_somewhere():
    page = sweep_page("sweep", sweep(AXES), AXES, BASE)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)


def test_text_from_outside_is_escaped_wherever_it_goes():
    axes = {"encoder_weights": [HOSTILE, "b"], HOSTILE: ["<b>1</b>", "2"]}
    failed = {"state": "failed", "error": HOSTILE, "name": HOSTILE}
    runs = [*sweep(axes), make_run({"encoder_weights": HOSTILE, HOSTILE: None}, **failed)]
    page = sweep_page(HOSTILE, runs, axes, {HOSTILE: HOSTILE})
    page.encode("utf-8")
    assert page.count("<script") == 1
    assert "<b>" not in page
    assert "&lt;script&gt;alert(" in page
    assert "人" in page


def test_the_page_names_no_address_and_loads_nothing(photo):
    runs = [replace(run, picture=photo) for run in sweep(AXES)]
    page = sweep_page("sweep", runs, AXES, BASE)
    loads = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)|url\(\s*["']?([^"')]*)""", page)
    assert loads
    assert all(
        target.startswith(("#", "data:image/jpeg;base64,")) for target in map("".join, loads)
    )
    assert not re.search(r"@import|@font-face|<link|<iframe|https?://", page)


def test_the_same_runs_give_the_same_page(photo):
    runs = [replace(run, picture=photo) for run in sweep(AXES)]
    assert sweep_page("sweep", runs, AXES, BASE) == sweep_page("sweep", runs, AXES, BASE)


def test_the_best_and_the_worst_finished_run_are_pictured(photo):
    runs = [replace(run, picture=photo) for run in sweep({"kl_weight": [1, 2, 4]})]
    page = sweep_page("sweep", runs, {"kl_weight": [1, 2, 4]}, BASE)
    best, *_, worst = column(page, "ranking", "val mIoU")
    assert page.count("<img ") == 2
    text = html.unescape(page)
    assert f"Best run: val mIoU {best}, the teacher's 0.9000" in text
    assert f"Worst run: val mIoU {worst}, the teacher's 0.9000" in text
    captions = re.findall(r"<figcaption>(kl_weight.*?)</figcaption>", text)
    values = column(page, "ranking", "kl_weight")
    assert captions == [
        f"kl_weight={value}: kl_weight {value}" for value in (values[0], values[-1])
    ]


def _unscored(run):
    return replace(
        run, metrics={"val_student_miou": float("nan"), "train_total": None}, history=[{}]
    )


ONE = {"kl_weight": [1.0, 2.0]}
DEGENERATE = {
    "no run": ([], ONE),
    "no axis": ([make_run({})], {}),
    "one run": ([make_run({"kl_weight": 1.0})], ONE),
    "one seed axis": (sweep({"seed": [0, 1, 2]}), {"seed": [0, 1, 2]}),
    "all waiting": (sweep(ONE, state="waiting", epochs=0), ONE),
    "all failed": (sweep(ONE, state="failed", error="x" * 5000), ONE),
    "not a number": ([_unscored(run) for run in sweep(ONE)], ONE),
    "one epoch": (sweep(ONE, epochs=1), ONE),
    "no settings": (sweep(ONE, config={}), ONE),
    "picture gone": (sweep(ONE, picture=Path("/gone.jpg")), ONE),
    "no values": ([make_run({}), make_run({"kl_weight": None})], ONE),
    "equal scores": ([make_run({"kl_weight": value}) for value in ONE["kl_weight"]], ONE),
    "unlisted value": ([make_run({"kl_weight": value}) for value in (1.0, 7.0)], ONE),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_a_page_is_made_of_whatever_there_is(case):
    runs, axes = DEGENERATE[case]
    page = sweep_page(case, runs, axes, BASE)
    assert len(table(page, "ranking")) == len(runs) + 1
    scored = [run for run in runs if run.state == "done" and case != "not a number"]
    assert ("No run is finished yet" in page) == (not scored)
    assert page.rstrip().endswith("</html>")


def test_two_hundred_runs_stay_readable():
    axes = {"kl_weight": [0.1, 1, 2, 5, 10], "mse_weight": list(range(10)), "seed": [0, 1, 2, 3]}
    page = sweep_page("sweep", sweep(axes), axes, BASE)
    assert "The 40 highest ranked of 200 runs" in page
    assert "whatever their other settings and seeds" in page
    assert len(page) < 2_000_000


_LOOK = """
  const boxes = (query) => [...document.querySelectorAll(query)].map(
    (element) => element.getBoundingClientRect().width);
  document.querySelector("#ranking th:nth-child(2) button").click();
  location.hash = "#run-3";
  return {
    opened: document.querySelector("#run-3").closest("details").open,
    title: document.title,
    rows: document.querySelectorAll("#ranking tbody tr").length,
    sorted: [...document.querySelectorAll("#ranking tbody td:nth-child(2)")].map(
      (cell) => cell.textContent.trim()),
    images: [...document.images].map((image) => image.naturalWidth),
    svgs: boxes("svg"),
    page: document.documentElement.scrollWidth,
    window: innerWidth,
  };
"""


@pytest.mark.parametrize("width_px", [1280, 500])
def test_a_browser_shows_tables_plots_and_pictures(photo, tmp_path, width_px):
    runs = [replace(run, picture=photo) for run in sweep(AXES)]
    runs[3] = replace(runs[3], state="failed", error="out of memory " * 40)
    page = sweep_page("Sweep <of> 人", runs, AXES, BASE)
    seen = dumped(page, tmp_path, _LOOK, width_px)
    assert seen["title"] == "Sweep <of> 人"
    assert seen["rows"] == 18
    assert seen["opened"], "the link to a run's settings shows them"
    assert seen["sorted"] == ["0"] * 6 + ["0.5"] * 6 + ["2"] * 6
    assert seen["images"] == [80, 80]
    assert len(seen["svgs"]) == 4
    assert min(seen["svgs"]) > 300
    assert seen["page"] <= seen["window"], "the page itself scrolls sideways"
