"""The page of a causal map: one points at a cell of the answer and sees what it hangs on.

Self-contained: the numbers are in the page, the pictures are made by the browser, nothing is
fetched. What comes from a dataset is escaped, or is a number.
"""

# L layers   S source cells   A cells of the answer

import base64
import html
import json
from typing import TYPE_CHECKING

import numpy as np

from examples import report
from examples.report import COLOR_CODES

if TYPE_CHECKING:
    from examples.causal_map import CausalMap

DONE = {
    "zero": "set to zero",
    "mean": "set to the mean over the puzzle's cells",
    "patch": "exchanged for those of the same cell in another task",
}
STYLE = """
:root { --mark: #d9480f; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0 0 6px; }
.columns { display: grid; grid-template-columns: minmax(220px, 320px) minmax(0, 1fr); gap: 16px; }
.answer { position: sticky; top: 8px; align-self: start; }
.grid { display: grid; gap: 1px; background: #8a8d94; border: 1px solid #8a8d94;
  width: max-content; max-width: 100%; }
.grid > * { width: var(--side); height: var(--side); max-width: 100%; aspect-ratio: 1; padding: 0;
  border: 0; border-radius: 0; }
.answer .grid { --side: clamp(14px, calc(260px / var(--cols)), 40px); }
.puzzle .grid { --side: clamp(11px, calc(230px / var(--cols)), 26px); }
.puzzle { display: flex; flex-wrap: wrap; gap: 14px 22px; }
.pair { max-width: 100%; flex-wrap: wrap; }
figure { margin: 0; max-width: 100%; }
button { cursor: pointer; } .grid button:focus { outline: none; }
.grid button[aria-pressed=true] { box-shadow: inset 0 0 0 2px #fff, 0 0 0 3px var(--mark);
  z-index: 1; position: relative; }
.grid .cause { position: relative; background: #eceef2; }
.grid .cause i { position: absolute; inset: 0; margin: auto; }
.grid .first { outline: 2px solid var(--mark); outline-offset: 0; z-index: 1; }
.grid .more i { border-radius: 50%; }
.grid .unasked { opacity: .25; }
label { display: block; font-weight: 600; margin-top: 14px; }
input[type=range] { width: 100%; accent-color: var(--mark); height: 28px; }
.bars b { height: 10px; background: #c9cdd6; border-radius: 2px; min-width: 1px; }
.bars .now { background: var(--mark); }
#said { min-height: 4.5em; font-size: .95rem; margin: 10px 0; }
@media (max-width: 720px) { .columns { grid-template-columns: minmax(0, 1fr); }
  .answer { position: static; } h1 { font-size: 1.2rem; } }
"""
SCRIPT = """
const map = JSON.parse(document.getElementById("map").textContent);
const L = map.layers.length, S = map.sources.length, A = map.targets.length;
const bytes = Uint8Array.from(atob(map.effect), c => c.charCodeAt(0));
const effect = new Float32Array(bytes.buffer);
const at = (l, s, a) => effect[(l * S + s) * A + a];
const slider = document.getElementById("layer"), said = document.getElementById("said");
const bars = document.getElementById("bars"), answer = document.getElementById("answer");
const buttons = [...answer.querySelectorAll("button")];
const causes = [...document.querySelectorAll("[data-source]")];
const place = s => { const [pair, role, row, col] = map.sources[s];
  return (pair < 0 ? "the test " : `pair ${pair + 1}'s `) + (role ? "output" : "input") +
    `, row ${row + 1}, column ${col + 1}`; };
const nats = x => x.toFixed(2).replace("-0.00", "0.00");
let chosen = 0, kept = 0;
function show() {
  const l = Number(slider.value);
  let first = 0, most = 1e-9;
  const falls = map.layers.map(() => 0);
  for (let s = 0; s < S; s++) {
    for (let k = 0; k < L; k++) falls[k] = Math.max(falls[k], -at(k, s, chosen));
    most = Math.max(most, Math.abs(at(l, s, chosen)));
    if (at(l, s, chosen) < at(l, first, chosen)) first = s;
  }
  for (const cell of causes) {
    const s = Number(cell.dataset.source), v = at(l, s, chosen), share = Math.abs(v) / most;
    const mark = cell.firstElementChild, side = 42 + 58 * share;
    mark.style.width = mark.style.height = side + "%";
    mark.style.opacity = 0.4 + 0.6 * share;
    cell.classList.toggle("first", s === first && v < 0);
    cell.classList.toggle("more", v > 0);
    cell.title = `${v > 0 ? "+" : ""}${v.toFixed(2)} nats: ${place(s)}`;
  }
  buttons.forEach((b, a) => { b.setAttribute("aria-pressed", a === chosen);
    b.tabIndex = a === chosen ? 0 : -1; });
  document.getElementById("number").textContent = map.layers[l];
  const [row, col] = map.targets[chosen], v = at(l, first, chosen);
  said.textContent = `Row ${row + 1}, column ${col + 1} of the answer: log p of its true color ` +
    `is ${nats(map.before[chosen])}. At layer ${map.layers[l]} ` + (v < 0 ?
    `it hangs most on ${place(first)}: with it changed, log p is ${nats(map.before[chosen] + v)}.`
    : `no change of a cell of the puzzle makes it less likely.`);
  const top = Math.max(...falls, 1e-9);
  bars.replaceChildren(...falls.flatMap((fall, k) => {
    const [name, bar, figure] = ["span", "b", "span"].map(tag => document.createElement(tag));
    name.textContent = `layer ${map.layers[k]}`; figure.textContent = fall.toFixed(2);
    bar.style.width = 100 * fall / top + "%"; if (k === l) bar.className = "now";
    return [name, bar, figure]; }));
}
buttons.forEach((button, a) => {
  button.addEventListener("mouseenter", () => { chosen = a; show(); });
  button.addEventListener("focus", () => { chosen = a; show(); });
  button.addEventListener("click", () => { chosen = kept = a; show(); });
});
answer.addEventListener("mouseleave", () => { chosen = kept; show(); });
answer.addEventListener("keydown", event => {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const step = steps[event.key];
  if (!step) return;
  event.preventDefault();
  const [row, col] = map.targets[chosen];
  const next = map.targets.findIndex(([r, c]) => r === row + step[0] && c === col + step[1]);
  if (next >= 0) { kept = next; buttons[next].focus(); }
});
slider.addEventListener("input", show);
show();
"""


def page(found: "CausalMap", op: str) -> bytes:
    """The HTML of a map whose states were changed by `op`."""
    effect = np.nan_to_num(found.effect).astype("<f4")
    content = {
        "layers": found.layers,
        "sources": found.sources.tolist(),
        "targets": found.targets.tolist(),
        "before": np.round(np.nan_to_num(found.before), 4).tolist(),
        "effect": base64.b64encode(effect.tobytes()).decode(),
    }
    task = str(found.sample.original.task_id)
    return report.page(
        f"What the answer to {task} hangs on",
        f"<h1>What the answer to {html.escape(task)} hangs on</h1>"
        "<p>Point at a cell of the answer, or step through them with the arrow keys. The puzzle "
        "then shows how much less likely the cell's true color becomes when the model's hidden "
        f"states ({found.hook_point}) of one cell of the puzzle are {DONE[op]}: the larger and "
        "fuller a mark, the more the answer hangs on that cell at this layer. Round marks are "
        "cells whose change makes it more likely; the strongest cause has a frame.</p>"
        f'<div class="columns"><section class="card answer"><h2>The answer</h2>{_answer(found)}'
        f'<div id="said" aria-live="polite"></div>{_slider(found)}'
        '<p class="soft">How far the strongest cause of this cell lowers log p, in nats:</p>'
        '<div class="bars" id="bars"></div></section>'
        f'<section class="card"><h2>The puzzle</h2><div class="puzzle">{_puzzle(found)}</div>'
        "</section></div>",
        f'<style>{STYLE}</style><script type="application/json" id="map">{json.dumps(content)}'
        f"</script><script>{SCRIPT}</script>",
    )


def _answer(found: "CausalMap") -> str:
    grid = found.sample.task.test[found.sample.sample_idx].output
    cells = [
        f'<button style="background:{COLOR_CODES[color]}" '
        f'aria-label="row {row + 1}, column {col + 1}" aria-pressed="false"></button>'
        for row, line in enumerate(grid)
        for col, color in enumerate(line)
    ]
    return _grid(cells, len(grid[0]), ' id="answer"')


def _puzzle(found: "CausalMap") -> str:
    """Every grid of the prompt, the test input first; a cell that was changed has the number of
    its source."""
    task, sample = found.sample.task, found.sample
    numbers = {tuple(place): i for i, place in enumerate(found.sources.tolist())}
    pairs = list(enumerate(task.train[len(task.train) - sample.num_train_pairs :]))
    parts = []
    for number, pair in [(-1, task.test[sample.sample_idx]), *pairs]:
        name = f"pair {number + 1}" if number >= 0 else "test input"
        sides = [(0, pair.input), *([(1, pair.output)] if number >= 0 else [])]
        drawn = "".join(
            _grid(
                [
                    _cell(color, numbers.get((number, role, row, col)))
                    for row, line in enumerate(grid)
                    for col, color in enumerate(line)
                ],
                len(grid[0]),
            )
            for role, grid in sides
        )
        parts.append(
            f'<figure><figcaption>{name}</figcaption><div class="pair">{drawn}</div></figure>'
        )
    return "".join(parts)


def _cell(color: int, source: int | None) -> str:
    code = COLOR_CODES[color]
    if source is None:
        return f'<div class="unasked" style="background:{code}"></div>'
    return f'<div class="cause" data-source="{source}"><i style="background:{code}"></i></div>'


def _grid(cells: list[str], columns: int, more: str = "") -> str:
    style = f"--cols:{columns};grid-template-columns:repeat({columns},minmax(0,max-content))"
    return f'<div class="grid"{more} style="{style}">{"".join(cells)}</div>'


def _slider(found: "CausalMap") -> str:
    last = len(found.layers) - 1
    return (
        '<label for="layer">Layer <span id="number"></span></label>'
        f'<input type="range" id="layer" min="0" max="{last}" value="0" step="1">'
    )
