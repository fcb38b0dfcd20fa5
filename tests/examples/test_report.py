"""The page on runs that are not the tour's: nothing solved, nothing parsed, forced answers."""

import re

import numpy as np
import pytest
from runs import extracted

from examples.features import Feature, encoded, read_cells
from examples.report import Findings, as_grid, norms, shade, write_report
from utils.errors import UserError
from utils.shards import iter_items
from utils.shards.manifest import read_manifest

MEASURED = {"explained_variance": 0.9, "l0": 8.0, "dead_fraction": 0.0}


def findings(folder) -> Findings:
    cells = read_cells(folder, "resid_post.0")
    line = {"score": 0.5, "chance": 0.4, "highest_chance": 0.45}
    return Findings(
        manifest=read_manifest(folder),
        items=list(iter_items(folder)),
        about={},
        name="resid_post.0",
        sae=MEASURED,
        features=[Feature(1, "red & <co>", "color", 0.5, 0.5, 0.5, 0.1, 0.1, 9)],
        cells=cells,
        latents=encoded(lambda states: np.maximum(states, 0), cells.rows.activations),
        probes={"color": {"resid_post.0": line, "resid_post.2": {**line, "score": 0.45}}},
        contrast=None,
        survival={
            "ce_recovered": 0.987,
            "solved": {"clean": 8, "mean": 0, "spliced": 6},
            "cells_correct": {"clean": 50, "mean": 5, "spliced": 45},
        },
    )


@pytest.mark.parametrize("flags", [{}, {"teacher_forcing": True}, {"augmentations": 2}])
def test_it_is_written_for_any_run_and_never_over_another(tmp_path, four_layers, tasks_file, flags):
    folder = extracted(tmp_path, four_layers, tasks_file, **flags)
    found = findings(folder)
    write_report(tmp_path / "page" / "report.html", found)
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.endswith("</html>\n") and page.count("<h2>") == 6
    assert "Latent 1: red &amp; &lt;co&gt;" in page and "50% / 40%" in page
    assert "it recovers 98.7%." in page and "width:75%" in page
    assert not re.findall(r"(?:src|href)=|https?://|url\(", page)
    samples = 8 * flags.get("augmentations", 1)
    assert f"<b>7</b>tasks, {samples} samples" in page
    solved = "?" if "teacher_forcing" in flags else "0.0%"
    assert f"<b>{solved}</b>of the samples solved" in page
    assert "No answer was generated, or none parses." in page
    with pytest.raises(UserError, match=r"report.html exists: choose another folder"):
        write_report(tmp_path / "page" / "report.html", found)
    assert (tmp_path / "page" / "report.html").read_text() == page


def test_states_that_are_not_finite_are_white(tmp_path, four_layers, tasks_file):
    assert shade(np.nan) == "#ffffff"
    found = findings(extracted(tmp_path, four_layers, tasks_file, teacher_forcing=True))
    for item in found.items:
        rows = np.abs(item["activations"]["resid_post.0"].astype(np.float32)) + 1
        first = next(start for pair, *_, start, _ in item["cells"] if pair == -1)
        rows[first] = np.nan
        item["activations"] = {"resid_post.0": rows, "resid_post.2": np.full_like(rows, np.nan)}
    page = norms(found)
    assert "nan" not in page and "<span>0.0</span>" in page
    assert page.partition("resid_post.2")[0].count('fill="#ffffff"') == 1


def test_a_run_that_kept_some_tokens_is_refused(tmp_path, four_layers, tasks_file):
    folder = extracted(tmp_path, four_layers, tasks_file, token_positions="prompt")
    with pytest.raises(UserError, match="--token_positions all"):
        write_report(tmp_path / "report.html", findings(folder))
    assert not (tmp_path / "report.html").exists()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, four_layers, tasks_file):
    folder = extracted(tmp_path, four_layers, tasks_file)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report(tmp_path / "file" / "report.html", findings(folder))


def test_cells_are_drawn_where_they_are():
    cells = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]])
    assert as_grid(cells, np.arange(6)).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert shade(0) == "#2b1d52" and shade(1) == shade(7) == "#fcfdbf"
    assert shade(0.2) == "#6a2c8c"
