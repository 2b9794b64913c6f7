"""Captions in a cell of a table: a text, a list of texts, or such a list written as JSON.

The *place* of a caption is its number in the list, from 0, with empty ones counted.
"""

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
    a cell that looks like several captions but is no list of texts."""
    items = _list_of(value)
    if any(isinstance(item, dict | list) for item in items):
        raise ValueError("caption is a structure; make a column of its text, or of a list of texts")
    texts = [(place, one_line(text)) for place, text in enumerate(items) if isinstance(text, str)]
    return [(place, caption) for place, caption in texts if caption]


def with_only(value, places):
    """A cell with only the captions at `places`, which hold one at least."""
    gone = {place for place, _ in captions_in(value)}.difference(places)
    if not gone:
        return value
    left = [item for place, item in enumerate(_list_of(value)) if place not in gone]
    return as_json(left) if isinstance(value, str) else left


def _list_of(value):
    """What is at each place of a cell. Raises ValueError for a text in brackets that is no JSON."""
    if not isinstance(value, str):
        return value if isinstance(value, list) else [value]
    text = value.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return [value]
    found = from_json(text)
    if found is None:
        raise ValueError('caption looks like a list; write it as JSON: ["a dog", "a cat"]')
    return found


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
