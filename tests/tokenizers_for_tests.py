"""Small offline tokenizers, one for each way in which real ones treat grids.

Each function returns a new `PreTrainedTokenizerFast`; `save_pretrained(folder)` writes it where
`load_tokenizer(folder)` reads it.
"""

import itertools

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from utils.prompt.encodings import COLORS

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # with BOS, today's date, and every message trimmed
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n<|eot_id|>"
    "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INST = (  # one blank before and after each answer
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] | trim }} [/INST]{% elif message['role'] == 'assistant' %}"
    " {{ message['content'] | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character (a byte, outside ASCII), 259 ids, ChatML, no BOS."""
    return _finish(
        _byte_level([], "."), CHATML, "<|im_end|>", pad="<|endoftext|>", start="<|im_start|>"
    )


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Up to three digits a token, blank lines merged with a fence before them, BOS in the template
    and also put first by the tokenizer itself, messages trimmed, today's date; as Llama 3 does."""
    digits = "0123456789"
    merges = [*itertools.product(digits, digits)]
    merges += [(a + b, c) for a, b, c in itertools.product(digits, digits, digits)]
    merges += [("Ċ", "Ċ"), ("`", "`"), ("``", "`"), ("```", "ĊĊ")]
    pattern = r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    tokenizer = _finish(
        _byte_level(merges, pattern), HEADERS, "<|eot_id|>", bos="<|begin_of_text|>",
        pad="<|end_of_text|>", extra=["<|start_header_id|>", "<|end_header_id|>"],
    )  # fmt: skip
    _bos_first(tokenizer)
    return tokenizer


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Two tokens a color word, the first of which holds the space before it; ChatML, no BOS."""
    merges = {}
    for word in COLORS:
        for half in (word[: len(word) // 2], word[len(word) // 2 :]):
            merges |= {(half[:i], half[i]): None for i in range(1, len(half))}
        merges[("Ġ", word[: len(word) // 2])] = None
    tokenizer = _byte_level(list(merges), r" ?\p{L}+|\p{N}|\s+(?!\S)|[^\p{L}\p{N}]")
    return _finish(tokenizer, CHATML, "<|im_end|>", pad="<|endoftext|>", start="<|im_start|>")


def sentencepiece_tokenizer(legacy: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2's (legacy: a space before the text and after each special token) or the later
    Metaspace kind (before the text alone): spaces as ▁, byte fallback, BOS put first, `[INST]`."""
    characters = [*map(chr, range(33, 127)), "▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    merges = [("▁", "B"), ("▁B", "l"), ("B", "l"), ("▁", "1"), ("a", "c"), ("ac", "k")]
    tokens += [a + b for a, b in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    if legacy:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = INST
    _bos_first(tokenizer)
    return tokenizer


def _byte_level(merges: list[tuple[str, str]], pattern: str) -> Tokenizer:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _finish(
    backend: Tokenizer,
    chat_template: str,
    eos: str,
    pad: str,
    bos: str | None = None,
    start: str | None = None,
    extra: list[str] | None = None,
) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        extra_special_tokens=[*([start] if start else []), *(extra or [])],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _bos_first(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token}:0 $A:0",
        special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)],
    )
