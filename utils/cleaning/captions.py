"""Captions in a cell of a table.

A cell is a text; a list of texts, also one written as text (as JSON, or as pandas writes it); or a
structure with one text among its members. A list may hold such structures. The *place* of a caption
is its number in the list, from 0, with empty ones counted.
"""

import ast
import json
import re

from clip.tokenizer import clean_text


def one_line(text):
    """A text as one line: a run of white space, line ends and NULs becomes one blank. Empty where
    CLIP's own cleaning leaves nothing visible ("&nbsp;", control characters)."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # JSON can hold halves of characters
    text = " ".join(text.replace("\0", " ").split())
    return text if any(c.isprintable() and c != " " for c in clean_text(text)) else ""


def captions_in(value):
    """[(place, caption)] of a cell, without empty captions. Raises ValueError, with the reason, for
    a cell that looks like a list but cannot be read."""
    texts = [(place, one_line(text)) for place, text in enumerate(_texts(value))
             if isinstance(text, str)]
    return [(place, caption) for place, caption in texts if caption]


def from_json(text):
    """Value of a JSON text, str or bytes; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def as_json(value):
    """JSON text of a value, without escapes unless it holds halves of characters, which UTF-8
    cannot encode."""
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if re.search("[\ud800-\udfff]", text) else text


def with_only(value, places):
    """A cell with only the captions at `places`, which hold one at least. A list that is written as
    text becomes JSON if it loses a caption."""
    gone = {place for place, _ in captions_in(value)}.difference(places)
    if not gone:
        return value
    found = _list_in(value) if isinstance(value, str) else value
    left = [item for place, item in enumerate(found) if place not in gone]
    return as_json(left) if isinstance(value, str) else left


def _texts(value):
    """List of what is at each place of a cell. Only a str is a caption."""
    if isinstance(value, str):
        found = _list_in(value)
        return [value] if found is None else _texts(found)
    if isinstance(value, dict):
        return [_text_in(value)]
    return [_text_in(item) if isinstance(item, dict) else item
            for item in (value if isinstance(value, list) else [])]


def _list_in(text):
    """The list that a text spells, None where the text is not in brackets. Raises ValueError when
    the list cannot be read."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    found = from_json(text)
    if found is None:
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
        if repr(found) != text:  # ['a' 'b'], as numpy writes it, would become one text
            raise ValueError('caption looks like a list; write it as JSON: ["a dog", "a cat"]')
    return found


def _text_in(structure):
    """The one text in a structure, None where it has none. Raises ValueError when it has several,
    or a list instead."""
    texts = [name for name, value in structure.items() if isinstance(value, str)]
    lists = [name for name, value in structure.items() if isinstance(value, list) and value]
    if len(texts) > 1 or lists and not texts:
        raise ValueError("caption is a structure with several texts "
                         f"({', '.join(texts or lists)}); make a column of the right one")
    return structure[texts[0]] if texts else None
