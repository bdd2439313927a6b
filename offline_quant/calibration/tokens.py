"""Tokens of documents of any length: slice by slice, cut where the cut does not change them."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from offline_quant.calibration.text_source import Document

SLICE = 1 << 17
"""Most characters tokenized at once: more takes more memory and no less time."""
SLICE_BYTES = 48 << 20
"""That tokenizing a slice takes."""
_LOOK_BACK = 4096
# In this order. Byte-level BPE begins a word with the space before it, and ends one with a single line break.
_JOINTS = [
    re.compile(p)
    for p in (r"(?<=\S)(?= [^\W\d_])", r"(?<=\S\n)(?=\S)", r"(?<=\w)(?=[\u3001\u3002\uff0c\uff01\uff1f\uff1a\uff1b])")
]


class DocumentTokens:
    """Makes a tokenizer's ids of documents, the same as of each as a whole.

    They are the same for byte-level BPE, and for sentencepiece-like tokenizers that begin words with a space. Where a
    text has no spaces and single line breaks, or the tokenizer treats the beginning of a text in a way of its own, one
    or two tokens may differ where slices meet.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        whole, first = self._whole("a"), self._ids("a")
        at = next((i for i in range(len(whole)) if whole[i : i + len(first)] == first), 0)
        self._before, self._after = whole[:at], whole[at + len(first) :]
        # Some tokenizers put a space before any text, also where there is one.
        self._doubles = first + self._ids(" b") != self._ids("a b") == first + self._ids("b")

    def _whole(self, text: str) -> list[int]:
        return self._tokenizer(text, verbose=False)["input_ids"]

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]

    def slices(self, document: Document, size: Callable[[], int]) -> Iterator[list[int]]:
        """Ids of a document, slice by slice.

        Args:
            document: the text.
            size: asked before each slice: how many characters it should have, at most SLICE.
        """
        first = True
        for text, last in _slices(document.pieces, size):
            if first and last and document.opens and document.closes:
                yield self._whole(text)
                return
            ids = self._ids(text[1:] if not first and self._doubles and text.startswith(" ") else text)
            before = self._before if first and document.opens else []
            after = self._after if last and document.closes else []
            yield [*before, *ids, *after]
            first = False


def _slices(pieces: Iterator[str], size: Callable[[], int]) -> Iterator[tuple[str, bool]]:
    """Text in slices, and whether each is the last."""
    text, at, ended = "", 0, False
    while True:
        wanted = min(size(), SLICE)
        while not ended and len(text) - at <= wanted:
            piece = next(pieces, None)
            ended = piece is None
            if piece:
                text, at = text[at:] + piece, 0
        if len(text) - at <= wanted:
            yield text[at:], True
            return
        cut = _joint(text, at, at + wanted)
        yield text[at:cut], False
        at = cut


def _joint(text: str, start: int, end: int) -> int:
    """Where to cut before `end`, after `start`."""
    for joint in _JOINTS:
        # Two characters more on either side, for what a joint looks at.
        found = [m.start() for m in joint.finditer(text, max(start + 1, end - _LOOK_BACK), end + 2)]
        if inside := [at for at in found if at <= end]:
            return inside[-1]
    return end
