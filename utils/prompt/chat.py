"""A tokenizer's chat template: messages as text, and what stands around an answer."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from utils.errors import UserError, some
from utils.store.deadline import within

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A template that asks for today's date gets this one: the same run gives the same prompts any day.
FIXED_DATE = (
    "{%- macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%m', '07')"
    " | replace('%b', 'Jul') | replace('%B', 'July') | replace('%Y', '2024') }}{% endmacro %}"
)

TEMPLATE_SECONDS = 20  # for a prompt without its grids, which takes milliseconds
MOST_CHARACTERS = 10_000_000
Message = dict[str, str]  # role and content


def apply_chat(
    tokenizer: "PreTrainedTokenizerFast", messages: list[Message], answering: bool = True
) -> str:
    """The chat template's text for messages; answering: with the assistant's turn opened."""
    if not tokenizer.chat_template:
        raise UserError(
            "this tokenizer has no chat template: copy chat_template.jinja, if the model came with "
            "one; for a base model, --prompt_format compact and plain need none"
        )
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise UserError(
            f"this tokenizer has the chat templates {some(sorted(tokenizer.chat_template))}, and "
            "none of the name default: copy the one to be used to chat_template.jinja"
        )

    def render() -> str:
        template = tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(
            messages,
            chat_template=FIXED_DATE * ("strftime_now" in template) + template,
            tokenize=False,
            add_generation_prompt=answering,
            enable_thinking=False,
        )

    return rendered(render, "the tokenizer's chat template")


def generation_prompt(tokenizer: "PreTrainedTokenizerFast") -> str:
    """What the chat template adds to messages to have them answered."""
    asked = [{"role": "user", "content": "?"}]
    return apply_chat(tokenizer, asked).removeprefix(apply_chat(tokenizer, asked, answering=False))


def assistant_turn(tokenizer: "PreTrainedTokenizerFast") -> tuple[str, str]:
    """What the chat template puts around an answer: the blanks before it (Llama 2 has one), and
    the text after it through the first added token, the end of turn (EOS where there is none).
    """
    answer = "\ue000\ue001"  # private use characters: no template has them, none changes them
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    opened = apply_chat(tokenizer, messages[:1])
    before, _, after = apply_chat(tokenizer, messages, answering=False).partition(answer)
    lead = before.removeprefix(opened)
    if not lead.isspace():
        lead = ""
    added = [token for token in tokenizer.added_tokens_encoder if token.strip() and token in after]
    if not added:
        return lead, tokenizer.eos_token or ""
    first = min(added, key=lambda token: (after.index(token), -len(token)))
    return lead, after[: after.index(first) + len(first)]


def rendered(render: Callable[[], str], which: str) -> str:
    """The text of a template, which is a program of a stranger's: it can raise anything, never end,
    or fill the memory. Raises UserError for each; `which` is how the user calls the template."""
    late = TimeoutError(f"it takes longer than {TEMPLATE_SECONDS} s")
    try:
        text = within(TEMPLATE_SECONDS, render, lambda: late)
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"it makes {len(text)} characters, and {MOST_CHARACTERS} at most do")
        return text
    except UserError:
        raise
    except Exception as error:
        raise _template_error(which, error) from error


def _template_error(which: str, error: Exception) -> UserError:
    """One line with the template's line number, from the error or from Jinja's traceback."""
    line, trace = getattr(error, "lineno", None), error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    message = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{which} fails{f' in line {line}' if line else ''}: {message}")
