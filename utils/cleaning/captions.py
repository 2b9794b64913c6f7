"""Captions in a cell of a table: a text; a list of them, also one written as text, as JSON or as
pandas does; or a structure with one text, or one list, among its members. Lists may hold such
structures. The *place* of a caption is its number in the list, from 0, empty ones counted."""

import ast
import json
import re


def one_line(text):
    """One line of plain text: runs of white space, line ends and NUL become one blank each. Empty
    where CLIP's own cleaning leaves nothing that can be seen ("&nbsp;", control characters)."""
    from clip.tokenizer import clean_text  # with torch, which a --help does without

    text = text.encode("utf-8", "replace").decode("utf-8")  # JSON can hold halves of characters
    text = " ".join(text.replace("\0", " ").split())
    return text if any(c.isprintable() and c != " " for c in clean_text(text)) else ""


def captions_in(value):
    """[(place, caption)] of a cell, empty ones left out. Raises ValueError, with the reason, for
    what looks like a list or a caption but cannot be understood."""
    texts = [(place, one_line(text)) for place, text in enumerate(_texts(value))
             if isinstance(text, str)]
    return [(place, caption) for place, caption in texts if caption]


def from_json(text):
    """What a text, str or bytes, says in JSON; None where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def as_json(value):
    """JSON with letters as they are, but for halves of characters, which are no UTF-8."""
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if re.search("[\ud800-\udfff]", text) else text


def without(value, gone):
    """A cell without the captions at the places `gone`, in the form that it had; a list written as
    text becomes JSON."""
    if isinstance(value, str):
        found = _list_in(value)
        return value if found is None else as_json(without(found, gone))
    if isinstance(value, dict):
        own = value[_member(value)]
        if isinstance(own, str):
            return value
        return {name: without(other, gone) if isinstance(other, list) and len(other) == len(own)
                else other for name, other in value.items()}  # lists beside each other
    return [item for place, item in enumerate(value) if place not in gone]


def _texts(value):
    """What is at each place of a cell: a text or anything else, which is none."""
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
    """The list that a text stands for, None where it looks like none. Raises ValueError."""
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
    """Name of the text in a structure, or else of its list, None where it has neither. Raises
    ValueError when there are several."""
    for texts in (lambda value: isinstance(value, str),
                  lambda value: isinstance(value, list) and any(isinstance(x, str) for x in value)):
        names = [name for name, value in structure.items() if texts(value)]
        if len(names) == 1:
            return names[0]
        if names:
            raise ValueError(f"caption is a structure with several texts ({', '.join(names)}); "
                             "make a column of the right one")
    return None
