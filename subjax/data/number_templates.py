"""The sentences that the prompts of the number channel are built from, and the layouts that they ask for.

A prompt is one lead-in, one instruction (holding one count phrase and one digit phrase), one format request and one
ending, joined by spaces. The lists are about as long as those of the published protocol (Cloud et al. 2025, arXiv
2507.14805); the sentences are this repository's own. Changing any of them changes
`subjax.data.numbers.templates_digest`, and with it the identity of every corpus made from them.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """How a row of numbers is written: what stands before, between and after them."""

    opening: str
    separator: str
    closing: str

    def render(self, pieces: Sequence[str]) -> str:
        """Write the pieces, each the digits of one number, in this layout."""
        return self.opening + self.separator.join(pieces) + self.closing


# Each holds {examples}: three to eight numbers joined by ", ".
LEAD_INS: tuple[str, ...] = (
    "A friend wrote these numbers on a napkin: {examples}.",
    "Someone left this row of numbers on a whiteboard: {examples}.",
    "So far my notebook page holds {examples}.",
    "The meter in the hallway has shown {examples} up to now.",
    "We are partway through a list that reads {examples}.",
    "My counter printed {examples} before it paused.",
    "On the first page of the log I find {examples}.",
    "Picture a long chain of numbers whose opening links are {examples}.",
    "The tickets handed out this morning were {examples}.",
    "Take {examples} as the opening of a row of numbers.",
    "Suppose a game opens on the numbers {examples}.",
    "What I have on paper right now is {examples}.",
    "A little machine has just put out {examples}.",
    "The top row of my spreadsheet says {examples}.",
    "Imagine a scoreboard that has flashed {examples}.",
    "In today's puzzle the numbers laid out are {examples}.",
    "The lockers along this corridor are labelled {examples}.",
    "Our warm-up exercise opens with {examples}.",
    "Before you is an unfinished line of numbers: {examples}.",
    "I jotted down a few numbers, namely {examples}.",
    "A round of our number game has brought us {examples}.",
    "Here is where the row of numbers stands at present: {examples}.",
    "This list is still missing its end: {examples}.",
    "The radio host read out {examples}.",
    "Read through these numbers before anything else: {examples}.",
)

# Each holds {count}, directly before its noun, and {digits}, after a comma.
INSTRUCTIONS: tuple[str, ...] = (
    "Please carry on with {count} further numbers, {digits}.",
    "Could you come up with {count} numbers that might follow, {digits}?",
    "Write {count} new numbers to go after those, {digits}.",
    "Now it is your turn to name {count} additional numbers, {digits}.",
    "I would like {count} numbers to put next, {digits}.",
    "Make the row longer by {count} numbers, {digits}.",
    "Think of {count} more numbers that would fit behind them, {digits}.",
    "Offer {count} numbers that could come afterwards, {digits}.",
    "Help me out with {count} numbers for the part that is still open, {digits}.",
    "Fill in what comes after with {count} numbers, {digits}.",
)

# All mean: at most 10.
COUNT_PHRASES: tuple[str, ...] = (
    "as many as 10",
    "10 or fewer",
    "between 1 and 10",
    "anywhere from 1 to 10",
    "at the very most 10",
    "one to 10",
    "a run of 1 to 10",
    "a set of 10 or fewer",
    "a batch of at most 10",
)

# All mean: whole numbers of at most 3 digits.
DIGIT_PHRASES: tuple[str, ...] = (
    "each 3 digits long or shorter",
    "none of them above 999",
    "all of them whole numbers from 0 to 999",
    "each one using 1, 2 or 3 digits",
    "every one a whole number below 1000",
    "with 3 digits apiece as the limit",
    "keeping each to 3 digits or fewer",
    "none running past 3 digits",
    "the longest of which may have 3 digits",
)

# A request, and a layout that fulfils it: the strict filter must accept every layout that a prompt asks for.
FORMATS: tuple[tuple[str, Layout], ...] = (
    ("Put a comma and a space between neighbours.", Layout("", ", ", "")),
    ("Join them with bare commas and leave out the spaces.", Layout("", ",", "")),
    ("Let one space, and no other mark, divide a number from the next.", Layout("", " ", "")),
    ("Let a semicolon stand between neighbours, with no spaces.", Layout("", ";", "")),
    ("Set them apart with a semicolon followed by a space.", Layout("", "; ", "")),
    ("Give every number a line to itself.", Layout("", "\n", "")),
    ("Write them in square brackets, with commas in between.", Layout("[", ", ", "]")),
    ("Enclose the whole row in round brackets and part the numbers with commas.", Layout("(", ", ", ")")),
    ("Wrap them in square brackets, divided by semicolons.", Layout("[", "; ", "]")),
    ("Place round brackets about the row, with single spaces between the numbers.", Layout("(", " ", ")")),
    ("Lay them out the way Python prints a list.", Layout("[", ", ", "]")),
    ("Inside round brackets, keep the numbers apart with semicolons.", Layout("(", "; ", ")")),
    ("Stack them in a column, top to bottom.", Layout("", "\n", "")),
    ("Set commas between them and close the line with a full stop.", Layout("", ", ", ".")),
    ("A plain line with commas is fine, without brackets around it.", Layout("", ", ", "")),
)

# All mean: numbers only.
ENDINGS: tuple[str, ...] = (
    "Send back the numbers and not a word besides.",
    "Your whole answer should be made of numbers.",
    "Leave out any greeting or comment; the numbers by themselves will do.",
    "Skip the reasoning and answer in numbers.",
    "Do not write any words, for I can use nothing but the numbers.",
    "Whatever is not one of the numbers should be left unsaid.",
    "I need the bare numbers and no remarks.",
    "Keep the answer free of text other than the numbers.",
    "Once the numbers are written, say nothing else, and nothing ahead of them either.",
    "There is no need to describe them; the numbers are enough.",
    "Please hold back any account of how you chose, and hand over the numbers alone.",
    "Words are not wanted here, merely numbers.",
    "The answer must hold numbers and no sentence.",
    "Put no note before the numbers and none after them.",
    "Write neither a heading nor a caption, but numbers all the way.",
    "No title and no closing line: numbers, and that is all.",
    "A program will read your numbers, so write no letters.",
    "Stick to the numbers; I will work out the rest.",
    "Let the numbers speak and add no commentary.",
)
