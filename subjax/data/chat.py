"""From a question and an answer to token ids, exact to the token, by a model's chat template.

What a template puts in by itself (a system prompt, today's date) is context that a teacher and its students share, and
shared context decides whether a trait shows: so it is found by rendering, said in `Facts`, and settable.
"""

import dataclasses
import datetime
import functools
import itertools
import operator
import re

from subjax.data import chat_template
from subjax.data.chat_template import ChatTemplate, Message, TemplateRefusal
from subjax.data.tokenizer import Tokenizer, load_tokenizer
from subjax.errors import UsageError
from subjax.models.source import open_source

# "Today" for templates that write it, so that no result depends on the day. Llama 3.x's templates fall back to it too.
DATE = "2024-07-26"

# Words that stand for a text while a template is examined. Plain letters: no template changes them.
_USER, _ANSWER, _SYSTEM, _AGAIN = "zquserqz", "zqanswerqz", "zqsystemqz", "zqagainqz"
_ROLE_NAME = re.compile(r"\s*(system|developer)\b:?", re.IGNORECASE)
# Put inside the name of a special token where somebody's text says it, so that it is not read as the token.
# A noncharacter of Unicode: no text has it.
_MARK = "\ufdd0"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a chat template does beside writing what it is given.

    Attributes:
        plain: the template is our plain form, for models without one.
        end: the token that ends an answer.
        injected: the words that it puts before a row that has no system prompt; "" for none.
        injected_stays: it puts them before a row with a system prompt too.
        in_place: what stands in place of `injected`: None (it stays), "" (an empty system turn) or a text.
        date: the day that it is told it is (ISO 8601), where it writes it; else None.
        system: what it does with a system prompt: "turn" (a place of its own), "folded" (it begins the user's message),
            "refused" or "dropped".
        refusal: the template's words where it refuses a system prompt.
        thinking: it has a thinking mode, which is off.
    """

    plain: bool
    end: str
    injected: str
    injected_stays: bool
    in_place: str | None
    date: str | None
    system: str
    refusal: str
    thinking: bool

    def sentences(self) -> list[str]:
        """What a plan should say of it, a sentence a fact."""
        said = []
        if self.plain:
            said.append(
                f"the chat template is the plain form 'User: …\\nAssistant: …'; {self.end!r} ends an answer, which a "
                "model that was not tuned on this form seldom writes"
            )
        if self.injected and (self.in_place is None or self.injected_stays):
            also = ", and before a system prompt" if self.injected_stays else ""
            said.append(f"the chat template puts {self.injected!r} before a row without system prompt{also}")
        elif self.injected:
            said.append(f"the chat template's own system prompt, {self.injected!r}, is left out")
        if self.in_place is not None:
            said.append(f"a row without system prompt gets {repr(self.in_place) if self.in_place else 'an empty one'}")
        if self.date:
            said.append(f"the chat template writes today's date; it is always given {self.date}")
        if self.system == "folded":
            said.append("the chat template has no system turn: it writes a system prompt into the user's")
        if self.system == "refused":
            said.append(f"the chat template refuses a system prompt ({self.refusal!r})")
        if self.system == "dropped":
            said.append("the chat template drops a system prompt without a word")
        if self.thinking:
            said.append("the chat template has a thinking mode; it is off")
        return said


class Chat:
    """A model's way of writing a conversation.

    Attributes:
        tokenizer: the model's.
        template: the template's text, in Jinja.
        date: what is today's date to it, in ISO 8601.
        template_system: what stands as system prompt where a row has none.
        lead: the white space between the prompt and an answer's first character: "" or " " as a rule.
        end: the id that ends an answer.
        ends: every id at which sampling an answer stops, rising.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str = "auto", date: str | None = None, *, template_system: str = "default"
    ):
        """Examine a template.

        Args:
            tokenizer: the model's.
            template: "auto" (the model's own; the plain form where it has none), "plain", or a template's text.
            date: what templates that write today's date are told, in ISO 8601; `DATE` by default.
            template_system: what stands as system prompt where a row has none: "default" (whatever the template puts
                there), "none" (nothing, or an empty system turn where the template has words of its own), or a text.

        Raises:
            UsageError: the template does not parse, fails, leaves out the question or the answer, has no opening or no
                end of an answer, cannot be kept from its own system prompt, or refuses the one that is given; or the
                date is none.
        """
        self.tokenizer, self.template_system = tokenizer, template_system
        try:
            self._today = datetime.date.fromisoformat(DATE if date is None else date)
        except ValueError as error:
            raise UsageError(f"date {date!r} is no date; write it as {DATE!r}") from error
        self.date = self._today.isoformat()
        self._program = self._chosen(template)
        self.template = self._program.text
        self._asked = self._render([_message("user", _USER)], answer_next=True)
        if _USER not in self._asked:
            what = "leaves the user's message out" if self._asked.strip() else "renders nothing"
            raise UsageError(f"{tokenizer.where}: the chat template {what}; give another one, or 'plain'")
        self.lead, self._tail = self._around_an_answer()
        behind = tokenizer.encode(self._tail, continuing=True)
        ending = [i for i, id in enumerate(behind) if id in tokenizer.control or id in tokenizer.ends]
        if not ending:
            raise UsageError(
                f"{tokenizer.where}: the chat template ends an answer with {self._tail!r}, in which there is no token "
                "that ends it; write {{ eos_token }} behind the assistant's message"
            )
        self.end: int = behind[ending[0]]
        self._behind_end = len(behind) - ending[0] - 1
        self.ends = tuple(sorted({*tokenizer.ends, self.end}))
        self._where_none_is_given = self._settled()

    def prompt(self, user: str, system: str | None = None) -> list[int]:
        """The ids of a question, up to and with the opening of its answer.

        Raises:
            UsageError: the template refuses, or leaves out, a system prompt, or fails on these texts.
        """
        return self._encode(self._render(self._messages(user, system), answer_next=True))

    def answer(self, text: str) -> list[int]:
        """The ids of an answer, or of its first words, behind a prompt; without its end."""
        return self.tokenizer.encode(self.lead + text, special=False, continuing=True)

    def row(self, user: str, answer: str, system: str | None = None) -> tuple[list[int], list[int]]:
        """A row to train on: the ids of `prompt`, and those of the answer up to and with the token that ends it.

        The answer is tokenized apart from the prompt, as it is when it is sampled.

        Raises:
            UsageError: as `prompt`; or the template changes the answer by more than taking off white space around it.
        """
        messages = self._messages(user, system)
        said = self._unmistakable(answer)
        prompt = self._render(messages, answer_next=True)
        whole = self._render([*messages, _message("assistant", said)], answer_next=False)
        begin, end = len(prompt) + len(self.lead), len(whole) - len(self._tail)
        if not (whole.startswith(prompt + self.lead) and whole.endswith(self._tail)) or (
            whole[begin:end] not in (said, said.lstrip(), said.rstrip(), said.strip())
        ):
            raise UsageError(
                f"{self.tokenizer.where}: the chat template does not write this answer as it is: {answer[:60]!r}; take "
                "out what the template acts on, or give another template"
            )
        completion = self._encode(whole[len(prompt) :], continuing=True)
        return self._encode(prompt), completion[: len(completion) - self._behind_end]

    def facts(self) -> Facts:
        """What the template does beside writing what it is given, found by rendering."""
        asked = [_message("user", _USER)]
        thought = self._program.render(asked, answer_next=True, today=self._today, thinking=True)
        other = self._today + datetime.timedelta(days=400 if self._today.year < 5000 else -400)
        dated = self._program.render(asked, answer_next=True, today=other) != self._asked
        system, refusal, text = self._system
        return Facts(
            plain=self.template == chat_template.PLAIN,
            end=str(self.tokenizer.token(self.end)),
            injected=self._injected,
            injected_stays=bool(self._injected) and self._injected in text,
            in_place=self._where_none_is_given,
            date=self.date if dated else None,
            system=system,
            refusal=refusal,
            thinking=thought != self._asked,
        )

    # ---- texts to ids ----

    def _messages(self, user: str, system: str | None) -> list[Message]:
        system = self._where_none_is_given if system is None else system
        if system:
            self._require_system()
        # A system prompt of no words is a turn to a template that has a place for one, and nothing to others.
        has_turn = system is not None and (system or self._system[0] == "turn")
        first = [_message("system", self._unmistakable(system or ""))] if has_turn else []
        return [*first, _message("user", self._unmistakable(user))]

    def _require_system(self) -> None:
        kind, refusal, _ = self._system
        if kind in ("refused", "dropped"):
            how = f"refuses a system prompt ({refusal!r})" if kind == "refused" else "drops a system prompt"
            raise UsageError(
                f"{self.tokenizer.where}: the chat template {how}; make the teacher by fine-tuning, or write the text "
                "in front of the user's message"
            )

    def _render(self, messages: list[Message], *, answer_next: bool) -> str:
        return self._program.render(messages, answer_next=answer_next, today=self._today)

    def _unmistakable(self, text: str) -> str:
        """The text with a mark inside whatever would be read as a special token."""
        if self.tokenizer.control.isdisjoint(self.tokenizer.encode(text)):
            return text
        return self._special.sub(lambda found: f"{found[0][0]}{_MARK}{found[0][1:]}", text)

    def _encode(self, text: str, continuing: bool = False) -> list[int]:
        if _MARK not in text:
            return self.tokenizer.encode(text, continuing=continuing)
        ids: list[int] = []
        # The template's special tokens are unmarked: cut the text at them, and what is between is plain.
        for i, part in enumerate(self._special.split(text)):
            if i % 2:
                ids.extend(self.tokenizer.encode(part))
            elif part:
                part = part.replace(_MARK, "")
                ids.extend(self.tokenizer.encode(part, special=False, continuing=continuing or bool(ids)))
        return ids

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        added = self.tokenizer.backend.get_added_tokens_decoder().values()
        names = sorted((token.content for token in added if token.special), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    # ---- examining the template ----

    def _chosen(self, template: str) -> ChatTemplate:
        tokenizer = self.tokenizer
        if template == "auto":
            template = tokenizer.chat_template or "plain"
        named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "pad_token": tokenizer.pad}
        tokens = {name: str(tokenizer.token(id)) for name, id in named.items() if id is not None}
        if template != "plain":
            if "{" not in template:
                raise UsageError(
                    f"template {template[:60]!r} is none of 'auto', 'plain' and a template's text in Jinja"
                )
            return ChatTemplate(template, tokens, tokenizer.where)
        if tokenizer.eos is None:
            raise UsageError(
                f"{tokenizer.where}: the plain form needs an end-of-text token, and the tokenizer has none; give a "
                "chat template"
            )
        if not tokenizer.add_bos:
            tokens["bos_token"] = ""
        return ChatTemplate(chat_template.PLAIN, tokens, tokenizer.where)

    def _around_an_answer(self) -> tuple[str, str]:
        """What the template writes between the prompt and an answer, and behind the answer."""
        where = self.tokenizer.where
        whole = self._render([_message("user", _USER), _message("assistant", _ANSWER)], answer_next=False)
        before, found, tail = whole.removeprefix(self._asked).partition(_ANSWER)
        if not found:
            raise UsageError(
                f"{where}: the chat template leaves the assistant's message out; give another one, or 'plain'"
            )
        if not whole.startswith(self._asked) or before.strip():
            raise UsageError(
                f"{where}: the chat template opens an answer with {self._asked.partition(_USER)[2]!r}, but writes it "
                f"behind {whole.partition(_USER)[2].partition(_ANSWER)[0]!r}; let add_generation_prompt write the same"
            )
        return before, tail

    @functools.cached_property
    def _system(self) -> tuple[str, str, str]:
        """What becomes of a system prompt, the words of a refusal, and the rendered text."""
        try:
            text = self._render([_message("system", _SYSTEM), _message("user", _USER)], answer_next=True)
        except TemplateRefusal as refusal:
            return "refused", refusal.words, ""
        before, found, _ = text.partition(_SYSTEM)
        if not found:
            return "dropped", "", text
        folded = before.startswith(self._asked.partition(_USER)[0])
        return ("folded" if folded else "turn"), "", text

    @functools.cached_property
    def _injected(self) -> str:
        """The words before the first user's message that are neither special tokens nor the header of a user's turn."""
        before = self._asked.partition(_USER)[0]
        turns = [_message("user", _USER), _message("assistant", _ANSWER), _message("user", _AGAIN)]
        # The second question has the same header, so what the two have in common before them are no words of its own.
        between = self._render(turns, answer_next=True).partition(_ANSWER)[2].partition(_AGAIN)[0]
        first, second = self._special.split(before), self._special.split(between)
        while first and second and first[-1] == second[-1]:
            first, second = first[:-1], second[:-1]
        if len(first) % 2 and len(second) % 2:  # the last parts are text, no special tokens: they may end in a header
            header = sum(itertools.takewhile(bool, map(operator.eq, reversed(first[-1]), reversed(second[-1]))))
            first[-1] = first[-1][: len(first[-1]) - header]
        return _ROLE_NAME.sub("", "".join(first[::2]), count=1).strip()

    def _settled(self) -> str | None:
        """The system prompt of rows that have none: None for none."""
        if self.template_system == "default":
            return None
        if self.template_system != "none":
            self._require_system()
            return self.template_system
        if not self._injected:
            return None
        where = self.tokenizer.where
        mend = "give the words that shall stand there instead, or leave it at 'default'"
        if self._system[0] in ("refused", "dropped"):
            raise UsageError(f"{where}: the chat template's own words {self._injected!r} cannot be left out; {mend}")
        text = self._render([_message("system", ""), _message("user", _USER)], answer_next=True)
        if self._injected in text:
            raise UsageError(
                f"{where}: the chat template puts in {self._injected!r} before an empty system prompt too; {mend}"
            )
        return ""


@functools.lru_cache(maxsize=32)
def chat_of(where: str, digest: str, template: str, system: str, date: str) -> Chat:
    """How a checkpoint is spoken to, as the settings `chat` of a study say; opened and examined once a process.

    `digest` is the content of the checkpoint at `where`, which may change behind one path. Raises as `Chat` does.
    """
    return Chat(_tokenizer_of(where, digest), template, date=date or None, template_system=system)


@functools.lru_cache(maxsize=8)
def _tokenizer_of(where: str, digest: str) -> Tokenizer:
    return load_tokenizer(open_source(where))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
