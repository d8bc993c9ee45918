"""Colours for light and dark, and the page's style sheet and script: text only, no plotting library."""

from collections.abc import Sequence

# name: (on light, on dark). The light colour is what a figure is drawn with; on the page it becomes var(--name),
# so every light colour is used once. Each one was chosen for at least 3:1 on its ground, text colours for 4.5:1.
PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#fdfdfb", "#14171c"),
    "ink": ("#1c2026", "#e9e7e2"),
    "muted": ("#59616c", "#a9b1bc"),
    "rule": ("#d8dadd", "#363d47"),
    "faint": ("#f3f3ef", "#1c2027"),
    "link": ("#1c5a9c", "#86b9f2"),
    "orange": ("#bf4a0b", "#f2914f"),
    "blue": ("#2166ac", "#6caef2"),
    "teal": ("#0d756c", "#4ac6b3"),
    "ochre": ("#8f6400", "#dcb341"),
    "purple": ("#7a3f9d", "#c99dec"),
    "pink": ("#ad3175", "#f290c0"),
    "grey": ("#6b727c", "#98a1ad"),
}
ARM_COLOURS = {
    "same-base": "orange", "cross-init": "blue", "cross-family": "teal", "shuffled": "ochre",
    "logits": "purple", "logits-leak": "pink",
}  # fmt: skip
SERIES = ("blue", "orange", "teal", "purple", "ochre", "pink", "grey")
STEPS = 21  # steps of the diverging map; the middle one is "no difference"
_DIVERGING = {
    "light": ("#1f65ab", "#9cc3df", "#f5f5f2", "#f6b98a", "#c04b0d"),
    "dark": ("#78b6f4", "#315a86", "#252a32", "#8a4a1e", "#f79a58"),
}


def light(name: str) -> str:
    """The colour that a figure is drawn with."""
    return heat_colours()[name][0] if name.startswith("heat") else PALETTE[name][0]


def arm_colour(arm: str) -> str:
    """The palette's name for an arm: colours for the arms that a claim is about, grey for the controls."""
    return ARM_COLOURS.get(arm, "grey")


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _between(anchors: Sequence[str], position: float) -> str:
    """The colour at `position` in [0, 1] of a line through the anchors."""
    place = position * (len(anchors) - 1)
    index = min(int(place), len(anchors) - 2)
    pairs = zip(_channels(anchors[index]), _channels(anchors[index + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - index)):02x}" for a, b in pairs)


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb` in [0, 1] (WCAG 2.1)."""
    parts = [c / 255 for c in _channels(colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.1)."""
    bright, dim = sorted((luminance(first), luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _clearer(ground: str, *inks: str) -> str:
    contrasts = [contrast(ink, ground) for ink in inks]
    return inks[contrasts.index(max(contrasts))]


def heat_colours() -> dict[str, tuple[str, str]]:
    """`heat-0` … `heat-20` and the ink that reads on each, on light and on dark; the light ones are all different."""
    found = {}
    for step in range(STEPS):
        fills = tuple(_between(_DIVERGING[mode], step / (STEPS - 1)) for mode in ("light", "dark"))
        grounds = ((fills[0], 0xEB - step), (fills[1], 0xFF))
        inks = [_clearer(fill, f"#1111{step:02x}", f"#ffff{blue:02x}") for fill, blue in grounds]
        found[f"heat-{step}"] = (fills[0], fills[1])
        found[f"heat-ink-{step}"] = (inks[0], inks[1])
    return found


def variables() -> dict[str, str]:
    """From a figure's colour to the CSS variable that stands for it on the page."""
    return {pair[0]: f"var(--{name})" for name, pair in (PALETTE | heat_colours()).items()}


def css() -> str:
    """The page's style sheet."""
    colours = PALETTE | heat_colours()
    on_light = "".join(f"--{name}:{pair[0]};" for name, pair in colours.items())
    on_dark = "".join(f"--{name}:{pair[1]};" for name, pair in colours.items())
    return (
        f":root{{color-scheme:light;{on_light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light])"
        f"{{color-scheme:dark;{on_dark}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{color-scheme:dark;{on_dark}}}}}\n{_RULES}"
    )


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth;scroll-padding-top:1rem}
body{margin:0;background:var(--paper);color:var(--ink);overflow-wrap:break-word;
 font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,main,footer{max-width:66rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2.25rem;display:flex;gap:1rem;justify-content:space-between;align-items:flex-start}
header p{margin:0;color:var(--muted);font-size:.9rem}
.eyebrow b{color:var(--ink)}
button{font:inherit;color:inherit;background:none;border:1px solid var(--rule);border-radius:.4rem;cursor:pointer}
#theme{font-size:.8rem;padding:.2rem .65rem;color:var(--muted);flex:none}
button:hover{border-color:var(--muted)}
:focus-visible{outline:2px solid var(--link);outline-offset:2px;border-radius:2px}
a{color:var(--link);text-underline-offset:.15em;text-decoration-thickness:1px}
h1{font-size:clamp(1.5rem,1.1rem + 2vw,2.4rem);line-height:1.2;letter-spacing:-.015em;margin:1.1rem 0 .6rem;
 font-weight:680;text-wrap:balance;max-width:48rem}
h2{font-size:1.4rem;line-height:1.25;letter-spacing:-.01em;margin:0 0 .5rem;font-weight:650;text-wrap:balance}
h3{font-size:1rem;margin:1.5rem 0 .4rem;font-weight:650}
p{margin:.5rem 0;max-width:44rem}
section{margin:3.2rem 0 0;padding-top:1.4rem;border-top:1px solid var(--rule)}
section:first-of-type{border:0;margin:0;padding:0}
.lead{font-size:1.1rem;line-height:1.5}
.big{display:flex;flex-wrap:wrap;align-items:baseline;gap:.2rem 1rem;margin:1rem 0 .2rem}
.big b{font-size:clamp(3rem,2.2rem + 4vw,4.6rem);line-height:1;font-weight:700;letter-spacing:-.03em;
 color:var(--orange);font-variant-numeric:tabular-nums}
.big span{font-size:1.05rem;color:var(--muted)}
.note{color:var(--muted);font-size:.9rem}
.empty{color:var(--muted);font-style:italic}
nav{margin:1.4rem 0 0;font-size:.88rem;color:var(--muted)}
nav ul{list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:.15rem 1.1rem}
nav a{display:inline-block;padding:.2rem 0;text-decoration:none}
nav a:hover{text-decoration:underline}
.split{display:grid;grid-template-columns:minmax(0,1fr);gap:1.5rem 2.2rem;align-items:start}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,17.5rem),1fr));
 gap:1.5rem 2rem;align-items:start}
@media(min-width:60rem){.split{grid-template-columns:repeat(2,minmax(0,1fr))}}
figure{margin:1rem 0 0;min-width:0}
figcaption{font-size:.88rem;line-height:1.45;color:var(--muted);max-width:44rem;margin-top:.35rem}
figcaption b{color:var(--ink);font-weight:600}
figure svg{display:block;max-width:100%;height:auto;font-family:system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;stroke-linejoin:round}
.scroll+.scroll,.split+.scroll,p+.scroll{margin-top:1.4rem}
.split>div.scroll{margin-top:.6rem}
.scroll{overflow-x:auto;max-width:100%;overscroll-behavior-x:contain}
figure .scroll svg{max-width:none}
.tall{max-height:36rem;overflow-y:auto;border:1px solid var(--rule);border-radius:.4rem}
table{border-collapse:collapse;font-size:.875rem;line-height:1.4;font-variant-numeric:tabular-nums;width:100%}
caption{text-align:left;color:var(--muted);font-size:.88rem;padding:0 0 .4rem;caption-side:top}
.tall caption{padding:.5rem .6rem}
th,td{text-align:left;vertical-align:top;padding:.38rem .75rem .38rem 0;border-bottom:1px solid var(--rule)}
.tall th:first-child,.tall td:first-child{padding-left:.6rem}
thead th{font-weight:600;color:var(--muted);vertical-align:bottom;border-bottom-color:var(--muted)}
tbody th{font-weight:600}
.n{text-align:right;white-space:nowrap}
.k{white-space:nowrap}
.w{min-width:15rem}
.told th,.told td{border-bottom:0;padding-bottom:.1rem}
.said td{padding-top:0}
.said div{position:sticky;left:0;width:fit-content;max-width:min(100vw - 2.5rem,52rem);color:var(--muted);
 font-size:.82rem;line-height:1.4}
.row{white-space:pre-wrap;overflow-wrap:anywhere;min-width:11rem;font:.82rem/1.45 ui-monospace,Menlo,Consolas,monospace}
.tall thead th{position:sticky;top:0;background:var(--paper);box-shadow:inset 0 -1px var(--muted)}
th button{border:0;padding:0;font-weight:inherit;text-align:inherit}
th[aria-sort=ascending] button:after{content:" ↑"}
th[aria-sort=descending] button:after{content:" ↓"}
details{margin:.15rem 0}
summary{cursor:pointer;padding:.12rem 0}
details details{margin-left:1.1rem;padding-left:.6rem;border-left:1px solid var(--rule)}
.leaf{margin:.15rem 0 .15rem 1.1rem;padding-left:.6rem;border-left:1px solid var(--rule)}
.tree{font-size:.875rem}
.tree code{color:var(--muted)}
:target>summary{background:var(--faint);box-shadow:-.4rem 0 var(--faint),.4rem 0 var(--faint)}
code,pre{font:.85em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{overflow:auto;max-height:32rem;background:var(--faint);padding:1rem;border-radius:.4rem}
dl{display:grid;grid-template-columns:minmax(0,1fr);gap:.1rem 1.5rem;max-width:52rem}
dt{font-weight:600;margin-top:.5rem}
dd{margin:0;color:var(--muted)}
@media(max-width:30rem){th,td{padding-right:.5rem}tbody th{min-width:8rem}}
@media(min-width:46rem){dl{grid-template-columns:10rem minmax(0,1fr);gap:.5rem 1.5rem}dt{margin:0}}
ul.plain{padding-left:1.1rem;margin:.5rem 0;max-width:44rem}
footer{margin-top:3.5rem;padding-top:1rem;padding-bottom:3rem;color:var(--muted);font-size:.85rem}
@media print{#theme,nav{display:none}body{font-size:10pt}section{margin-top:1.4rem}
 figure,tr{break-inside:avoid}h2,h3{break-after:avoid}.tall,pre{max-height:none;overflow:visible;border:0}
 .tall thead th{position:static}.scroll{overflow:visible}.scroll svg{max-width:100%!important}a{color:inherit}}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""

SCRIPT = """
"use strict";
const root = document.documentElement, toggle = document.getElementById("theme");
const system = () => matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
const dark = () => (root.dataset.theme || system()) === "dark";
const name = () => { toggle.textContent = dark() ? "Light" : "Dark"; };
const follow = () => {
  const hash = decodeURIComponent(location.hash.slice(1));
  if (hash === "dark" || hash === "light") { root.dataset.theme = hash; name(); return; }
  const aim = hash && document.getElementById(hash);
  if (!aim) return;
  for (let box = aim; box; box = box.parentElement) if (box.tagName === "DETAILS") box.open = true;
  aim.scrollIntoView();
};
toggle.hidden = false;
toggle.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
addEventListener("hashchange", follow);
name();
follow();
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const order = (a, b) => {
        const x = key(a), y = key(b);
        if (x === "" || y === "") return (x === "") - (y === "");
        const sign = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return down ? -sign : sign;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
"""
