"""CLIP's tokenizer: byte-pair encoding (Sennrich et al., 2016) over bytes, lower-cased, with the
merges that OpenAI published beside the model (bpe_simple_vocab_16e6.txt.gz).

The 49,408 ids, in order: 256 byte symbols, the same 256 at the end of a word ("</w>"), one per
merge, <|startoftext|> and <|endoftext|>.
"""

import functools
import gzip
import html
import itertools
from pathlib import Path

import ftfy
import numpy as np
import regex
import torch

VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
N_MERGES = 49408 - 2 * 256 - 2  # the file lists more than CLIP uses
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
SPACE = regex.compile(r"\s+")


def byte_symbols():
    """{byte: its character in the vocabulary}, in the order of the ids. Visible Latin-1 characters
    are their own; the other bytes get characters from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(visible))
    symbols = {byte: chr(byte) for byte in visible}
    return symbols | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def clean_text(text):
    """Text with broken Unicode repaired, HTML entities resolved (twice), white space collapsed, in
    lower case."""
    if text.isascii() and text.isprintable() and "&" not in text:  # ftfy and html change nothing
        return " ".join(text.split()).lower()
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return SPACE.sub(" ", text).strip().lower()


class SimpleTokenizer:
    """Text to ids. `encoder` maps symbols to ids, `ranks` merges to their order. `cache` keeps the
    ids of each piece of text between two spaces."""

    def __init__(self):
        with gzip.open(VOCABULARY, "rt", encoding="utf-8") as file:
            merges = [tuple(line.split()) for line in itertools.islice(file, 1, N_MERGES + 1)]
        self.byte_symbols = byte_symbols()
        symbols = [*self.byte_symbols.values()]
        symbols += [symbol + "</w>" for symbol in symbols]
        symbols += ["".join(pair) for pair in merges]
        symbols += [START, END]
        self.encoder = {symbol: i for i, symbol in enumerate(symbols)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start, self.end = self.encoder[START], self.encoder[END]
        self.cache = {}

    def encode(self, text):
        """Ids of `text` (list of int), without start and end token."""
        ids = []
        for chunk in clean_text(text).split():
            if chunk not in self.cache:
                self.cache[chunk] = [self.encoder[part] for word in WORDS.findall(chunk)
                                     for part in self._merge(word)]
            ids += self.cache[chunk]
        return ids

    def _merge(self, word):
        if word in (START, END):
            return [word]
        parts = [self.byte_symbols[byte] for byte in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self.ranks.get(pair, N_MERGES))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                merged.append("".join(parts[i : i + step]))
                i += step
            parts = merged
        return parts


@functools.cache
def default_tokenizer():
    """The tokenizer that `tokenize` uses, read from disk at the first call."""
    return SimpleTokenizer()


def tokenize_with_lengths(texts, context_length=77):
    """Tokens of one text or a sequence of texts, and their number before any cut.

    Returns (tokens, lengths): tokens int32 (n, context_length), each row start token, text, end
    token, zeros; lengths int64 (n,), start and end token included. A row whose length exceeds
    context_length is cut; its last token is the end token. Raises TypeError for anything but text,
    ValueError if context_length < 2.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("tokenize takes a str or a sequence of str")
    if context_length < 2:
        raise ValueError("context_length must be at least 2: the start and the end token")
    tokenizer = default_tokenizer()
    tokens = np.zeros((len(texts), context_length), np.int32)
    lengths = np.zeros(len(texts), np.int64)
    for i, text in enumerate(texts):
        ids = tokenizer.encode(text)
        row = [tokenizer.start, *ids[: context_length - 2], tokenizer.end]
        tokens[i, : len(row)], lengths[i] = row, len(ids) + 2
    return torch.from_numpy(tokens), torch.from_numpy(lengths)


def tokenize(texts, context_length=77, truncate=False):
    """The tokens of `tokenize_with_lengths`. Raises RuntimeError for a text that is too long,
    unless `truncate` is set."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokens, lengths = tokenize_with_lengths(texts, context_length)
    if not truncate and (lengths > context_length).any():
        i = int((lengths > context_length).nonzero()[0])
        raise RuntimeError(
            f"text has {lengths[i]} tokens, more than the context length of {context_length}: "
            f"{texts[i]!r}"
        )
    return tokens
