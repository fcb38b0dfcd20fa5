"""The rotary embedding's configuration, in the forms of transformers 4 and 5. Computes nothing."""

import math
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_LENGTH = "original_max_position_embeddings"
# The fields of a `config.json` that are about the rotary embedding.
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", _LENGTH)
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


def parse_ropes(fields: dict[str, Any]) -> tuple[Rope, Rope | None, list[str]]:
    """Of layers that see all tokens, and of those with a window where theirs is another (Gemma 3);
    and what stands within the rope parameters that their rope type does not read.

    Raises UserError naming the field.
    """
    if "rope_local_base_freq" not in fields:
        rope, unread = _parse_rope(fields)
        return rope, None, unread
    (full, unread), (sliding, more) = map(_parse_rope, _by_layer_type(fields))
    return full, sliding, unread + more


def _by_layer_type(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields as the two kinds of layers of Gemma 3 have them, in one form."""
    both, scaling = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    if not isinstance(both, dict) or not isinstance(scaling, dict):
        raise UserError("rope_parameters and rope_scaling must each be an object or null")
    apart = {**fields, "rope_theta": None, "rope_scaling": None}
    kinds = []
    for layers, more, theta in (
        ("full_attention", scaling, fields["rope_theta"]),
        ("sliding_attention", {}, fields["rope_local_base_freq"]),
    ):
        given = {**(both.get(layers) or {}), **more}
        kinds.append({**apart, "rope_parameters": {"rope_theta": theta, **given}})
    return kinds[0], kinds[1]


def _parse_rope(fields: dict[str, Any]) -> tuple[Rope, list[str]]:
    """From the fields of a `config.json`: `rope_theta` and `rope_scaling`, or `rope_parameters`."""
    kind, theta, given = _stated(fields)
    if kind not in ROPE_TYPES:
        raise UserError(f"rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    for factor in (fields.get("partial_rotary_factor"), given.get("partial_rotary_factor")):
        if factor not in (None, 1):
            raise UserError("partial_rotary_factor is not supported: all of a head is rotated")
    known = _REQUIRED[kind] | _OPTIONAL.get(kind, set())
    scaling = {name: value for name, value in given.items() if name in known}
    unread = given.keys() - known - {_LENGTH, "partial_rotary_factor"}
    if _LENGTH in _REQUIRED[kind]:
        # transformers lets the field outside of the rope parameters win, and falls back on the
        # model's length
        outside, length = fields.get(_LENGTH), scaling.get(_LENGTH)
        scaling[_LENGTH] = outside or length or fields.get("max_position_embeddings")
    if missing := sorted(_REQUIRED[kind] - scaling.keys()):
        raise UserError(f"rope_type {kind} needs {', '.join(missing)}")
    for name, value in scaling.items():
        if name == "truncate" and not isinstance(value, bool):
            raise UserError(f"rope field truncate must be true or false, not {value!r}")
        if name != "truncate" and not _is_positive(value):
            raise UserError(f"rope field {name} must be a positive number, not {value!r}")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError("rope field low_freq_factor must be below high_freq_factor")
    if kind == "yarn" and theta <= 1:
        raise UserError(f"rope_theta must be above 1 for rope_type yarn, not {theta}")
    mscale, mscale_all_dim = scaling.pop("mscale", None), scaling.pop("mscale_all_dim", None)
    if kind == "yarn" and "attention_factor" not in scaling:
        factor = scaling["factor"]
        scaling["attention_factor"] = (
            _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
            if mscale and mscale_all_dim
            else _yarn_mscale(factor, 1.0)
        )
    return Rope(theta, kind, **scaling), [f"{name} of rope_type {kind}" for name in sorted(unread)]


def _stated(fields: dict[str, Any]) -> tuple[Any, float, dict[str, Any]]:
    """The type, the base and the other parameters, in whichever form they are there; both forms may
    be, if they say the same."""
    thetas, forms = [fields.get("rope_theta")], []
    for name in ("rope_parameters", "rope_scaling"):
        form = fields.get(name) or {}
        if not isinstance(form, dict):
            raise UserError(f"{name} must be an object or null, not {form!r}")
        if any(isinstance(value, dict) for value in form.values()):
            raise UserError(f"{name} per layer type are not supported")
        form = {key: value for key, value in form.items() if value is not None}
        thetas.append(form.pop("rope_theta", None))
        kinds = [form.pop(key) for key in ("rope_type", "type") if key in form]
        if form or kinds:
            kind = kinds[0] if kinds and kinds[0] == kinds[-1] else kinds or "default"
            forms.append((kind, form))
    if forms[1:] and forms[0] != forms[1]:
        raise UserError("rope_parameters and rope_scaling are both there and differ: remove one")
    thetas = [theta for theta in thetas if theta is not None]
    for theta in thetas:
        if not _is_positive(theta):
            raise UserError(f"rope_theta must be a positive number, not {theta!r}")
    if len(set(thetas)) != 1:
        what = f"has two values, {sorted(set(thetas))}" if thetas else "is missing"
        raise UserError(
            f"rope_theta {what}; add to config.json the one value that the model was trained with"
        )
    kind, parameters = forms[0] if forms else ("default", {})
    return kind, float(thetas[0]), parameters


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def _yarn_mscale(factor: float, mscale: float) -> float:
    """Length-dependent attention temperature (Peng et al. 2023, YaRN, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
