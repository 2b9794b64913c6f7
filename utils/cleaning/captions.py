"""Captions in a cell of a table.

A cell is a text; a list of texts, also one written as text (as JSON, or as pandas writes it); or a
structure with one text, or one list, among its members. A list may hold such structures. The
*place* of a caption is its number in the list, from 0, with empty ones counted.
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


def without(value, gone):
    """A cell without the captions at the places `gone`. Its form stays, except that a list written
    as text becomes JSON."""
    if isinstance(value, str):
        found = _list_in(value)
        return value if found is None else as_json(without(found, gone))
    if isinstance(value, dict):
        own = value[_member(value)]
        if isinstance(own, str):
            return value
        return {name: without(other, gone) if isinstance(other, list) and len(other) == len(own)
                else other for name, other in value.items()}  # parallel lists lose the same places
    return [item for place, item in enumerate(value) if place not in gone]


def _texts(value):
    """List of what is at each place of a cell. Only a str is a caption."""
    if isinstance(value, str):
        found = _list_in(value)
        return [value] if found is None else _texts(found)
    if isinstance(value, dict):
        own = value.get(_member(value))
        return [own] if isinstance(own, str) else _texts(own)
    if isinstance(value, list):
        return [item.get(_member(item)) if isinstance(item, dict) else item for item in value]
    return []


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


def _member(structure):
    """Name of the one text in a structure, or else of its one list of texts; None where it has
    neither. Raises ValueError when there are several."""
    for texts in (lambda value: isinstance(value, str),
                  lambda value: isinstance(value, list) and any(isinstance(x, str) for x in value)):
        names = [name for name, value in structure.items() if texts(value)]
        if len(names) == 1:
            return names[0]
        if names:
            raise ValueError(f"caption is a structure with several texts ({', '.join(names)}); "
                             "make a column of the right one")
    return None
