"""Templates: a chat template or a Jinja file, filled with placeholders in the place of grids.

Knows neither what a grid looks like nor what a token is: the text that comes out still has the
placeholders, each exactly once, or is refused.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Private use characters: no template has them, and no Jinja filter trims or changes them.
PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")

# A template that asks for today's date gets this one: the same run gives the same prompts any day.
FIXED_DATE = (
    "{%- macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07')"
    " | replace('%b', 'Jul') | replace('%B', 'July') | replace('%Y', '2024') }}{% endmacro %}"
)


def placeholder(slot: int) -> str:
    """Stands for grid number slot: input and output of each train pair, then the test input."""
    return f"\ue000{slot}\ue001"


def apply_chat(
    tokenizer: "PreTrainedTokenizerFast", messages: list[dict[str, str]], answering: bool = True
) -> str:
    """The chat template's text for messages; answering: with the assistant's turn opened."""
    if not tokenizer.chat_template:
        raise UserError(
            "this tokenizer has no chat template; --prompt_format compact and plain need none"
        )
    try:
        template = tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(
            messages,
            chat_template=FIXED_DATE * ("strftime_now" in template) + template,
            tokenize=False,
            add_generation_prompt=answering,
            enable_thinking=False,
        )
    except Exception as error:  # a template is a program: it can raise anything
        raise _template_error("the tokenizer's chat template", error) from error


def assistant_turn(tokenizer: "PreTrainedTokenizerFast") -> tuple[str, str]:
    """What the chat template puts around an answer: the blanks before it (Llama 2 has one), and
    the text after it through the first added token, the end of turn (EOS where there is none).
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": placeholder(0)}]
    opened = apply_chat(tokenizer, messages[:1])
    before, _, after = apply_chat(tokenizer, messages, answering=False).partition(placeholder(0))
    lead = before.removeprefix(opened)
    added = [token for token in tokenizer.added_tokens_encoder if token.strip() and token in after]
    if not added:
        return lead if lead.isspace() else "", tokenizer.eos_token or ""
    first = min(added, key=lambda token: (after.index(token), -len(token)))
    return lead if lead.isspace() else "", after[: after.index(first) + len(first)]


def train_pairs(grids: list[str]) -> list[tuple[str, str]]:
    """Placeholders in the order of their slots -> (input, output) of each train pair."""
    return list(zip(grids[:-1:2], grids[1::2], strict=True))


def jinja_file(
    path: str, tokenizer: "PreTrainedTokenizerFast", chats: list[str]
) -> tuple[str, Callable[[list[str]], str]]:
    """A Jinja file -> (source, function of the grids). What `chat` returns is added to chats."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        source = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt template {path}: {error}") from error
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )

    def chat(messages: list[dict[str, str]]) -> str:
        chats.append(apply_chat(tokenizer, messages))
        return chats[-1]

    def compose(grids: list[str]) -> str:
        try:
            return environment.from_string(source).render(
                train=[{"input": i, "output": o} for i, o in train_pairs(grids)],
                test_input=grids[-1],
                bos_token=tokenizer.bos_token or "",
                eos_token=tokenizer.eos_token or "",
                chat=chat,
            )
        except UserError:
            raise
        except Exception as error:  # a template is a program: it can raise anything
            raise _template_error(f"the prompt template {path}", error) from error

    return source, compose


def _template_error(which: str, error: Exception) -> UserError:
    """One line with the template's line number, from the error or from Jinja's traceback."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    message = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{which} fails{f' in line {line}' if line else ''}: {message}")


def check_placeholders(text: str, num_pairs: int, name: str) -> None:
    """Raises UserError unless text holds each of the 2 * num_pairs + 1 grids exactly once."""
    found = [int(slot) for slot in PLACEHOLDER.findall(text)]
    for slot in range(2 * num_pairs + 1):
        if (times := found.count(slot)) != 1:
            what = f"the {('input', 'output')[slot % 2]} of train pair {slot // 2 + 1}"
            what = "the test input" if slot == 2 * num_pairs else what
            raise UserError(f"prompt format {name} holds {what} {times} times; use it once, as is")
    if re.search("[\ue000\ue001]", PLACEHOLDER.sub("", text)):
        raise UserError(f"prompt format {name} alters a grid; use each as is")
