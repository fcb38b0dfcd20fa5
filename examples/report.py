"""One HTML page that shows a run: solved and failed tasks, activation norms, features, contrast.

Self-contained: pictures are SVG in the page, nothing is fetched. `write_report` is called by
`example_usage.py`, and can be called on any run whose cells hold one token each.
"""

# R rows   C columns of a grid   D model width

import html
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.features import Cells, Feature
from utils.arc.tasks import Grid
from utils.dataset.contrast import CELL_ROLES, ROLES, Contrast, roles_of_cells
from utils.errors import UserError
from utils.prompt.encodings import COLORS, PALETTE
from utils.store.local import write_result

COLOR_CODES = [f"#{PALETTE[i : i + 3].hex()}" for i in range(0, 30, 3)]
HEAT = ("#2b1d52", "#6a2c8c", "#b73779", "#f1605d", "#fcb97d", "#fcfdbf")  # low to high
SHOWN_TASKS, SHOWN_GRIDS = 3, 6
TOP = 100  # cells where a latent is most active

STYLE = """
:root { --ink: #1d1f24; --soft: #5c6270; --line: #e3e5ea; --paper: #ffffff; --ground: #f5f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 8px 0; }
h2 { font-size: 1.35rem; margin: 40px 0 4px; }
h3 { font-size: 1rem; margin: 0 0 4px; }
p { margin: 4px 0 12px; max-width: 46rem; }
.soft { color: var(--soft); font-size: .9rem; }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.figure { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 16px; min-width: 130px; flex: 1 1 130px; }
.figure b { display: block; font-size: 1.35rem; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 16px; margin: 12px 0; }
.grids { display: flex; flex-wrap: wrap; gap: 14px 18px; align-items: flex-start;
  align-content: flex-start; }
.grids figure { margin: 0; }
figcaption { font-size: .8rem; color: var(--soft); margin-bottom: 3px; }
.pair { display: flex; gap: 8px; align-items: flex-start; }
svg { display: block; max-width: 100%; height: auto; }
.tag { display: inline-block; border-radius: 4px; padding: 0 8px; font-size: .8rem;
  font-weight: 600; }
.yes { background: #d8f3df; color: #14602b; } .no { background: #fde0dd; color: #8d1c13; }
.key { display: flex; flex-wrap: wrap; gap: 4px 14px; max-width: none; }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 2px;
  margin-right: 5px; vertical-align: -1px; }
.two { display: grid; grid-template-columns: minmax(0, 330px) minmax(0, 1fr); gap: 20px; }
.layer { display: grid; grid-template-columns: 230px minmax(0, 1fr); gap: 4px 20px;
  padding: 8px 0; border-bottom: 1px solid var(--line); }
.layer:last-child { border-bottom: 0; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 2px 8px;
  font-size: .8rem; align-items: center; }
.bar { height: 10px; border-radius: 2px; background: #3b5bdb; min-width: 1px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
@media (max-width: 720px) { .two, .layer { grid-template-columns: minmax(0, 1fr); }
  h1 { font-size: 1.5rem; } .card { padding: 12px; } }
"""


@dataclass(frozen=True)
class Findings:
    """What a page shows. items: of the run; about: task id -> what its rule is, in words; sae: what
    was measured of the autoencoder, `name` of its input; cells: what `features` speak of, and
    latents: sparse [N, L], what the autoencoder makes of each. probes: target -> what
    `examples.probe.probe` found of each activation. survival: what `examples/evaluate_sae.py` wrote
    of the autoencoder with --generate, on tasks that it was not trained on, or None."""

    manifest: dict[str, Any]
    items: Sequence[dict[str, Any]]
    about: dict[str, str]
    name: str
    sae: dict[str, float]
    features: Sequence[Feature]
    cells: Cells
    latents: Any
    probes: dict[str, dict[str, dict[str, float]]]
    contrast: Contrast | None
    survival: dict[str, Any] | None = None


def write_report(path: Path, findings: Findings) -> None:
    """Raises UserError where `path` is there already or cannot be written, and for a run that kept
    the states of some tokens alone."""
    if path.exists():
        raise UserError(f"{path} exists: choose another folder, or move it away")
    if any("positions" in item for item in findings.items):
        raise UserError("a report needs every token's states: run with --token_positions all")
    parts = [
        head(findings),
        solved_and_failed(findings),
        norms(findings),
        probes(findings),
        features(findings),
        survival(findings),
        contrast(findings),
    ]
    write_result(path, page("Inside a model that solves ARC tasks", "".join(parts)))


def page(title: str, body: str, more: str = "") -> bytes:
    """A whole page, which fetches nothing. more: HTML that comes last, such as a script."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main>{more}</body></html>\n"
    ).encode()


def picture(
    fills: Sequence[Sequence[str]],
    cell: int = 15,
    *,
    strength: np.ndarray | None = None,
    rings: Iterable[tuple[int, int]] = (),
    words: str = "",
    notes: Sequence[Sequence[str]] | None = None,
) -> str:
    """An SVG grid, [R, C] of CSS colors; strength: float [R, C], how much of its place a cell
    fills, from 0 (a third) to 1 (all); rings: cells with a frame; notes: [R, C], what is said of a
    cell that one points at."""
    R, C = len(fills), len(fills[0])
    width, height = C * cell + 2, R * cell + 2
    parts = [
        f'<svg viewBox="-1 -1 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(words or f"grid of {R} by {C}")}">'
        f'<rect x="-1" y="-1" width="{width}" height="{height}" fill="#8a8d94"/>'
    ]
    if strength is not None:
        parts.append(f'<rect width="{C * cell}" height="{R * cell}" fill="#e9ebef"/>')
    for r in range(R):
        for c in range(C):
            side = (cell - 1) * (1 if strength is None else (1 + 2 * strength[r, c]) / 3)
            x, y = (at * cell + (cell - side) / 2 for at in (c, r))
            note = f' data-note="{html.escape(notes[r][c])}"' if notes else ""
            parts.append(
                f'<rect x="{x:.3g}" y="{y:.3g}" width="{side:.3g}" height="{side:.3g}" '
                f'fill="{fills[r][c]}"{note}/>'
            )
    for r, c in rings:
        parts.append(
            f'<rect x="{c * cell + 1.5:g}" y="{r * cell + 1.5:g}" width="{cell - 3}" '
            f'height="{cell - 3}" fill="none" stroke="#ffffff" stroke-width="3"/>'
            f'<rect x="{c * cell + 1.5:g}" y="{r * cell + 1.5:g}" width="{cell - 3}" '
            f'height="{cell - 3}" fill="none" stroke="#e8590c" stroke-width="1.6"/>'
        )
    return "".join(parts) + "</svg>"


def colored(grid: Grid, **more: Any) -> str:
    return picture([[COLOR_CODES[color] for color in row] for row in grid], **more)


def heat(values: np.ndarray, low: float, high: float, **more: Any) -> str:
    """values: float [R, C], from `low` (dark) to `high` (light)."""
    return picture(
        [[shade((v - low) / ((high - low) or 1)) for v in row] for row in values], **more
    )


def shade(x: float) -> str:
    """A color of HEAT for 0..1, and white for NaN."""
    if np.isnan(x):
        return "#ffffff"
    x = min(max(float(x), 0.0), 1.0) * (len(HEAT) - 1)
    i = min(int(x), len(HEAT) - 2)
    ends = [np.frombuffer(bytes.fromhex(code[1:]), np.uint8) for code in HEAT[i : i + 2]]
    mixed = np.round(ends[0] + (x - i) * (ends[1].astype(float) - ends[0])).astype(np.uint8)
    return f"#{mixed.tobytes().hex()}"


def figure(caption: str, content: str) -> str:
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{content}</figure>"


def scale(low: str, high: str, shades: Sequence[str]) -> str:
    stops = ", ".join(shades)
    return (
        '<p class="soft" style="display:flex;gap:8px;align-items:center;flex-wrap:wrap">'
        f'<span>{low}</span><span style="width:120px;height:12px;border-radius:3px;'
        f'background:linear-gradient(90deg,{stops})"></span><span>{high}</span></p>'
    )


def grids_of(item: dict[str, Any]) -> dict[tuple[int, int], np.ndarray]:
    """(pair, role) -> cells int [C, 5]: row, col, color, token_start, token_stop, in the order of
    the prompt."""
    found: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    for cell in item["cells"]:
        found[int(cell[0]), int(cell[1])].append(cell[2:])
    return {key: np.array(cells) for key, cells in found.items()}


def as_grid(cells: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values of cells [C] -> [R, C]."""
    grid = np.zeros(cells[:, :2].max(axis=0) + 1, values.dtype)
    grid[cells[:, 0], cells[:, 1]] = values
    return grid


def head(found: Findings) -> str:
    scored = [item for item in found.items if item["correct"] is not None]
    solved = sum(item["correct"] for item in scored)
    model = found.manifest["model"]
    tasks = len({item["task_id"] for item in found.items})
    status = "" if found.manifest["status"] == "complete" else " The run is not complete."
    boxes = {
        "of the samples solved": f"{solved / len(scored):.1%}" if scored else "?",
        f"tasks, {len(found.items)} samples": f"{tasks}",
        "tokens, each with its states": f"{found.manifest['total_tokens']:,}",
        f"variance of {found.name} explained": f"{found.sae['explained_variance']:.1%}",
        "latents active a token (L0)": f"{found.sae['l0']:.1f}",
        "latents silent on held-out tasks": f"{found.sae['dead_fraction']:.1%}",
    }
    figures = "".join(
        f'<div class="figure"><b>{html.escape(value)}</b>{html.escape(name)}</div>'
        for name, value in boxes.items()
    )
    path = html.escape(Path(model["path"]).name)
    return (
        "<h1>Inside a model that solves ARC tasks</h1>"
        f"<p>The model <b>{path}</b> ({model['model_type']}, {model['num_layers']} layers, "
        f"{model['hidden_size']} wide) was given ARC tasks. Its hidden states were kept while it "
        f"answered, each tied to the grid cell that its token stands for.{status}</p>"
        f'<div class="figures">{figures}</div>'
    )


def solved_and_failed(found: Findings) -> str:
    answered = [item for item in found.items if item["prediction"] and item["correct"] is not None]
    good = sorted((i for i in answered if i["correct"]), key=lambda i: i["prompt_length"])
    places = np.unique(np.linspace(0, len(good) - 1, SHOWN_TASKS).astype(int)) if good else []
    good = [good[i] for i in places]
    # Of the failed those that are wrong in the fewest cells, of each rule one.
    bad: dict[str, dict[str, Any]] = {}
    failed = [item for item in answered if not item["correct"]]
    for item in sorted(failed, key=lambda i: (len(wrong_cells(i) or [()] * 900), i["task_id"])):
        rule = " ".join(found.about.get(item["task_id"], item["task_id"]).split()[:3])
        bad.setdefault(rule, item)
    chosen = [*good, *list(bad.values())[:SHOWN_TASKS]]
    cards = "".join(card(item, found.about) for item in chosen)
    if not chosen:
        cards = '<div class="card"><table><tr><td>No answer was generated, or none parses.</td>'
        cards += "</tr></table></div>"
    return (
        "<h2>What it solved, and what it did not</h2>"
        f"<p>{_counted(found.items)} Below are some of each, of the failed those that are wrong in "
        "the fewest cells. A frame marks a predicted cell that is wrong. The last grid shows how "
        "sure the model was of each cell of its answer: the probability that it gave the token."
        f"</p>{key()}{scale('p = 0', 'p = 1', HEAT)}{cards}"
    )


def _counted(items: Sequence[dict[str, Any]]) -> str:
    """How the samples ended, in a sentence."""
    failed = [item for item in items if item["correct"] is False]
    unread = sum(item["prediction"] is None for item in failed)
    shapes = sum(item["prediction"] is not None and wrong_cells(item) is None for item in failed)
    return (
        f"Of {len(items)} samples {sum(bool(i['correct']) for i in items)} were solved and "
        f"{len(failed)} failed: {len(failed) - unread - shapes} by wrong cells, {shapes} by a grid "
        f"of another shape, {unread} without a grid that can be read."
    )


def key() -> str:
    """ARC's colors and what they are called here."""
    swatches = "".join(
        f'<span><i style="background:{code}"></i>{name.lower()}</span>'
        for code, name in zip(COLOR_CODES, COLORS, strict=True)
    )
    return f'<p class="key soft">{swatches}</p>'


def wrong_cells(item: dict[str, Any]) -> list[tuple[int, int]] | None:
    """Cells of the prediction that differ from the target; None where the shapes do."""
    said, target = np.array(item["prediction"]), np.array(item["target"])
    if said.shape != target.shape:
        return None
    return [(int(r), int(c)) for r, c in np.argwhere(said != target)]


def card(item: dict[str, Any], about: dict[str, str]) -> str:
    grids = grids_of(item)
    parts = []
    for pair in range(item["num_train_pairs"]):
        both = grids[pair, 0], grids[pair, 1]
        sides = [colored(as_grid(c, c[:, 2]).tolist(), cell=11) for c in both]
        parts.append(figure(f"pair {pair + 1}", f'<div class="pair">{"".join(sides)}</div>'))
    given = grids[-1, 0]
    parts.append(figure("test input", colored(as_grid(given, given[:, 2]).tolist())))
    parts.append(figure("target", colored(item["target"])))
    wrong = wrong_cells(item)
    parts.append(figure("prediction", colored(item["prediction"], rings=wrong or ())))
    answer = grids[-1, 1]
    logprobs = np.array(
        [
            item["output_logprobs"][
                start - item["prompt_length"] : stop - item["prompt_length"]
            ].sum()
            for start, stop in answer[:, 3:]
        ]
    )
    sure = as_grid(answer, np.exp(logprobs))
    lowest = f"{logprobs.min():.2f}".replace("-0.00", "0.00")
    parts.append(figure(f"p of each cell; lowest log p {lowest}", heat(sure, 0, 1)))
    tag = '<span class="tag yes">solved</span>' if item["correct"] else (
        '<span class="tag no">failed</span>'
    )  # fmt: skip
    note = "" if wrong is not None else " The prediction has another shape than the target."
    words = html.escape(about.get(item["task_id"], f"task {item['task_id']}"))
    return (
        f'<div class="card"><h3>{tag} {words}</h3><p class="soft">task '
        f'{html.escape(item["task_id"])}.{note}</p><div class="grids">{"".join(parts)}</div></div>'
    )


def norms(found: Findings) -> str:
    """Norms of one solved sample, every captured layer of the hook point a row."""
    solved = [item for item in found.items if item["correct"]] or list(found.items)
    item = sorted(solved, key=lambda i: -i["prompt_length"])[len(solved) // 2]
    grids = grids_of(item)
    wanted = [k for k in grids if k[0] in (0, -1)]
    captions = {
        (0, 0): "pair 1 input",
        (0, 1): "pair 1 output",
        (-1, 0): "test input",
        (-1, 1): "answer",
    }

    def line(left: str, drawn: dict[tuple[int, int], str]) -> str:
        shown = "".join(figure(captions[key], drawn[key]) for key in wanted)
        return f'<div class="layer"><div>{left}</div><div class="grids">{shown}</div></div>'

    plain = {key: colored(as_grid(grids[key], grids[key][:, 2]).tolist()) for key in wanted}
    lines = [line("<h3>the task</h3>", plain)]
    for name, states in item["activations"].items():
        norm = np.linalg.norm(states.astype(np.float32), axis=1)
        held = {k: np.array([norm[s:e].mean() for s, e in grids[k][:, 3:]]) for k in wanted}
        known = np.concatenate([*held.values()])
        known = known[np.isfinite(known)] if np.isfinite(known).any() else np.zeros(1)
        low, high = known.min(), known.max()
        left = f"<h3>{html.escape(name)}</h3>{scale(f'{low:.1f}', f'{high:.1f}', HEAT)}"
        shades = {k: heat(as_grid(grids[k], held[k]), low, high) for k in wanted}
        lines.append(line(left, shades))
    body = f'<div class="card">{"".join(lines)}</div>'
    return (
        "<h2>How large the activations are, layer by layer</h2>"
        "<p>One task, first as the model reads it, then with every cell shaded by the norm of its "
        "token's state after each captured layer, or white where that is not a number.</p>"
        f"{body}"
    )


def probes(found: Findings) -> str:
    """A table: activations down, targets across."""
    names = list(dict.fromkeys(name for lines in found.probes.values() for name in lines))
    rows = ""
    for name in names:
        row = ""
        for lines in found.probes.values():
            line = lines[name]
            gain = (line["score"] - line["chance"]) / ((1 - line["chance"]) or 1)
            style = ' class="soft"'
            if line["score"] > line["highest_chance"]:
                ink = "#ffffff" if gain < 0.6 else "#1d1f24"
                style = f' style="background:{shade(0.2 + 0.8 * gain)};color:{ink}"'
            row += f"<td{style}>{line['score']:.0%} / {line['chance']:.0%}</td>"
        rows += f"<tr><td>{html.escape(name)}</td>{row}</tr>"
    header = "".join(f"<th>{html.escape(target)}</th>" for target in found.probes)
    return (
        "<h2>What can be read off the activations, layer by layer</h2>"
        "<p>A linear classifier was fitted to the states of four fifths of the tasks, and had to "
        "say what the cell of each token is in the others: how often it was right, and how often "
        "the same classifier is with shuffled labels. Colored where it is more than on any of 19 "
        "shuffles, which happens by chance one time in 20.</p>"
        f'<div class="card scroll"><table><tr><th>activation</th>{header}</tr>{rows}</table></div>'
    )


def features(found: Findings) -> str:
    cards = "".join(feature_card(feature, found) for feature in found.features)
    return (
        "<h2>What single features see</h2>"
        f"<p>A sparse autoencoder was trained on <b>{html.escape(found.name)}</b> of nine tenths "
        "of the tasks; the boxes on top say how it does on the others. Small programs that look at "
        "a cell and its grid, and every two of them together, were tried on all of its latents. "
        f"Here are {len(found.features)} latents that one of them fits well. A cell is drawn the "
        f"larger the more active the latent is there, and framed where it is among the {TOP} cells "
        f"on which it is most active.</p>{cards}"
    )


def feature_card(feature: Feature, found: Findings) -> str:
    active = found.latents[:, [feature.latent]].toarray()[:, 0]
    top = np.argsort(-active, kind="stable")[: min(TOP, feature.cells)]
    cells = found.cells.rows.cells[top]
    by_color = [(name.lower(), float((cells[:, 4] == i).mean())) for i, name in enumerate(COLORS)]
    roles = roles_of_cells(cells)
    by_role = [(role, float((roles == i).mean())) for i, role in enumerate(CELL_ROLES)]
    places = np.zeros(np.maximum(cells[:, 2:4].max(axis=0) + 1, 2))
    np.add.at(places, (cells[:, 2], cells[:, 3]), 1)
    shares = (
        '<div><figcaption>share of each color among the top cells</figcaption><div class="bars">'
        + "".join(bar(n, s, COLOR_CODES[i]) for i, (n, s) in enumerate(by_color) if s)
        + '</div><figcaption style="margin-top:8px">share of each role</figcaption>'
        + '<div class="bars">'
        + "".join(bar(n, s, "#3b5bdb") for n, s in by_role if s)
        + '</div><figcaption style="margin-top:8px">where in the grid: light is often'
        + "</figcaption>"
        + heat(places, 0, float(places.max()))
        + "</div>"
    )
    return (
        f'<div class="card"><h3>Latent {feature.latent}: {html.escape(feature.predicate)}</h3>'
        f'<p class="soft">{feature.precision:.0%} of the cells where it is active are so '
        f"(precision), of all cells {feature.base:.0%}; of the cells that are so, it is active on "
        f"{feature.recall:.0%} (recall). Together that is an F1 score of {feature.f1:.2f}; on "
        f"shuffled tasks no program has more than {feature.chance:.2f}.</p>"
        f'<div class="two">{shares}<div class="grids">{"".join(firing(active, top, found))}</div>'
        "</div></div>"
    )


def survival(found: Findings) -> str:
    """What the model still gets right with other states in the place of its own."""
    if found.survival is None:
        return ""
    said, cards = found.survival, ""
    names = {
        "clean": ("as they are", "#2b8a3e"),
        "spliced": ("reconstructed by the autoencoder", "#3b5bdb"),
        "mean": ("their mean at every token", "#868e96"),
    }
    for what, counts in (("tasks solved", "solved"), ("cells right", "cells_correct")):
        most = max(said[counts].values()) or 1
        bars = "".join(
            bar(name, said[counts][condition] / most, color, f"{said[counts][condition]:,}")
            for condition, (name, color) in names.items()
        )
        cards += f'<div><figcaption>{what}</figcaption><div class="bars">{bars}</div></div>'
    return (
        "<h2>What survives the autoencoder</h2>"
        "<p>On tasks that the autoencoder was not trained on, the model answered again with the "
        f"states of <b>{html.escape(found.name)}</b> changed at every token of prompt and answer. "
        "A reconstruction that keeps the tasks solved has kept what the model needs. Of the "
        "cross-entropy that lies between states set to zero and states as they are, it recovers "
        f"{said['ce_recovered']:.1%}.</p>"
        f'<div class="two">{cards}</div>'
    )


def bar(name: str, share: float, color: str, said: str | None = None) -> str:
    return (
        f'<span>{html.escape(name)}</span><span class="bar" style="width:{100 * share:.0f}%;'
        f'background:{color}"></span><span>{said or f"{share:.0%}"}</span>'
    )


def firing(active: np.ndarray, top: np.ndarray, found: Findings) -> list[str]:
    """The grids of the top cells, each of another task, every cell as strong as the latent is.

    active: float [N]; top: int [TOP], the cells where that is highest, first the highest."""
    rows, highest = found.cells.rows, float(active.max())
    shown, tasks = [], set()
    for place in top:
        task = found.cells.keys[rows.samples[place]][0]
        if task in tasks or len(shown) == SHOWN_GRIDS:
            continue
        tasks.add(task)
        same = rows.samples == rows.samples[place]
        same &= (rows.cells[:, :2] == rows.cells[place, :2]).all(axis=1)
        where = np.flatnonzero(same)
        cells = rows.cells[where]
        strength = as_grid(cells[:, 2:], active[where] / highest)
        role = CELL_ROLES[int(roles_of_cells(cells[:1])[0])]
        rings = [(int(r), int(c)) for r, c in cells[np.isin(where, top), 2:4]]
        grid = as_grid(cells[:, 2:], cells[:, 4]).tolist()
        drawn = colored(grid, cell=18, strength=strength, rings=rings)
        shown.append(figure(role, drawn))
    return shown


def contrast(found: Findings) -> str:
    title = "<h2>What differs between solved and failed tasks</h2>"
    if found.contrast is None:
        return f"{title}<p>Nothing to compare: all were solved, or all failed.</p>"
    values, chance = found.contrast.consistency, found.contrast.chance
    names = list(dict.fromkeys(name for name, _ in values))
    names.sort(key=lambda name: (name.rpartition(".")[0], int(name.rpartition(".")[2])))
    roles = [role for role in ROLES if any((name, role) in values for name in names)]
    top = max(values[place] / chance[place] for place in values)
    rows = ""
    for name in names:
        row = ""
        for role in roles:
            place = name, role
            if place not in values:
                row += "<td>-</td>"
            elif values[place] <= 1.001 * chance[place]:
                row += f'<td class="soft">{values[place]:.1f} / {chance[place]:.1f}</td>'
            else:
                fill = 0.4 + 0.6 * (values[place] / chance[place] - 1) / (top - 1)
                ink = "#ffffff" if fill < 0.7 else "#1d1f24"
                row += f'<td style="background:{shade(fill)};color:{ink}">'
                row += f"{values[place]:.1f} / {chance[place]:.1f}</td>"
        rows += f"<tr><td>{html.escape(name)}</td>{row}</tr>"
    header = "".join(f"<th>{html.escape(role)}</th>" for role in roles)
    apart = np.abs(np.diff(found.contrast.lengths)).mean()
    return (
        f"{title}<p>{len(found.contrast.pairs)} pairs of a failed and a solved sample, {apart:.0f} "
        "tokens apart in length on average. How consistently the mean states of the two differ, "
        "and what 95 of 100 random draws of the signs stay below; colored where it is more, which "
        "one in twenty is by chance. Pairs are alike in length alone: what differs may be the rule "
        "of their tasks.</p>"
        f'<div class="card scroll"><table><tr><th>activation</th>{header}</tr>{rows}</table></div>'
    )
