"""Options that are declared once: the flags that are made of them, and back."""

from dataclasses import dataclass, fields

import pytest

import distributed_inference_with_activations as distributed
import simple_extraction_inference as simple
from utils.cli import Parser, add_flags, int_at_least, option
from utils.plan.request import Request

REQUIRED = ["--model_path", "M", "--dataset_path", "D"]


@dataclass(frozen=True)
class Options:
    source: str = option("input", "what is read", required=True)
    count: int | None = option("input", "things a pass{unit}", unset="all", type=int_at_least(1))
    kind: str = option("other", "of things", default="a", choices=("a", "b"))
    quick: bool = option("input", "at once", default=False)
    plain: int = 3  # no flag


def parser_of(*args):
    parser = Parser("A test.")
    add_flags(parser, Options, *args)
    return parser


def test_flags_of_a_group():
    parser = parser_of("input", {}, " and device")
    assert vars(parser.parse_args(["--source", "x", "--count", "2", "--quick"])) == {
        **{"verbose": False, "source": "x", "count": 2, "quick": True},
    }
    words = " ".join(parser.format_help().split())
    assert "things a pass and device (default: all)" in words and "--quick at once" in words
    with pytest.raises(SystemExit):
        parser.parse_args([])


def test_what_differs_in_a_script():
    changed = {"count": {"flag": "--number", "default": 5}}
    parser = parser_of("input", changed)
    assert parser.parse_args(["--source", "x"]).count == 5
    assert parser.parse_args(["--source", "x", "--number", "7"]).count == 7
    words = " ".join(parser.format_help().split())
    assert "things a pass (default: 5)" in words and "--count" not in words


def test_one_flag_of_a_group():
    assert vars(parser_of("count").parse_args(["--count", "7"])) == {"verbose": False, "count": 7}


@pytest.mark.parametrize(
    ("script", "absent"),
    [(simple, {"mesh_shape", "shard_id", "num_shards"}), (distributed, set())],
)
def test_every_option_has_one_flag(script, absent):
    actions = [action.dest for action in script.build_parser()._actions]
    options = {entry.name for entry in fields(Request) if "group" in entry.metadata}
    others = {entry.name for entry in fields(Request)} - options
    assert others == {"task_ids", "distributed", "arguments"}
    for name in options:
        assert actions.count(name) == (name not in absent), name


def test_defaults_are_those_of_the_request():
    """But for what a script says: how many samples a batch and a shard have."""
    alone = Request.from_flags(simple.build_parser().parse_args(REQUIRED))
    pod = Request.from_flags(distributed.build_parser().parse_args(REQUIRED))
    plain = Request("M", "D")
    for entry in fields(Request):
        if entry.name != "arguments":
            assert getattr(alone, entry.name) == getattr(plain, entry.name), entry.name
    assert (pod.batch_size, pod.save_every_n_samples, pod.distributed) == (8, None, True)
    assert (pod.output_path, pod.activations_dir) == ("results/submission.json", None)
    assert pod.output_flag == "--output_filepath" and alone.output_flag == "--output_path"
