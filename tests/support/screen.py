"""What a terminal shows of the bytes that it was sent: as much of one as a progress line needs."""

import re

TOKEN = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[\?\d+[hl]|\x1b\[[\d;]*m|\r|\n|[^\x1b\r\n]+")


def screen(sent: str) -> list[str]:
    """The lines that stand there in the end, down to the last with words.

    Knows lines that are erased and overwritten, and the cursor going up.
    """
    lines, row, column = [""], 0, 0
    for token in TOKEN.finditer(sent):
        if token[0] == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif token[0] == "\r":
            column = 0
        elif token[2] == "K":
            assert token[1] == "2"
            lines[row] = ""
        elif token[2] == "A":
            row -= int(token[1] or 1)
        elif not token[0].startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + token[0] + lines[row][column + len(token[0]) :]
            column += len(token[0])
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.rstrip() for line in lines]
