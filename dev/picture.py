"""Turn what a command wrote to a terminal into a picture of that terminal.

    COLUMNS=100 script -qc 'python -m nibble demo --steps 40' demo.ansi
    python dev/picture.py demo.ansi docs/demo.svg --title 'make demo'

The text is replayed as a terminal would show it in the end (live views rewrite their own lines) and
drawn by rich, whose `export_svg` makes the file. Only what rich itself writes is understood: line
feeds, returns, "up a line", "erase the line" and colours. `--cut FIRST:LAST` leaves lines out (from
1, of the replayed text), as often as needed; `…` takes their place. Folders before the name of a
.gguf file are left out, so that a picture names no machine.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from rich.console import Console
from rich.text import Text

CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|\x1b\]8;[^\x1b\x07]*(?:\x1b\\|\x07)|[\r\n]")
FOLDERS = re.compile(r"(?:[\w.\-+]*/)+(?=[\w.\-]+\.gguf)")
SCRIPT = ("Script started on", "Script done on")
DRAWN = re.compile(r'<text ([^>]*?)x="([\d.]+)"([^>]*?)textLength="[\d.]+"([^>]*)>([^<]*)</text>')
SPACE, CELL = "&#160;", 12.2
"""How rich writes a space, and how wide it draws a character."""


def replay(raw: str) -> list[str]:
    """The lines that stand on the screen when the command is done, colours still as codes.

    A line that is written again from its start without being erased is replaced as a whole: rich
    erases before it writes, so nothing of the old text would have remained.
    """
    lines, row, fresh, colour = [""], 0, False, ""
    position = 0

    def write(text: str) -> None:
        nonlocal fresh
        if text and fresh:
            lines[row], fresh = colour, False
        lines[row] += text

    for found in CONTROL.finditer(raw):
        write(raw[position : found.start()])
        position = found.end()
        sign, argument, command = found[0], found[1], found[2]
        if sign == "\n":
            row += 1
            fresh = row < len(lines)
            if row == len(lines):
                lines.append(colour)
        elif sign == "\r":
            fresh = True
        elif command == "A":
            row = max(0, row - int(argument or 1))
        elif command == "K":
            lines[row] = ""
        elif command == "m":
            colour = "" if argument in ("", "0") else sign
            # A colour is no text: it does not make a returned line a new one.
            if not fresh:
                lines[row] += sign
    write(raw[position:])
    return [line for line in lines if not Text.from_ansi(line).plain.startswith(SCRIPT)]


def cut(lines: list[str], ranges: list[tuple[int, int]]) -> list[str]:
    """The lines without each range (1-based, ends included), one `…` in place of it."""
    kept = []
    for number, line in enumerate(lines, start=1):
        inside = [first for first, last in ranges if first <= number <= last]
        if not inside:
            kept.append(line)
        elif number in inside:
            kept.append("…")
    return kept


def trim(lines: list[str]) -> list[str]:
    """Without empty lines at both ends, and never two of them in a row."""
    kept: list[str] = []
    for line in lines:
        if Text.from_ansi(line).plain.strip() or (kept and Text.from_ansi(kept[-1]).plain.strip()):
            kept.append(line)
    while kept and not Text.from_ansi(kept[-1]).plain.strip():
        kept.pop()
    return kept


def draw(lines: list[str], *, width: int, title: str) -> str:
    """The SVG of a terminal that shows these lines."""
    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True)
        for line in lines:
            console.print(Text.from_ansi(line), overflow="fold")
        svg = console.export_svg(title=title, unique_id="nibble")
    # A picture in a page needs no fonts from elsewhere.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return DRAWN.sub(without_margins, svg)


def without_margins(drawn: re.Match[str]) -> str:
    """A piece of text that begins and ends with a character: some viewers drop spaces there."""
    before, x, middle, after, text = drawn.groups()
    cells = re.findall(r"&#?\w+;|.", text, re.DOTALL)
    first = next((i for i, cell in enumerate(cells) if cell != SPACE), len(cells))
    last = next((i for i, cell in enumerate(cells[::-1]) if cell != SPACE), 0)
    kept = cells[first : len(cells) - last]
    if not "".join(kept).strip():
        return ""
    left, length = float(x) + first * CELL, len(kept) * CELL
    return (
        f'<text {before}x="{left:.1f}"{middle}textLength="{length:.1f}"{after}>'
        f"{''.join(kept)}</text>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="A terminal's text to a picture.")
    parser.add_argument("text", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--title", default="nibble")
    parser.add_argument("--width", type=int, default=100)
    parser.add_argument("--cut", action="append", default=[], metavar="FIRST:LAST")
    parser.add_argument("--show", action="store_true", help="print the numbered lines as well")
    words = parser.parse_args()
    # Bytes, because reading as text would turn returns into line feeds.
    raw = FOLDERS.sub("", words.text.read_bytes().decode(errors="replace"))
    lines = trim(replay(raw))
    if words.show:
        for number, line in enumerate(lines, start=1):
            print(f"{number:4} {Text.from_ansi(line).plain}")
    ranges = [tuple(map(int, part.split(":"))) for part in words.cut]
    svg = draw(cut(lines, ranges), width=words.width, title=words.title)
    words.svg.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
