"""The cell table, exact for every format, encoding and kind of tokenizer."""

import itertools
import json
import logging
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers_for_tests as small
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    ALL_TOKENIZERS,
    BUILDERS,
    FREE_FORMATS,
    SMALL_TASK,
    check_spans,
    format_named,
    grids,
    tasks,
    tokenizer_named,
)

from utils.errors import UserError
from utils.prompt.codec import (
    Codec,
    check_vocabulary,
    encode_answer,
    encode_prompt,
    hash_tokenizer,
    load_tokenizer,
    stop_ids,
)
from utils.prompt.formats import GRID_ENCODINGS, load_format


def read(ids, tokenizer, fmt, prompt_length=0, stops=()):
    return Codec(tokenizer, fmt, stops, "").read(ids, prompt_length)


def align(ids, text, tokenizer):
    """(start, stop) in text of each token, from the tokens' own spelling; text is ASCII.

    A space that SentencePiece put before a text is not in it.
    """
    backend, spans, position = tokenizer.backend_tokenizer, [], 0
    for token in np.asarray(ids).tolist():
        piece = backend.id_to_token(token)
        if token not in tokenizer.added_tokens_decoder:
            piece = piece.replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ")
            piece = piece.replace("<0x0A>", "\n")
        if not text.startswith(piece, position):
            assert piece[0] == " " and text.startswith(piece[1:], position), (piece, position)
            piece = piece[1:]
        spans.append((position, position + len(piece)))
        position += len(piece)
    assert position == len(text)
    return spans


def check_table(ids, text, char_cells, cells, tokenizer):
    """Each cell's tokens are those that overlap it by even one character, and no others."""
    spans = align(ids, text, tokenizer)
    assert cells.dtype == np.int32
    np.testing.assert_array_equal(cells[:, :5], char_cells[:, :5])
    holders = [[] for _ in text]
    for token, (start, stop) in enumerate(spans):
        for position in range(start, stop):
            holders[position].append(token)
    for (start, stop), (first, last) in zip(char_cells[:, 5:], cells[:, 5:], strict=True):
        expected = sorted({token for position in range(start, stop) for token in holders[position]})
        assert list(range(first, last)) == expected


# Every pair of tokenizer, encoding and format is among these, though not every three.
FORMATS = FREE_FORMATS
CASES = [
    (FORMATS[(i + j) % len(FORMATS)], encoding, tokenizer_name)
    for i, tokenizer_name in enumerate(ALL_TOKENIZERS)
    for j, encoding in enumerate(GRID_ENCODINGS)
]
KNOWN_CASES = [
    ("nvarc", "digits", "qwen2"),
    ("architects", "digits", "merging"),
    ("arc24", "numbered", "qwen2"),
]
for_every_case = pytest.mark.parametrize(
    ("name", "encoding", "tokenizer_name"), [*CASES, *KNOWN_CASES]
)


def test_every_pair_is_among_the_cases():
    names, encodings, tokenizers = zip(*CASES, strict=True)
    assert set(zip(tokenizers, encodings, strict=True)) == set(
        itertools.product(ALL_TOKENIZERS, GRID_ENCODINGS)
    )
    assert set(zip(names, tokenizers, strict=True)) == set(
        itertools.product(FREE_FORMATS, ALL_TOKENIZERS)
    )
    assert set(zip(names, encodings, strict=True)) == set(
        itertools.product(FREE_FORMATS, GRID_ENCODINGS)
    )


@for_every_case
def test_prompt_table(name, encoding, tokenizer_name):
    tokenizer = tokenizer_named(tokenizer_name)
    fmt = format_named(name, encoding, tokenizer_name)

    @settings(max_examples=24)
    @given(tasks())
    def check(task):
        prompt = fmt.render(task, 0)
        ids, cells = encode_prompt(prompt, tokenizer)
        assert ids.dtype == np.int32
        if prompt.prepend_bos:
            assert ids[0] == tokenizer.bos_token_id
            ids, cells = ids[1:], cells - [0, 0, 0, 0, 0, 1, 1]
            cells = cells.astype(np.int32)
        check_table(ids, prompt.text, prompt.cells, cells, tokenizer)

    check()


@for_every_case
def test_answer_table_forced_and_generated(name, encoding, tokenizer_name):
    tokenizer = tokenizer_named(tokenizer_name)
    fmt = format_named(name, encoding, tokenizer_name)
    stops = stop_ids(tokenizer, fmt=fmt)

    @settings(max_examples=24)
    @given(grids())
    def check(grid):
        ids, cells = encode_answer(fmt, grid, tokenizer, 100)
        answer = fmt.render_answer(grid)
        local = (cells - [0, 0, 0, 0, 0, 100, 100]).astype(np.int32)
        check_table(ids, answer.text + fmt.end_of_turn, answer.cells, local, tokenizer)
        found = read(ids.tolist(), tokenizer, fmt, 100, stops)
        assert (found.grid, found.reason) == (grid, None)
        np.testing.assert_array_equal(found.cells, cells)
        assert not fmt.end_of_turn.strip() or fmt.end_of_turn.strip() not in found.text
        if name != "plain":
            assert ids[-1] in stops

    check()


def split_at_random(ids, tokenizer, rng):
    """The same text in other tokens: some of those of several characters become single ones."""
    backend, result = tokenizer.backend_tokenizer, []
    for token in ids.tolist():
        piece = backend.id_to_token(token)
        parts = [backend.token_to_id(character) for character in piece]
        special = token in tokenizer.added_tokens_decoder or piece.startswith("<0x")
        if special or None in parts or rng.random() < 0.5:
            parts = [token]
        result += parts
    return result


@for_every_case
def test_generated_ids_in_any_tokenisation(name, encoding, tokenizer_name):
    tokenizer = tokenizer_named(tokenizer_name)
    fmt = format_named(name, encoding, tokenizer_name)

    @settings(max_examples=24)
    @given(grids(st.integers(1, 12)), st.randoms(use_true_random=False))
    def check(grid, rng):
        ids = split_at_random(encode_answer(fmt, grid, tokenizer)[0], tokenizer, rng)
        found = read(ids, tokenizer, fmt)
        assert found.grid == grid
        answer = fmt.render_answer(grid)
        check_table(ids, answer.text + fmt.end_of_turn, answer.cells, found.cells, tokenizer)

    check()


@pytest.mark.parametrize("tokenizer_name", ALL_TOKENIZERS)
def test_any_generated_ids_are_a_grid_or_a_reason(tokenizer_name):
    tokenizer = tokenizer_named(tokenizer_name)
    fmt = format_named("chat", "digits", tokenizer_name)
    digits = [tokenizer.backend_tokenizer.token_to_id(d) for d in "0123456789"]
    ids = st.integers(0, len(tokenizer) + 300) | st.sampled_from(digits)

    @given(st.lists(ids, max_size=20))
    def check(ids):
        found = read(ids, tokenizer, fmt, 7)
        assert (found.grid is None) != (found.reason is None)
        colors = []
        for color, start, stop in found.cells[:, 4:] - [0, 7, 7]:
            piece = tokenizer.backend_tokenizer.decode(ids[start:stop], skip_special_tokens=False)
            assert str(color) in piece
            colors.append(color)
        assert colors == [c for row in found.grid or [] for c in row]

    check()


def test_three_digits_share_a_token():
    tokenizer = small.merging_tokenizer()
    fmt = load_format("compact", "digits", tokenizer)
    ids, cells = encode_answer(fmt, [[0, 1, 2, 3, 4]], tokenizer, 10)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["012", "34", "Ċ", "<|eot_id|>"]
    assert cells[:, 5:].tolist() == [[10, 11], [10, 11], [10, 11], [11, 12], [11, 12]]
    three = tokenizer.convert_tokens_to_ids(["0", "12", "3", "4", "<|eot_id|>", "99"])
    found = read(three, tokenizer, fmt, 10, stop_ids(tokenizer))
    assert found.grid == [[0, 1, 2, 3, 4]] and found.text == "01234"
    assert found.cells[:, 5:].tolist() == [[10, 11], [11, 12], [11, 12], [12, 13], [13, 14]]


def test_a_word_takes_two_tokens_and_a_lone_space_holds_no_cell():
    tokenizer = small.word_tokenizer()
    words = load_format("turns", "words", tokenizer)
    ids, cells = encode_answer(words, [[0, 9]], tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == [
        "Bl",
        "ack",
        "ĠBr",
        "own",
        "<|im_end|>",
    ]
    assert cells[:, 5:].tolist() == [[0, 2], [2, 4]]
    spaced = load_format("turns", "spaced", tokenizer)
    ids, cells = encode_answer(spaced, [[0, 9]], tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["0", "Ġ", "9", "<|im_end|>"]
    assert cells[:, 5:].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("tokenizer_name", ALL_TOKENIZERS)
def test_prompt_and_forced_answer_are_what_the_chat_template_gives(tokenizer_name):
    tokenizer = tokenizer_named(tokenizer_name)
    if tokenizer_name == "merging":
        tokenizer = small.merging_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace("{{ strftime_now", "{{ string")
        tokenizer.chat_template = tokenizer.chat_template.replace("string('%d %b %Y')", "'a day'")
    fmt = load_format("turns", "digits", tokenizer)
    ids, _ = encode_prompt(fmt.render(SMALL_TASK, 0), tokenizer)
    answer, _ = encode_answer(fmt, [[4, 5, 6, 7]], tokenizer)
    turns = ["12\n34", "56\n78", "09\n90", "4567"]
    messages = [
        {"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)
    ]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    joined = [*ids.tolist(), *answer.tolist()]
    assert whole[: len(joined)] == joined
    prompt = tokenizer.apply_chat_template(
        messages[:3], add_generation_prompt=True, return_dict=False
    )
    assert prompt == ids.tolist()


@pytest.mark.parametrize("tokenizer_name", ["merging", "sentencepiece", "metaspace"])
@pytest.mark.parametrize(
    "name", [*FREE_FORMATS, "architects", "jinja", "jinja with bos", "jinja with chat"]
)
def test_bos_comes_once(name, tokenizer_name, tmp_path):
    tokenizer = tokenizer_named(tokenizer_name)
    pairs = "{% for p in train %}{{ p.input }}{{ p.output }}{% endfor %}"
    sources = {
        "jinja": pairs + "{{ test_input }}",
        "jinja with bos": "{{ bos_token }}" + pairs + "{{ test_input }}",
        "jinja with chat": pairs.replace("{{ p.", "{{ '' ~ p.").join(
            ["{% set text %}", "{{ test_input }}{% endset %}"]
        )
        + "{{ chat([{'role': 'user', 'content': text}]) }}",
    }
    if name in sources:
        path = tmp_path / "format.jinja"
        path.write_text(sources[name])
        name = str(path)
    ids, _ = encode_prompt(load_format(name, None, tokenizer).render(SMALL_TASK, 0), tokenizer)
    assert np.flatnonzero(ids == tokenizer.bos_token_id).tolist() == [0]


def test_no_bos_where_the_tokenizer_or_its_chat_template_has_none():
    for name in FREE_FORMATS:
        assert not format_named(name, "digits", "character").prepend_bos
    tokenizer = small.merging_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "")
    ids, _ = encode_prompt(load_format("chat", None, tokenizer).render(SMALL_TASK, 0), tokenizer)
    assert tokenizer.bos_token_id not in ids


@pytest.mark.parametrize("tokenizer_name", ["sentencepiece", "metaspace"])
def test_the_space_put_before_a_text_holds_no_cell(tokenizer_name, tmp_path):
    path = tmp_path / "format.jinja"
    path.write_text("{{ test_input }}{% for p in train %};{{ p.input }}={{ p.output }}{% endfor %}")
    tokenizer = tokenizer_named(tokenizer_name)
    prompt = load_format(str(path), "digits", tokenizer).render(SMALL_TASK, 0)
    ids, cells = encode_prompt(prompt, tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids[:4].tolist()) == ["<s>", "▁", "0", "9"]
    assert cells[:2].tolist() == [[-1, 0, 0, 0, 0, 2, 3], [-1, 0, 0, 1, 9, 3, 4]]


def test_characters_of_several_bytes_around_a_grid(tmp_path):
    path = tmp_path / "format.jinja"
    path.write_text(
        "é😀{% for p in train %}→{{ p.input }}☃{{ p.output }}{% endfor %}ß{{ test_input }}é"
    )
    for tokenizer_name in ALL_TOKENIZERS:
        tokenizer = tokenizer_named(tokenizer_name)
        prompt = load_format(str(path), "digits", tokenizer).render(SMALL_TASK, 0)
        ids, cells = encode_prompt(prompt, tokenizer)
        check_spans(prompt.text, prompt.cells, [[1, 2], [3, 4]], 0, 0, "digits")
        for color, start, stop in cells[:, 4:]:
            (token,) = tokenizer.convert_ids_to_tokens(ids[start:stop].tolist())
            assert str(color) in token


def test_bytes_of_one_character_in_several_tokens_beside_the_answer():
    tokenizer = tokenizer_named("character")
    fmt = format_named("chat", "digits", "character")
    ids = tokenizer.encode("☃\n\n12", add_special_tokens=False)
    assert len(ids) == 7
    found = read(ids, tokenizer, fmt)
    assert (found.grid, found.text) == ([[1, 2]], "☃\n\n12")
    assert found.cells[:, 5:].tolist() == [[5, 6], [6, 7]]
    stop = tokenizer.eos_token_id
    assert read([*ids, stop, ids[-1]], tokenizer, fmt, 0, [stop]).text == found.text
    broken = read(ids[1:], tokenizer, fmt)
    assert broken.grid == [[1, 2]] and broken.cells[:, 5:].tolist() == [[4, 5], [5, 6]]
    assert read(ids[1:3] + ids[5:], tokenizer, fmt).reason == "cell is not a digit"


def test_no_generated_ids_at_all():
    found = read([], tokenizer_named("character"), format_named("chat", "digits", "character"))
    assert (found.grid, found.reason, found.cells.shape) == (None, "empty answer", (0, 7))


def test_a_fence_merged_with_the_blank_line_after_it():
    tokenizer = small.merging_tokenizer()
    fmt = load_format("plain", "numbered", tokenizer)
    ids, _ = encode_answer(fmt, [[5]], tokenizer)
    assert tokenizer.convert_ids_to_tokens(int(ids[-1])) == "```ĊĊ"
    assert ids[-1] in stop_ids(tokenizer, fmt=fmt)
    found = read(ids.tolist(), tokenizer, fmt, 0, stop_ids(tokenizer, fmt=fmt))
    assert found.grid == [[5]] and found.text.endswith("\n```")
    before = tokenizer.encode("☃\n", add_special_tokens=False)  # whose bytes are several tokens
    after = read([*before, *ids.tolist()], tokenizer, fmt, 0, stop_ids(tokenizer, fmt=fmt))
    assert (after.grid, after.text) == ([[5]], f"☃\n{found.text}")


@pytest.mark.parametrize("name", ["character", "sentencepiece"])
def test_a_cell_that_the_vocabulary_cannot_write_is_refused(name):
    """Which the one tokenizer leaves out, and the other gives the token of all that is unknown."""
    poor = BUILDERS[name]()
    state = json.loads(poor.backend_tokenizer.to_str())
    del state["model"]["vocab"]["7"]
    state["model"]["byte_fallback"] = False
    poor._tokenizer = type(poor.backend_tokenizer).from_str(json.dumps(state))
    fmt = load_format("chat", "digits", poor)
    with pytest.raises(UserError, match=r"no token for the cell '7'.*--grid_encoding"):
        encode_prompt(fmt.render(SMALL_TASK, 0), poor)
    with pytest.raises(UserError, match="no token for the cell '7'"):
        encode_answer(fmt, [[7]], poor)


def test_stop_ids():
    tokenizer = small.merging_tokenizer()
    eot, end = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    assert stop_ids(tokenizer) == tuple(sorted((eot, end)))
    assert stop_ids(tokenizer, [{"eos_token_id": [5, eot]}, None, {"eos_token_id": 3}, {}]) == (
        3, 5, *sorted((eot, end)),
    )  # fmt: skip
    tokenizer.eos_token = "<|begin_of_text|>"  # a wrong one: the template still says how turns end
    assert eot in stop_ids(tokenizer) and tokenizer.bos_token_id in stop_ids(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert eot in stop_ids(tokenizer)


def test_stop_id_of_a_template_with_a_token_of_its_own():
    tokenizer = small.character_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<over>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "\n<over>")
    over = tokenizer.convert_tokens_to_ids("<over>")
    assert over in stop_ids(tokenizer)
    ids, _ = encode_answer(load_format("chat", None, tokenizer), [[1]], tokenizer)
    assert ids[-1] == over


def test_vocabulary_larger_than_the_embeddings():
    tokenizer = small.character_tokenizer()
    check_vocabulary(tokenizer, 256)
    with pytest.raises(UserError, match=r"ids up to 255.*vocab_size is 255"):
        check_vocabulary(tokenizer, 255)


@pytest.mark.parametrize(("name", "token"), [("chat", "<|im_start|>"), ("compact", "<|im_end|>")])
def test_added_tokens_beyond_the_embeddings(name, token):
    """One that no prompt holds, such as one for padding, does no harm."""
    tokenizer = small.character_tokenizer()
    number = max(tokenizer.convert_tokens_to_ids(["<|im_end|>", token]))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    fmt = load_format(name, None, tokenizer)
    check_vocabulary(tokenizer, number + 1)
    assert len(Codec(tokenizer, fmt, (), "", number + 1).encode(SMALL_TASK, 0, 1).ids)
    small_model = Codec(tokenizer, fmt, (), "", number)
    with pytest.raises(
        UserError, match=rf"holds the token .*whose id is {number}, .* {number} emb"
    ):
        small_model.encode(SMALL_TASK, 0, 1)


@pytest.mark.parametrize("fields", [{"transformers_version": "4.40.0"}, {}])
def test_no_alarm_about_what_no_flag_can_change(fields, tmp_path, caplog):
    """transformers says of Mistral's large vocabularies that a pattern of theirs is wrong."""
    small.character_tokenizer().save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["vocab"] |= {f"word {i}": i for i in range(1000, 102_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", **fields}))
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        load_tokenizer(tmp_path)
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert not caplog.messages


def test_qwen2_vocabulary_fits_its_models():
    check_vocabulary(tokenizer_named("qwen2"), 151_936)


@pytest.mark.parametrize("name", BUILDERS)
def test_load_tokenizer_reads_what_was_saved(name, tmp_path):
    saved = BUILDERS[name]()
    saved.backend_tokenizer.enable_truncation(5)
    saved.backend_tokenizer.enable_padding(length=50, pad_token=saved.eos_token)
    saved.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    saved.backend_tokenizer.no_truncation()
    saved.backend_tokenizer.no_padding()
    assert loaded.backend_tokenizer.to_str() == saved.backend_tokenizer.to_str()
    assert loaded.chat_template == saved.chat_template
    assert (loaded.bos_token_id, loaded.eos_token_id) == (saved.bos_token_id, saved.eos_token_id)


def test_the_hash_is_of_all_that_makes_ids_of_a_text(tmp_path):
    """What tokenizer_config.json adds and changes too, of which tokenizer.json tells nothing."""
    small.merging_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    hashes = {hash_tokenizer(tmp_path, load_tokenizer(tmp_path))}
    prefix = {"add_prefix_space": not fields.get("add_prefix_space")}
    for more in (prefix, {"unk_token": "<|eot_id|>"}, {"extra_special_tokens": ["<over>"]}):
        path.write_text(json.dumps({**fields, **more}))
        hashes.add(hash_tokenizer(tmp_path, load_tokenizer(tmp_path)))
    assert len(hashes) == 4
    path.write_text(json.dumps({**fields, "model_max_length": 7}))
    assert hash_tokenizer(tmp_path, load_tokenizer(tmp_path)) in hashes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer; copy tokenizer.json"),
        ({"tokenizer.model": "x"}, "only a slow tokenizer"),
        ({"vocab.json": "{}", "merges.txt": ""}, "only a slow tokenizer"),
        ({"tokenizer.json": "{}"}, "no tokenizer_config.json"),
        ({"tokenizer.json": "{", "tokenizer_config.json": "{}"}, "cannot read the tokenizer"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, "cannot read the tokenizer"),
    ],
)
def test_folders_without_a_usable_tokenizer(tmp_path, files, message):
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no model folder"):
        load_tokenizer(tmp_path / "none")


def test_a_tokenizer_is_loaded_and_used_without_torch(tmp_path):
    small.merging_tokenizer().save_pretrained(tmp_path)
    code = f"""
import sys
from utils.prompt.formats import load_format
from utils.prompt.codec import load_tokenizer
load_format("chat", None, load_tokenizer({str(tmp_path)!r}))
print("torch" in sys.modules, "jax" in sys.modules)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_full_grid_of_words():
    rng = random.Random(0)
    grid = [[rng.randrange(10) for _ in range(30)] for _ in range(30)]
    tokenizer, fmt = tokenizer_named("merging"), format_named("chat", "words", "merging")
    ids, cells = encode_answer(fmt, grid, tokenizer)
    found = read(ids.tolist(), tokenizer, fmt)
    np.testing.assert_array_equal(found.cells, cells)
