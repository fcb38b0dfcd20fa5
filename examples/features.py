"""What the latents of a sparse autoencoder stand for on ARC grids, found by a rule.

For every latent, the cells where it is most active are compared with all cells: the color, the
role of their grid and their position in it. A latent is named by one of these if at least `PURITY`
of its top cells share it: that says what it is most active on, and `precision` and `recall` how far
the name holds beyond.
"""

# N cells   F latents   A attributes

from dataclasses import dataclass

import numpy as np

from utils.dataset.contrast import CELL_ROLES, roles_of_cells
from utils.dataset.shuffle import ActivationRows
from utils.errors import UserError
from utils.model.autoencoder import Autoencoder
from utils.prompt.encodings import COLORS

TOP = 100  # cells that speak for a latent
PURITY = 0.9
TASKS = 5  # that they come from at least
LIFT = 2.0  # times as common among the top cells as among all


@dataclass(frozen=True)
class Attribute:
    """kind: "color", "role" or "position"; label: in words; mask: bool [N], the cells that have
    it."""

    kind: str
    label: str
    mask: np.ndarray

    @property
    def base(self) -> float:
        return float(self.mask.mean())


@dataclass(frozen=True)
class Feature:
    """latent: its number. top: int [TOP], places of the cells where it is most active, first the
    most; activations: float32 [N], of all cells. share: of the top cells that have the attribute,
    base: of all cells. precision: of the cells where the latent is active at all that have it;
    recall: of the cells that have it where the latent is active."""

    latent: int
    attribute: Attribute
    share: float
    top: np.ndarray
    activations: np.ndarray

    @property
    def precision(self) -> float:
        return float(self.attribute.mask[self.activations > 0].mean())

    @property
    def recall(self) -> float:
        return float((self.activations[self.attribute.mask] > 0).mean())

    @property
    def base(self) -> float:
        return self.attribute.base

    def __str__(self) -> str:
        return (
            f"latent {self.latent}: {self.share:.0%} of its top {len(self.top)} cells are "
            f"{self.attribute.label} (of all cells {self.base:.0%})"
        )


def attributes(cells: np.ndarray, shapes: np.ndarray) -> list[Attribute]:
    """What can be said of a cell. cells: int [N, 5], as of `ActivationRows`; shapes: int [N, 2], of
    its grid."""
    row, col, color = cells[:, 2], cells[:, 3], cells[:, 4]
    roles = roles_of_cells(cells)
    found = [Attribute("color", name.lower(), color == i) for i, name in enumerate(COLORS)]
    found += [Attribute("role", f"in the {r}", roles == i) for i, r in enumerate(CELL_ROLES)]
    found.append(Attribute("role", "in an output or the answer", cells[:, 1] == 1))
    ends = shapes - 1
    found += [Attribute("position", f"in row {i + 1}", row == i) for i in range(6)]
    found += [Attribute("position", f"in column {i + 1}", col == i) for i in range(6)]
    found += [
        Attribute("position", "in the last row", row == ends[:, 0]),
        Attribute("position", "in the last column", col == ends[:, 1]),
    ]
    return [attribute for attribute in found if attribute.mask.any()]


def shapes_of(rows: ActivationRows) -> np.ndarray:
    """int [N, 2]: rows and columns of the grid of each cell."""
    grid = np.stack([rows.samples, rows.cells[:, 0], rows.cells[:, 1]], axis=1)
    _, which = np.unique(grid, axis=0, return_inverse=True)
    which = which.reshape(-1)
    sizes = np.zeros((which.max() + 1, 2), np.int64)
    np.maximum.at(sizes, which, rows.cells[:, 2:4] + 1)
    return sizes[which]


def find_features(sae: Autoencoder, rows: ActivationRows, most: int = 8) -> list[Feature]:
    """The purest features, those whose attribute is rarest among all cells first, each attribute
    once, kinds in turn.

    rows: of cells alone, one row a cell. A latent that is active on fewer than TOP cells, or whose
    top cells come from fewer than TASKS samples or share no attribute with PURITY and LIFT, is
    none. Raises UserError for rows that are not one a cell.
    """
    if len(np.unique(np.column_stack([rows.samples, rows.cells[:, :4]]), axis=0)) < len(rows):
        raise UserError("several tokens hold one cell: take a --grid_encoding of one token a cell")
    states = [sae.encode(rows.activations[i : i + 4096]) for i in range(0, len(rows), 4096)]
    latents = np.concatenate(states)  # [N, F]
    known = attributes(rows.cells, shapes_of(rows))
    masks = np.stack([attribute.mask for attribute in known], axis=1)  # [N, A]
    bases = masks.mean(axis=0)
    found: dict[str, list[Feature]] = {"color": [], "role": [], "position": []}
    for latent in np.flatnonzero((latents > 0).sum(axis=0) >= TOP):
        active = latents[:, latent]
        top = np.argsort(-active, kind="stable")[:TOP]
        if len(np.unique(rows.samples[top])) < TASKS:
            continue
        shares = masks[top].mean(axis=0)
        fits = (shares >= PURITY) & (shares >= LIFT * bases)
        if not fits.any():
            continue
        best = int(np.argmax(np.where(fits, shares / bases, 0)))
        feature = Feature(int(latent), known[best], float(shares[best]), top, active)
        found[known[best].kind].append(feature)
    chosen: list[Feature] = []
    queues = []
    for features in found.values():
        features.sort(key=lambda f: (-f.share / f.base, f.latent))
        seen: dict[str, Feature] = {}
        for feature in features:
            seen.setdefault(feature.attribute.label, feature)
        queues.append(list(seen.values()))
    while len(chosen) < most and any(queues):
        chosen += [queue.pop(0) for queue in queues if queue]
    return chosen[:most]
