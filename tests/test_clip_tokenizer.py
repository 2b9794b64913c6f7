"""The tokenizer against known ids and against open_clip's. transformers': test_export_hf.py."""


import pytest
import torch

import clip
from clip.tokenizer import clean_text

TEXTS = [
    "a photo of a cat",
    "A man's dog didn't run; they'll've I'd we're I'm 'TIS",
    "Crème brûlée, naïve façade, ÀÉÎÕÜ Straße İstanbul",
    "Tom &amp; Jerry &lt;3 &amp;amp; &eacute;t&eacute; &#39;quoted&#39;",
    "emoji 😀👩‍👩‍👧 ❤️ 🇫🇷 flags",
    "一只猫坐在垫子上。日本語のテキスト 한국어",
    "tabs\tand\nnew lines\r\n   and    spaces",
    "numbers 1234567890 3.14 1,000 ½ ² Ⅳ",
    "punctuation!!! ... ??? --- ((())) [x] {y} <z> a_b #tag @user $5 100%",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "“curly quotes” ‘single’ – en — em … ellipsis ﬁ ligature",
    "schÃ¶n mis-decoded â€œtextâ€",
    "кошка на ковре, γάτα, قطة",
    "",
    "   ",
    "zero\u200bwidth \u00a0nbsp \ufeffbom",
    "\x1b[31mred\x1b[0m control\x07s",
    "a" * 60,
    "photograph bicycles zxqj mississippi banana woman's",
    "x < y &amp;amp; z",
]


def ids(text):
    return clip.SimpleTokenizer().encode(text)


def test_known_ids():
    known = {"a photo of a cat": [320, 1125, 539, 320, 2368], "a diagram": [320, 22697],
             "a dog": [320, 1929], "hello world!": [3306, 1002, 256]}
    for text, expected in known.items():
        row = clip.tokenize(text)[0].tolist()
        assert row[: len(expected) + 2] == [49406, *expected, 49407]
        assert row[len(expected) + 2 :] == [0] * (75 - len(expected))


def test_against_open_clip():
    """It cleans texts of entities and broken Unicode, too."""
    theirs = pytest.importorskip("open_clip").tokenizer.SimpleTokenizer()
    assert list(clip.SimpleTokenizer().encoder)[:-2] == list(theirs.encoder)[:-2]
    for text in TEXTS:
        assert ids(text) == theirs.encode(text), text


def test_cleaning():
    assert ids("Tom &amp;amp; Jerry") == ids("tom & jerry") == ids("TOM  &amp;\n JERRY ")
    assert ids("schÃ¶n") == ids("schön")  # ftfy
    assert ids("cafe\u0301") == ids("café")  # ftfy composes
    assert ids("don't") == ids("don") + ids("'t")
    assert ids("1234") == [ids(c)[0] for c in "1234"]
    assert ids("") == ids(" \t\n") == []
    assert ids("a <|endoftext|> b") == [320, 49407, *ids("b")]


def test_the_shortcut_for_ascii_changes_nothing():
    import html

    import ftfy
    import regex

    for text in [*TEXTS, "".join(map(chr, range(32, 127))), "x < y > z", "'' `` \"\"", "it\\'s"]:
        slow = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert clean_text(text) == regex.sub(r"\s+", " ", slow.strip()).strip().lower()


def test_any_texts_make_int32_rows():
    assert clip.tokenize([]).shape == (0, 77) and clip.tokenize([]).dtype == torch.int32
    for texts in (("a cat",), iter(["a cat"])):
        assert torch.equal(clip.tokenize(texts), clip.tokenize("a cat"))


def test_too_long():
    fits, over = "dog " * 75, "dog " * 76
    assert clip.tokenize(fits)[0].tolist() == [49406, *[1929] * 75, 49407]
    with pytest.raises(RuntimeError, match="78 tokens.*77.*dog dog"):
        clip.tokenize(["a cat", over])
    cut = clip.tokenize(["a cat", over], truncate=True)
    assert cut[1].tolist() == [49406, *[1929] * 75, 49407]
    assert torch.equal(cut[:1], clip.tokenize("a cat"))


def test_lengths():
    tokens, lengths = clip.tokenize_with_lengths(["", "a cat", "a photo of a cat"], 5)
    assert lengths.tolist() == [2, 4, 7] and lengths.dtype == torch.int64
    assert tokens.dtype == torch.int32 and tokens.tolist() == [
        [49406, 49407, 0, 0, 0], [49406, 320, 2368, 49407, 0], [49406, 320, 1125, 539, 49407]]


def test_wrong_arguments():
    for texts in ([1, 2], [b"bytes"]):
        with pytest.raises(TypeError, match="str"):
            clip.tokenize(texts)
    with pytest.raises(ValueError, match="context_length"):
        clip.tokenize("a cat", context_length=1)
