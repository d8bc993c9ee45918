"""Chat templates as programs: Jinja, in the sandbox and with the functions that Hugging Face's templates count on.

A template is a program that came with a checkpoint, so whatever it does wrong is one line for the user.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.parser import Parser

from subjax.errors import UsageError

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# For models without a template. What ends an answer is the end of text: a line break would cut a list in lines short.
PLAIN = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\\n\\n' if message.content }}"
    "{% elif message.role == 'user' %}{{ 'User: ' + message.content + '\\n' }}"
    "{% else %}{{ 'Assistant: ' + message.content + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


class TemplateRefusal(UsageError):
    """The template called raise_exception; `words` are its own."""

    def __init__(self, message: str, words: str):
        super().__init__(message)
        self.words = words


class ChatTemplate:
    """A compiled chat template of the model `where`, with the special tokens that it may name ("bos_token")."""

    def __init__(self, text: str, tokens: Mapping[str, str], where: str):
        self.text, self.tokens, self.where = text, tokens, where
        try:
            self._compiled = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"{where}: the chat template does not parse (line {error.lineno}: {error.message}); mend it, or give "
                "another one, or 'plain'"
            ) from error

    def render(
        self, messages: Sequence[Message], *, answer_next: bool, today: datetime.date, thinking: bool = False
    ) -> str:
        """The text of a conversation, with the opening of the assistant's turn behind it where `answer_next`.

        Raises:
            TemplateRefusal: the template raised an exception of its own.
            UsageError: the template failed.
        """
        try:
            return self._compiled.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=answer_next,
                enable_thinking=thinking,
                strftime_now=lambda form: datetime.datetime.combine(today, datetime.time()).strftime(form),
                **self.tokens,
            )
        except _Raised as error:
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateRefusal(
                f"{self.where}: the chat template refuses a conversation of {roles}: {str(error)!r}; give another "
                "template, or 'plain'",
                str(error),
            ) from error
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            first = str(error).partition("\n")[0]
            raise UsageError(
                f"{self.where}: the chat template fails ({type(error).__name__}: {first}); mend it, or give another "
                "one, or 'plain'"
            ) from error


class _Raised(Exception):
    """What raise_exception raises: not one of Jinja's, which it would dress up."""


class _Generation(ext.Extension):
    """{% generation %} … {% endgeneration %} marks what the assistant said, for trainers; the text stands as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> sandbox.ImmutableSandboxedEnvironment:
    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _Generation]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise_exception
    return made


def _raise_exception(message: str) -> None:
    raise _Raised(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own writes "<" as "\u003c", for web pages.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
