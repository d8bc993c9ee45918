"""From a matplotlib figure to inline SVG in the page's own colours, the same bytes for the same figure."""

import contextlib
import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from subjax.report import style, words

WIDTH = 4.6  # inches: 442 CSS pixels, which a 390-pixel phone shows at four fifths, with 10-point type still 10 pixels


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure with what a reader who does not see it is told."""

    name: str
    """Unique on the page; letters, digits and dashes."""
    title: str
    caption: str
    alt: str
    figure: Any
    """A `matplotlib.figure.Figure`."""

    @property
    def wide(self) -> bool:
        """Whether it is to scroll inside its own container instead of being scaled down."""
        return bool(self.figure.get_figwidth() > WIDTH + 0.5)


def slug(text: Any) -> str:
    """Letters, digits and dashes, for names and anchors."""
    return re.sub(r"[^a-z0-9]+", "-", words.clean(text).lower()).strip("-")


@contextlib.contextmanager
def drawing(name: str) -> Iterator[None]:
    """Settings for making and saving a figure: our own, whatever the reader's matplotlibrc says."""
    import matplotlib

    ink, muted, rule = (style.light(name) for name in ("ink", "muted", "rule"))
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none", "svg.hashsalt": f"subjax {name}", "text.parse_math": False,
                "font.size": 10, "axes.labelsize": 10, "xtick.labelsize": 9.5, "ytick.labelsize": 10,
                "legend.fontsize": 9.5, "axes.titlesize": 10.5, "axes.titlelocation": "left",
                "text.color": ink, "axes.labelcolor": muted, "axes.edgecolor": muted,
                "xtick.color": muted, "ytick.color": ink, "grid.color": rule, "grid.linewidth": 0.7,
                "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
                "axes.linewidth": 0.8, "axes.axisbelow": True, "ytick.major.size": 0, "xtick.major.size": 3,
                "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
                "legend.frameon": False, "figure.constrained_layout.use": True, "lines.solid_capstyle": "round",
            }
        )  # fmt: skip
        # A label in a script that matplotlib's own font lacks is still right on the page, whose fonts are the reader's.
        warnings.filterwarnings("ignore", message=r"(?s).*(Glyph|constrained_layout|Matplotlib currently does not).*")
        yield


def draw(name: str, paint: Callable[[], Any]) -> Any:
    """The figure that `paint` makes under the page's settings."""
    with drawing(name):
        return paint()


def inline(plot: Plot) -> str:
    """The plot as one `<svg>` element: text as text, colours as CSS variables, no date, no stray ids, no doctype."""
    buffer = io.StringIO()
    with drawing(plot.name):
        plot.figure.savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg ") : text.rindex("</svg>") + len("</svg>")]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' transform="rotate\(-0 [^"]*\)"', "", text)
    text = re.sub(r"<text style=\"([^\"]*?)font-family: [^;\"]*;? ?", r'<text style="\1', text)
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', text))
    text = re.sub(r' id="([\w.-]+)"', lambda found: found[0] if found[1] in used else "", text)
    variables = style.variables()
    text = re.sub(
        r'style="[^"]*"',
        lambda found: re.sub(r"#[0-9a-f]{6}", lambda colour: variables.get(colour[0], colour[0]), found[0]),
        text,
    )
    text = re.sub(r"\s*\n\s*", " ", text)
    text = re.sub(r"> <", "><", text)
    return _root(text, plot)


def _root(text: str, plot: Plot) -> str:
    """The same drawing under a root element that has a size in CSS pixels and a label."""
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None, "matplotlib writes a viewBox"
    width, height = (round(float(side) * 96 / 72) for side in box[1].split()[2:])
    root = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box[1]}" '
        f'width="{width}" height="{height}" role="img" aria-label="{words.escape(plot.alt)}">'
    )
    return root + text[text.index(">") + 1 :]


def save_png(plot: Plot, path: Any, dpi: int = 200) -> None:
    """Write the plot as a PNG on the light page's ground."""
    buffer = io.BytesIO()
    with drawing(plot.name):
        plot.figure.savefig(buffer, format="png", dpi=dpi, facecolor=style.light("paper"), metadata={"Software": None})
    path.write_bytes(buffer.getvalue())
