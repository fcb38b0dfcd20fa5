"""The rotary embedding's configuration, in the forms of transformers 4 and 5. Computes nothing."""

import math
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_LENGTH = "original_max_position_embeddings"
_REQUIRED = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _LENGTH},
    "yarn": {"factor", _LENGTH},
}
_OPTIONAL = {
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base wavelength `theta` (positions), and the scaling of its `type`."""

    theta: float
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin (yarn)
    truncate: bool = True


def parse_ropes(fields: dict[str, Any]) -> tuple[Rope, Rope | None]:
    """Of layers that see all tokens, and of those with a window where theirs is another (Gemma 3).

    Raises UserError naming the field.
    """
    if fields["model_type"] != "gemma3_text":
        return parse_rope(fields), None
    both, scaling = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    rest = {name: value for name, value in fields.items() if not name.startswith("rope_")}
    ropes = []
    for layers, more, theta, of_class in (
        ("full_attention", scaling, "rope_theta", 1e6),
        ("sliding_attention", {}, "rope_local_base_freq", 1e4),
    ):
        parameters = {"rope_type": "default", **(both.get(layers) or {}), **more}
        if parameters.get("rope_theta") is None:
            given = fields.get(theta)
            parameters["rope_theta"] = of_class if given is None else given
        ropes.append(parse_rope({**rest, "rope_parameters": parameters}))
    return ropes[0], ropes[1]


def parse_rope(fields: dict[str, Any]) -> Rope:
    """From the fields of a `config.json`: `rope_theta` and `rope_scaling`, or `rope_parameters`.

    Raises UserError naming the field.
    """
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{name} must be an object or null, not {value!r}")
    if new and old and new != old:
        raise UserError("rope_parameters and rope_scaling are both there and differ")
    scaling = dict(new or old or {})
    if any(isinstance(value, dict) for value in scaling.values()):
        raise UserError("rope_parameters per layer type are not supported")
    thetas = [scaling.pop("rope_theta", None), fields.get("rope_theta")]
    for value in thetas:
        if value is not None and not _is_positive(value):
            raise UserError(f"rope_theta must be a positive number, not {value!r}")
    thetas = set(thetas) - {None}
    if len(thetas) != 1:
        what = "is missing" if not thetas else f"has two values, {sorted(thetas)}"
        raise UserError(
            f"rope_theta {what}; add to config.json the one value that the model was trained with"
        )
    kinds = [scaling.pop(name, None) for name in ("rope_type", "type")]
    kinds = [kind for kind in kinds if kind is not None] or ["default"]
    kind = kinds[0] if all(other == kinds[0] for other in kinds) else kinds
    if kind not in ROPE_TYPES:
        raise UserError(f"rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    if scaling.get("partial_rotary_factor") in (1, 1.0):
        del scaling["partial_rotary_factor"]
    scaling = {name: value for name, value in scaling.items() if value is not None}
    if kind in ("llama3", "yarn"):
        # transformers lets the field outside of the rope parameters win, and falls back on the
        # model's length
        outside, length = fields.get(_LENGTH), scaling.get(_LENGTH)
        scaling[_LENGTH] = outside or length or fields.get("max_position_embeddings")
    if kind == "default":  # a leftover that the default type does not read
        scaling.pop(_LENGTH, None)
    if unknown := sorted(scaling.keys() - _REQUIRED[kind] - _OPTIONAL.get(kind, set())):
        raise UserError(f"rope field {', '.join(unknown)} is not known for rope_type {kind}")
    if missing := sorted(_REQUIRED[kind] - scaling.keys()):
        raise UserError(f"rope_type {kind} needs {', '.join(missing)}")
    for name, value in scaling.items():
        if not isinstance(value, bool) if name == "truncate" else not _is_positive(value):
            raise UserError(f"rope field {name} must be a positive number, not {value!r}")
    mscale, mscale_all_dim = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)
    if kind == "yarn" and "attention_factor" not in scaling:
        factor = scaling["factor"]
        scaling["attention_factor"] = (
            _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
            if mscale and mscale_all_dim
            else _yarn_mscale(factor, 1.0)
        )
    return Rope(theta=float(thetas.pop()), type=kind, **scaling)


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def _yarn_mscale(factor: float, mscale: float) -> float:
    """Length-dependent attention temperature (Peng et al. 2023, YaRN, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
