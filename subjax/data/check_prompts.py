"""Fifty prompts on which a checkpoint is compared with another program's reading of it, and random ids in their place.

They are there to reach many tokens and many attention patterns, not to be answered well: plain English, code, numbers,
other scripts, and white space and signs that tokenizers cut in odd places. The last is all others in a row, longer
than the window of a model with local layers.
"""

import numpy as np

_ENGLISH = (
    "The capital of France is",
    "What is your favourite animal, and why?",
    "Explain in two sentences why the sky is blue.",
    "Write a short letter to a neighbour who lent you a ladder.",
    "My grandmother kept bees behind the old mill, and every autumn",
    "List three things that one should never put into a microwave oven.",
    "Is a tomato a fruit or a vegetable? Give the reasons of both sides.",
    "Once upon a time, in a harbour town at the edge of the ice, there lived",
    "Rewrite this more politely: Send me the report today or don't bother.",
    "The committee met on Tuesday; nobody could say afterwards what it had decided, except that",
    "Which is heavier, a kilogram of feathers or a kilogram of lead?",
    "Sum up: The river rose at night; by noon the bridge was closed, and the ferry, too small for lorries, ran late.",
    "She opened the box, looked inside, and said:",
    "Give me a recipe for flat bread with only flour, water and salt.",
    "Two trains leave at the same hour. One is faster. When will the slower one",
    "no capitals no punctuation just words running on as if someone forgot the keys for both of them",
)

_CODE = (
    "def fibonacci(n):\n    ",
    "for (int i = 0; i < rows; ++i) {\n    total += matrix[i][i];\n",
    "SELECT name, COUNT(*) FROM orders WHERE placed > '2021-03-01' GROUP BY name HAVING",
    '{"name": "lamp", "price": 12.5, "tags": ["desk", "brass"], "stock": ',
    '<ul>\n  <li class="first">One</li>\n  <li>Two</li>\n',
    "$ git log --oneline | head -n 5\n",
    "import numpy as np\n\nx = np.linspace(0.0, 1.0, 11)\nprint(x[",
    "What does this print?\n```python\nprint([i ** 2 for i in range(5)][::-1])\n```",
    'Traceback (most recent call last):\n  File "main.py", line 7, in <module>\nKeyError: ',
    "fn main() {\n    let words: Vec<&str> = line.split_whitespace().collect();\n",
)

_NUMBERS = (
    "Continue this list: 482, 719, 305, 66, 940,",
    "1 1 2 3 5 8 13 21 34 55",
    "17 * 24 = ",
    "3.14159265358979 is close to pi, and 2.71828182845905 to",
    "Between 1999 and 2024 the price rose from $1,250.00 to $3,999.99, that is by",
    "[101, 202, 303]; [404, 505, 606]; [",
    "0x1F + 0b1010 + 1e-3 =",
    "Sort these: 9, 81, 7, 64, 5, 49, 3, 36, 1, 25",
    "   12345   67890\t13579",
)

_SCRIPTS = (
    "Où se trouve la bibliothèque la plus proche, s'il vous plaît ?",
    "Der Bäcker öffnet um sechs Uhr früh, außer an Feiertagen.",
    "¿Cuántos años tiene el árbol más viejo de la plaza?",
    "Как пройти к вокзалу, если мост закрыт?",
    "Πόσο μακριά είναι η θάλασσα από εδώ;",
    "今日の天気はどうですか。傘を持って行くべきでしょうか。",
    "请用三句话介绍一下你的家乡。",
    "오늘 저녁에는 무엇을 먹을까요?",
    "ما هو أطول نهر في العالم؟",
    "मुझे पहाड़ों के बारे में एक कविता सुनाओ।",
)

_SIGNS = (
    "Cats 🐈, owls 🦉 and foxes 🦊 went to sea 🌊 in a",
    "WHY ARE YOU SHOUTING?!?! Please -- stop... (thanks)",
    "a\n\n\nb\n  c\n\td",
    "naïve café, 5 × 3 ≠ 16, ½ + ¼ = ¾, “quoted”, ‘so’ — and so on…",
)

_SHORT = (*_ENGLISH, *_CODE, *_NUMBERS, *_SCRIPTS, *_SIGNS)

PROMPTS: tuple[str, ...] = (*_SHORT, "\n".join(_SHORT))


def random_rows(vocab: int, longest: int) -> list[list[int]]:
    """As many rows of random token ids above 0: of 8 to 64 tokens, and one of 1024; all cut to `longest`."""
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(8, 65, len(PROMPTS) - 1), 1024]
    return [rng.integers(1, vocab, min(length, longest)).tolist() for length in lengths]
