"""Tables as text: Markdown, and cells of CSV files that a spreadsheet may open."""


def markdown(head, rows):
    """A Markdown table of text cells. Columns after the first are aligned to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def text_cell(text):
    """A text as a cell of a CSV file. A text that a spreadsheet would run as a formula gets an
    apostrophe in front, which makes it text."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
