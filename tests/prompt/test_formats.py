"""Prompt formats without a model: text, spans, parsing, templates, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers_for_tests as small
from hypothesis import given
from hypothesis import strategies as st
from strategies import FREE_FORMATS, SMALL_TASK, check_spans, grids, tasks

from utils.arc.tasks import Pair, Task
from utils.errors import UserError
from utils.prompt.encodings import COLORS
from utils.prompt.formats import GRID_ENCODINGS, load_format
from utils.prompt.known import KNOWN

LEADS = {  # what comes right before a train pair's input and output
    "chat": ("Input:\n", "Output:\n"),
    "turns": ("user\n", "assistant\n"),
    "compact": ("I", "\n+/-=O"),
    "plain": ("\nInput {}:\n", "\nOutput {}:\n"),
}


@pytest.fixture(scope="module")
def chatml():
    return small.character_tokenizer()


@pytest.fixture(scope="module")
def formats(chatml):
    return {(f, e): load_format(f, e, chatml) for f in FREE_FORMATS for e in GRID_ENCODINGS}


@pytest.mark.parametrize("encoding", GRID_ENCODINGS)
@pytest.mark.parametrize("name", FREE_FORMATS)
def test_every_cell_of_a_random_task_has_its_span(formats, name, encoding):
    fmt = formats[name, encoding]

    @given(tasks(), st.integers(1, 5))
    def check(task, num_train_pairs):
        prompt = fmt.render(task, 0, num_train_pairs)
        end, kept = 0, task.train[-num_train_pairs:]
        for k, pair in enumerate(kept):
            for role, grid in enumerate((pair.input, pair.output)):
                lead = LEADS[name][role].format(k + 1)
                end = check_spans(prompt.text, prompt.cells, grid, k, role, encoding, end, lead)
        lead = LEADS[name][0].format(len(kept) + 1)
        check_spans(prompt.text, prompt.cells, task.test[0].input, -1, 0, encoding, end, lead)
        sides = [grid for pair in kept for grid in (pair.input, pair.output)]
        sides.append(task.test[0].input)
        assert len(prompt.cells) == sum(len(grid) * len(grid[0]) for grid in sides)
        assert prompt.cells.dtype == np.int32

    check()


@pytest.mark.parametrize("encoding", GRID_ENCODINGS)
@pytest.mark.parametrize("name", FREE_FORMATS)
def test_an_answer_parses_to_the_grid_it_was_made_of(formats, name, encoding):
    fmt = formats[name, encoding]

    @given(grids(), st.sampled_from(["", "\n", "  \n", fmt.end_of_turn, "\n\nThat is all."]))
    def check(grid, after):
        answer = fmt.render_answer(grid)
        check_spans(answer.text, answer.cells, grid, -1, 1, encoding)
        parsed = fmt.parse(answer.text + after)
        assert (parsed.grid, parsed.reason) == (grid, None)
        np.testing.assert_array_equal(parsed.cells, answer.cells)
        moved = fmt.parse("\n " + answer.text)
        assert moved.grid == grid
        np.testing.assert_array_equal(moved.cells[:, 5:], answer.cells[:, 5:] + 2)

    check()


def test_compact_text(chatml):
    fmt = load_format("compact", None, chatml)
    expected = "I12\n34\n+/-=O56\n78\n<|im_end|>I09\n90\n+/-=O"
    assert fmt.render(SMALL_TASK, 0).text == expected
    assert fmt.render_answer([[1, 2]]).text == "12\n"


def test_turns_text(chatml):
    assert load_format("turns", "digits", chatml).render(SMALL_TASK, 0).text == (
        "<|im_start|>user\n12\n34<|im_end|>\n<|im_start|>assistant\n56\n78<|im_end|>\n"
        "<|im_start|>user\n09\n90<|im_end|>\n<|im_start|>assistant\n"
    )


def test_numbered_text(chatml):
    fence = "```grid shape: 2x2\n1 12\n2 34\n```"
    fmt = load_format("turns", "numbered", chatml)
    assert fmt.render(SMALL_TASK, 0).text.startswith(f"<|im_start|>user\n{fence}<|im_end|>")
    assert fmt.render_answer([[1, 2], [3, 4]]).text == fence


# What the public code that trained the models makes of SMALL_TASK (run once, and copied).
KNOWN_TEXTS = {
    "nvarc": "<|im_start|>user\n12\n34<|im_end|><|im_start|>assistant\n56\n78<|im_end|>"
    "<|im_start|>user\n09\n90<|im_end|><|im_start|>assistant\n",
    "architects": "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghjklmnpqrstuvwxyz"
    "I12\n34\n+/-=O56\n78\n<|im_end|>I09\n90\n+/-=O",
    "arc24": """<|im_start|>system
You are a helpful assistant.<|im_end|>
<|im_start|>user
Let's see if you can solve this simple Abstraction and Reasoning Challenge (ARC) task.
Below there are some input-output grid examples that define the task.
Your job is to understand the transformation between the input and the output and apply it to the \
test input grid.
The transformations are always based on the following priors: objectness, goal-directed, numbers & \
counting, and basic geometry & topology.

## Example 1

### Input

```grid shape: 2x2
1 12
2 34
```

### Output

```grid shape: 2x2
1 56
2 78
```

## Test case

### Input

```grid shape: 2x2
1 09
2 90
```<|im_end|>
<|im_start|>assistant
### Output

```grid""",
}
KNOWN_ANSWERS = {  # to [[1, 2], [3, 4]], through the end of turn
    "nvarc": "12\n34<|im_end|>",
    "architects": "12\n34\n<|im_end|>",
    "arc24": " shape: 2x2\n1 12\n2 34\n```<|im_end|>",
}


@pytest.mark.parametrize("name", KNOWN)
def test_prompts_of_known_models(name, chatml):
    fmt = load_format(name, None, chatml)
    prompt, answer = fmt.render(SMALL_TASK, 0), fmt.render_answer([[1, 2], [3, 4]])
    assert prompt.text == KNOWN_TEXTS[name]
    end = check_spans(prompt.text, prompt.cells, [[1, 2], [3, 4]], 0, 0, fmt.encoding)
    check_spans(prompt.text, prompt.cells, [[5, 6], [7, 8]], 0, 1, fmt.encoding, end)
    assert answer.text + fmt.end_of_turn == KNOWN_ANSWERS[name]
    parsed = fmt.parse(KNOWN_ANSWERS[name])
    assert parsed.grid == [[1, 2], [3, 4]]
    np.testing.assert_array_equal(parsed.cells, answer.cells)
    other = "words" if fmt.encoding == "digits" else "digits"
    with pytest.raises(UserError, match=f"{name} writes grids as {fmt.encoding}, not as {other}"):
        load_format(name, other, chatml)


def test_dropped_pairs_are_the_first_ones(chatml):
    train = tuple(Pair([[k]], [[k]]) for k in range(5))
    fmt = load_format("compact", "digits", chatml)
    prompt = fmt.render(Task("t", train, (Pair([[9]], None), Pair([[8]], None))), 1, 2)
    assert prompt.text == "I3\n+/-=O3\n<|im_end|>I4\n+/-=O4\n<|im_end|>I8\n+/-=O"
    assert prompt.cells.tolist() == [
        [0, 0, 0, 0, 3, 1, 2],
        [0, 1, 0, 0, 3, 8, 9],
        [1, 0, 0, 0, 4, 21, 22],
        [1, 1, 0, 0, 4, 28, 29],
        [-1, 0, 0, 0, 8, 41, 42],
    ]


@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("digits", "", "empty answer"),
        ("digits", " \n ", "empty answer"),
        ("digits", "<|im_end|>12", "empty answer"),
        ("digits", "I cannot tell.", "no grid in the answer"),
        ("digits", "12\n3", "row lengths differ"),
        ("digits", "12\n3a", "cell is not a digit"),
        ("digits", "1a\n34", "cell is not a digit"),
        ("digits", "1 2\n3 4", "cell is not a digit"),
        ("digits", "1٢", "cell is not a digit"),
        ("digits", "12\n\n34", "blank line inside the grid"),
        ("digits", "1" * 31, "larger than 30x30"),
        ("digits", "1" * 9999, "larger than 30x30"),
        ("digits", "\n".join("1" * 31), "larger than 30x30"),
        ("digits", "<think>\n12\n34", "reasoning without an end"),
        ("digits", "```\n12\n34\n```", [[1, 2], [3, 4]]),
        ("digits", "Output:\n\n12\r\n34\r\n\nThe 2 rows turn.", [[1, 2], [3, 4]]),
        ("digits", "Each of the 3 rows moves.\n\n12\n34\nDone", [[1, 2], [3, 4]]),
        ("digits", "12\n34\n\nInput 3:\n55\n55", [[1, 2], [3, 4]]),
        ("digits", "<think>\n99\n</think>\n\n12\n34", [[1, 2], [3, 4]]),
        ("digits", "<think>\n9\n</think>\n88\n</think>\n\n12\n34", [[1, 2], [3, 4]]),
        ("digits", "1" * 30, [[1] * 30]),
        ("spaced", "1 2\n3  4 ", [[1, 2], [3, 4]]),
        ("spaced", "1 2\n34", "cell is not a digit"),
        ("spaced", "1 2\n3", "row lengths differ"),
        ("words", "black Blue\nGrey BROWN", [[0, 1], [5, 9]]),
        ("words", "Black Blu", "cell is not a color"),
        ("words", "BlackBlue", "no grid in the answer"),
        ("words", "Black, Blue", "cell is not a color"),
        ("words", "Black Blue\nRed", "row lengths differ"),
        ("numbered", "```grid shape: 1x2\n1 12\n```", [[1, 2]]),
        ("numbered", "So:\n```grid shape: 1x2\n1 12\n```\nand 3 more", [[1, 2]]),
        ("numbered", "12\n34", "no opening fence"),
        ("numbered", "```grid shape: 1x2\n1 12", "no closing fence"),
        ("numbered", "```grid shape: 2x2\n1 12\n```", "shape differs from the rows"),
        ("numbered", "```grid shape: 2\n1 12\n```", "shape differs from the rows"),
        ("numbered", "```grid shape: 2x2\n1 12\n3 34\n```", "wrong row number"),
        ("numbered", "```grid shape: 2x2\n1 12\n34\n```", "wrong row number"),
        ("numbered", "```grid shape: 2x2\n1 12\n2 3x\n```", "cell is not a digit"),
        ("numbered", "```grid shape: 2x2\n1 12\n2 345\n```", "row lengths differ"),
        ("numbered", "```grid shape: 0x0\n```", "no row in the fence"),
        ("numbered", f"```grid shape: 1x31\n1 {'1' * 31}\n```", "larger than 30x30"),
        ("numbered", f"```grid shape: 1x1\n{'1' * 9999} 1\n```", "wrong row number"),
    ],
)
def test_parse(formats, encoding, text, expected):
    answer = formats["chat", encoding].parse(text)
    if isinstance(expected, str):
        assert (answer.grid, answer.reason, answer.cells.shape) == (None, expected, (0, 7))
    else:
        assert (answer.grid, answer.reason) == (expected, None)
        glyphs = [text[a:b].lower() for a, b in answer.cells[:, 5:]]
        colors = [c for row in expected for c in row]
        words = [COLORS[c].lower().replace("gray", "grey") for c in colors]
        assert glyphs == (words if encoding == "words" else [str(c) for c in colors])


def test_a_blank_line_before_the_grid_ends_no_answer(formats):
    """Though `plain` ends one with it."""
    assert formats["plain", "digits"].parse("The output:\n\n12\n34").grid == [[1, 2], [3, 4]]


@given(st.text(alphabet="0123 \n`gridshape:x-<>BlackRed"), st.sampled_from(GRID_ENCODINGS))
def test_any_text_is_a_grid_or_a_reason(formats, text, encoding):
    answer = formats["compact", encoding].parse(text)
    assert (answer.grid is None) != (answer.reason is None)
    assert len(answer.cells) == sum(map(len, answer.grid or []))


def test_a_template_may_trim_and_date_what_it_gets():
    fmt = load_format("turns", "spaced", small.merging_tokenizer())
    prompt = fmt.render(SMALL_TASK, 0)
    assert "Today Date: 26 Jul 2024\n" in prompt.text
    end = check_spans(prompt.text, prompt.cells, [[1, 2], [3, 4]], 0, 0, "spaced")
    check_spans(prompt.text, prompt.cells, [[5, 6], [7, 8]], 0, 1, "spaced", end)
    assert prompt.text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert fmt.end_of_turn == "<|eot_id|>"


def test_an_answer_goes_where_the_chat_template_puts_it():
    tokenizer = small.sentencepiece_tokenizer()
    fmt = load_format("turns", "digits", tokenizer)
    answer = fmt.render_answer([[1, 2]])
    turns = [("user", "12\n34"), ("assistant", "56\n78"), ("user", "09\n90"), ("assistant", "12")]
    messages = [{"role": role, "content": content} for role, content in turns]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == fmt.render(SMALL_TASK, 0).text + answer.text + fmt.end_of_turn
    assert (answer.text, answer.cells[:, 5].tolist()) == (" 12", [1, 2])


def test_reasoning_is_switched_off(chatml):
    tokenizer = small.character_tokenizer()
    tokenizer.chat_template += (
        "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% endif %}"
    )
    prompt = load_format("chat", None, tokenizer).render(SMALL_TASK, 0)
    assert prompt.text.endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("opened", ["<think>\n", "<think>", "<think>\nOkay"])
@pytest.mark.parametrize("name", ["chat", "turns"])
def test_reasoning_that_the_prompt_opens(name, opened):
    """As the templates of R1-Distill, QwQ and Qwen3-Thinking do."""
    tokenizer = small.character_tokenizer()
    tokenizer.chat_template += f"{{% if add_generation_prompt %}}{opened}{{% endif %}}"
    fmt = load_format(name, None, tokenizer)
    prompt = fmt.render(SMALL_TASK, 0).text
    assert prompt.endswith(f"assistant\n{opened}")
    cut_off = fmt.parse("The first input is\n12\n34\nso")
    assert (cut_off.grid, cut_off.reason) == (None, "reasoning without an end")
    assert len(cut_off.cells) == 0
    assert fmt.parse("It says\n99\n</think>\n\n12\n34").grid == [[1, 2], [3, 4]]
    answer = fmt.render_answer([[1, 2]])
    assert (prompt + answer.text).endswith(f"{opened.rstrip()}\n\n</think>\n\n12")
    found = fmt.parse(answer.text + fmt.end_of_turn)
    assert found.grid == [[1, 2]]
    np.testing.assert_array_equal(found.cells, answer.cells)


@pytest.mark.parametrize("name", ["compact", "plain"])
def test_a_format_without_the_chat_template_opens_no_reasoning(name):
    tokenizer = small.character_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    fmt = load_format(name, None, tokenizer)
    assert not fmt.thinking and fmt.parse("12\n").grid == [[1, 2]]


def test_a_jinja_file_may_open_or_close_the_reasoning(jinja):
    tokenizer = small.character_tokenizer()
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    pairs = "{% for p in train %}{{ p.input }}={{ p.output }};{% endfor %}{{ test_input }}"
    text = f"{{% set text %}}Do not say <think>. {pairs}{{% endset %}}"
    text += "{{ chat([{'role': 'user', 'content': text}]) }}"
    assert load_format(jinja(text), None, tokenizer).thinking
    closed = load_format(jinja(text + "\n</think>\n\n"), None, tokenizer)
    assert not closed.thinking and closed.render_answer([[1]]).text == "1"
    assert not load_format(jinja(text), None, small.character_tokenizer()).thinking
    assert load_format(jinja(pairs + "<think>"), None, small.character_tokenizer()).thinking


@pytest.fixture
def jinja(tmp_path):
    def write(text):
        path = tmp_path / "format.jinja"
        path.write_text(text)
        return str(path)

    return write


def test_jinja_file_through_the_chat_template(jinja, chatml):
    path = jinja(
        "{% set ns = namespace(text='') %}\n"
        "{% for pair in train %}\n"
        "  {% set ns.text = ns.text ~ pair.input ~ ' -> ' ~ pair.output ~ '; ' %}\n"
        "{% endfor %}\n"
        "{{ chat([{'role': 'user', 'content': ns.text ~ test_input}]) }}```grid\n"
    )
    fmt = load_format(path, "numbered", chatml)
    prompt = fmt.render(SMALL_TASK, 0)
    assert prompt.text.startswith(
        "<|im_start|>user\n```grid shape: 2x2\n1 12\n2 34\n``` -> ```grid"
    )
    assert prompt.text.endswith("<|im_end|>\n<|im_start|>assistant\n```grid")
    answer = fmt.render_answer([[3], [4]])
    assert answer.text == " shape: 2x1\n1 3\n2 4\n```"
    parsed = fmt.parse(answer.text + "<|im_end|>")
    assert parsed.grid == [[3], [4]]
    np.testing.assert_array_equal(parsed.cells, answer.cells)
    check_spans(prompt.text, prompt.cells, [[5, 6], [7, 8]], 0, 1, "numbered", 20)
    assert fmt.end_of_turn == "<|im_end|>"


def test_jinja_file_may_put_the_test_input_first(jinja, chatml):
    path = jinja("{{ test_input }}{% for p in train %}|{{ p.input }}|{{ p.output }}{% endfor %}=\n")
    prompt = load_format(path, None, chatml).render(SMALL_TASK, 0)
    assert prompt.text == "09\n90|12\n34|56\n78="
    assert prompt.cells[:, 0].tolist() == [-1] * 4 + [0] * 8
    assert prompt.cells[:, 4].tolist() == [0, 9, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ test_input }}", "the input of train pair 1 0 times"),
        (
            "{% for p in train %}{{ p.input }}{{ p.output * 2 }}{% endfor %}{{ test_input }}",
            "the output of train pair 1 2 times",
        ),
        ("{% for p in train %}{{ p.input }}{{ p.output }}{% endfor %}", "the test input 0 times"),
        (
            "{% for p in train %}{{ p.input }}{{ p.output }}{% endfor %}"
            "{{ test_input }}{{ test_input[1:] }}",
            "alters a grid",
        ),
        ("a\n{% for p in train %}", "fails in line 2"),
        ("a\nb\n{{ wrong }}", "fails in line 3: 'wrong' is undefined"),
        ("a\n{{ 1 / 0 }}", "fails in line 2: division by zero"),
        ("a\n{{ chat('hello') }}", "chat template fails"),
    ],
)
def test_jinja_files_that_are_refused(jinja, chatml, source, message):
    with pytest.raises(UserError, match=message) as caught:
        load_format(jinja(source), None, chatml)
    assert "\n" not in str(caught.value)


def test_chat_formats_need_a_chat_template(chatml, jinja):
    tokenizer = small.character_tokenizer()
    tokenizer.chat_template = None
    for name in ("chat", "turns", jinja("{{ chat([]) }}")):
        with pytest.raises(UserError, match=r"copy chat_template\.jinja.* and plain need none"):
            load_format(name, None, tokenizer)
    for name in ("compact", "plain"):
        assert load_format(name, None, tokenizer).render(SMALL_TASK, 0).text


def test_chat_templates_with_names():
    tokenizer = small.character_tokenizer()
    template = tokenizer.chat_template
    tokenizer.chat_template = {"default": template, "rag": "{{ oops() }}"}
    assert load_format("chat", None, tokenizer).render(SMALL_TASK, 0).text
    tokenizer.chat_template = {"tool_use": template, "rag": template}
    with pytest.raises(UserError, match="chat templates rag, tool_use, and none of the name defau"):
        load_format("chat", None, tokenizer)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% if %}", "{{ a.b.c }}", "x"]
)
def test_a_chat_template_that_fails_is_one_line(template):
    tokenizer = small.character_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError) as caught:
        load_format("chat", None, tokenizer)
    assert "\n" not in str(caught.value)


LOOPS = "{% for i in range(300) %}{% for j in range(300) %}{% for k in range(300) %}"
LOOPS += "{% endfor %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ '{:>20000000}'.format('x') }}", "it makes 20000000 characters"),
        ("{{ '{:>99999999999999}'.format('x') }}", "MemoryError"),
        (LOOPS, "it takes longer than 0.2 s"),
    ],
)
def test_a_template_without_bound_is_one_line(jinja, monkeypatch, template, message):
    monkeypatch.setattr("utils.prompt.chat.TEMPLATE_SECONDS", 0.2)
    tokenizer = small.character_tokenizer()
    tokenizer.chat_template = template
    for name in ("chat", jinja(template)):
        with pytest.raises(UserError, match=f"template .*{message}"):
            load_format(name, None, tokenizer)


def test_unknown_names_list_what_there_is(chatml, tmp_path):
    for name in ("chatty", str(tmp_path), str(tmp_path / "none.jinja")):
        with pytest.raises(UserError, match="neither chat, turns, compact, plain, nvarc, "):
            load_format(name, None, chatml)
    with pytest.raises(UserError, match="digits, spaced, numbered, words"):
        load_format("chat", "roman", chatml)


def test_template_hash_tells_what_determines_a_prompt(chatml, jinja):
    def of(name, encoding=None, tokenizer=chatml):
        return load_format(name, encoding, tokenizer).template_hash

    other = small.character_tokenizer()
    other.chat_template = other.chat_template.replace("assistant", "bot")
    source = "{% for p in train %}{{ p.input }}{{ p.output }}{% endfor %}{{ test_input }}"
    hashes = [of(name, encoding) for name in FREE_FORMATS for encoding in GRID_ENCODINGS]
    hashes += [of("chat", tokenizer=other), of(jinja(source)), of(jinja(source + "{# #}"))]
    assert len(set(hashes)) == len(hashes)
    assert of("chat") == of("chat", "digits", small.character_tokenizer())
    assert len(of("chat")) == 64 and set(of("chat")) <= set("0123456789abcdef")


def test_names_are_cheap_to_import():
    code = "import sys, utils.prompt.formats; print([m for m in ('jinja2', 'transformers', 'torch', 'jax') if m in sys.modules])"  # noqa: E501
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert json.loads(done.stdout) == [], done.stderr
