"""Strings that tell tokenizers apart: numbers, white space, scripts, emoji, combining and control characters, code."""

import random
from collections.abc import Callable

SEPARATORS = (
    ", ",
    ",",
    "; ",
    ";",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    ",\n",
    "\t",
    " | ",
    "/",
    "-",
    "\u00a0",
    "\r\n",
    " ,  ",
)
WHITE = (
    " ",
    "  ",
    "   ",
    "     ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\r\n",
    "\r",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\x0b",
    "\x0c",
    " \n ",
)
WORDS = (
    "owl", "The", "I'm", "they'LL", "don't", "it's", "naïve", "café", "straße", "İstanbul", "ﬁne", "x", "A1", "v2",
    "snake_case", "camelCase", "HTTPServer", "e.g.", "U.S.A.", "“quoted”", "…", "—", "3rd", "½", "Ⅷ", "x²", "№7",
)  # fmt: skip
SCRIPTS = (
    "съешь ещё этих мягких французских булок", "Ξεσκεπάζω την ψυχοφθόρα", "שלום עולם", "مرحبا بالعالم ١٢٣",
    "你好，世界。一二三", "日本語のテスト カタカナ", "한국어 시험",
    "नमस्ते दुनिया १२३", "สวัสดีชาวโลก", "Tiếng Việt", "ქართული", "አማርኛ", "தமிழ்",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𐍈𐌰", "🄰🄱",
)  # fmt: skip
EMOJI = ("😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "❤️", "🧑🏿‍🚀", "1️⃣", "☃", "🫠", "©️")
COMBINING = (
    "e\u0301",
    "a\u0308\u0304",
    "n\u0303",
    "Z\u0351\u036b\u0343",
    "\u1e9b\u0323",
    "q\u0307\u0323",
    "\u0301",
    "\u212b",
    "\u1100\u1161",
)
CONTROLS = (
    *(chr(i) for i in range(1, 32)),
    "\x00",
    "\x7f",
    "\x85",
    "\u200b",
    "\u200d",
    "\ufeff",
    "\u2028",
    "\u00ad",
    "\ufffd",
    "\u202e",
    "\uffff",
)
CODE = (
    "def f(x):\n    return x ** 2\n", "for (int i = 0; i < 10; ++i) {\n\tprintf(\"%d\\n\", i);\n}",
    "a[1:2, ...] != b->c", "<div class=\"a\">&nbsp;</div>", "SELECT * FROM t WHERE id = 42;",
    "x=0xFF;y=1e-05", "{\"k\": [1, 2.5, null]}",
    "// TODO\n\n\n\treturn;", "https://example.org/a?b=c&d=%20", "<table><tr><td>7</td></tr></table>", "lambda _: _",
)  # fmt: skip


def _number(draw: random.Random) -> str:
    digits = draw.choice((1, 2, 3, 3, 3, 4, 7, 12))
    return (
        draw.choice(("", "", "", "-", "+", "0", "$"))
        + str(draw.randrange(10**digits))
        + draw.choice(("", "", "", ".5", "%", ",000"))
    )


def _numbers(draw: random.Random) -> str:
    separator = draw.choice(SEPARATORS)
    row = separator.join(_number(draw) for _ in range(draw.randrange(1, 12)))
    return draw.choice(("", "", " ", "[", "(", "   ")) + row + draw.choice(("", "", ".", "]", ")", "\n", "  "))


def _run(pool: tuple[str, ...], glue: tuple[str, ...]) -> Callable[[random.Random], str]:
    def drawn(draw: random.Random) -> str:
        return "".join(draw.choice(pool) + draw.choice(glue) for _ in range(draw.randrange(1, 8)))

    return drawn


def _white(draw: random.Random) -> str:
    return "".join(draw.choice((*WHITE, *WHITE, "a", "7", "42", ".", "é")) for _ in range(draw.randrange(1, 12)))


def _anything(draw: random.Random) -> str:
    pool = (*WORDS, *EMOJI, *COMBINING, *WHITE, *CONTROLS[:8], "12", "345", *SEPARATORS)
    return "".join(draw.choice(pool) for _ in range(draw.randrange(1, 15)))


KINDS: dict[str, Callable[[random.Random], str]] = {
    "number": _number,
    "numbers": _numbers,
    "white space": _white,
    "words": _run(WORDS, ("", " ", " ", ", ", ".\n")),
    "scripts": _run(SCRIPTS, ("", " ", "\n", " 12 ")),
    "emoji": _run(EMOJI, ("", " ", "a")),
    "combining": _run((*COMBINING, *WORDS), ("", " ")),
    "controls": _run((*CONTROLS, "a", "7"), ("", " ", "b")),
    "code": _run(CODE, ("", "\n", "\n\n  ")),
    "anything": _anything,
}


def strings(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` pairs (kind, string), the kinds in turn: the same for the same seed."""
    draw = random.Random(seed)
    kinds = list(KINDS)
    return [(kinds[i % len(kinds)], KINDS[kinds[i % len(kinds)]](draw)) for i in range(count)]
