"""Windows of tokens, cut from text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from bitsmoe_kernels.errors import BitsmoeError
from bitsmoe_kernels.format.safetensors_io import read_json
from bitsmoe_kernels.models.families import MODEL_TYPES, language_config
from offline_quant.calibration.row_readers import PlainText
from offline_quant.calibration.text_file import BLOCK_BYTES
from offline_quant.calibration.text_source import Reading, TextSource
from offline_quant.calibration.tokens import SLICE, SLICE_BYTES, DocumentTokens
from offline_quant.runtime.progress import bar, console

WHOLE_BYTES, SPREAD_BYTES = 4 << 20, 16
"""A file is tokenized as a whole up to this many bytes, or this many for every token asked for."""
_LEAST_PIECE = 4096
"""Least bytes read at once: a line should begin in them."""
_SLICE_CHARACTERS, _LEAST_SLICE = 6, 1024
"""Characters tokenized for every missing token, and the least number of them."""
_GOLDEN = 0.6180339887498949


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer.

    Raises:
        BitsmoeError: none can be loaded.
    """
    try:
        own = MODEL_TYPES.get(str(read_json(directory / "config.json").get("model_type")))
        known = {"config": AutoConfig.for_model(own)} if own else {}
        # Nothing that a model brings along is run; asking would be no answer in a batch.
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, **known)
        tokenizer("a", verbose=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as e:
        raise BitsmoeError(f"{directory}: no tokenizer can be loaded ({e})") from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # without any file
        raise BitsmoeError(f"{directory}: no tokenizer can be loaded (its files are missing)")
    return tokenizer


def window_length(config: dict[str, Any], wanted: int) -> int:
    """Tokens in a window: what was asked for, or the model's maximum if that is less."""
    return min(wanted, int(language_config(config).get("max_position_embeddings") or wanted))


def text_windows(tokenizer: Any, source: TextSource, length: int, limit: int | None = None, seed: int = 0) -> Tensor:
    """Non-overlapping windows of tokens, documents joined one after another.

    All of a file is tokenized if it is small, or if much of it is asked for: up to WHOLE_BYTES, or SPREAD_BYTES for
    every token asked for. In a larger file windows begin at evenly spread places, each at the next beginning of a line
    or row, and no more is tokenized than they take. Where that gives too few, the first ones are taken.

    Args:
        tokenizer: of the model.
        source: of the text.
        length: tokens in a window.
        limit: at most this many windows; None: all. Spread evenly over a file, the first ones of a dataset.
        seed: which of the evenly spread sets.

    Returns:
        int64 [windows, length].

    Raises:
        BitsmoeError: rows that cannot be used, or too little text for one window.
    """
    source.check_tokenizer(tokenizer)
    reading, tokens = source.read(tokenizer), DocumentTokens(tokenizer)
    size, start = source.size, seed * _GOLDEN % 1  # fractional parts of multiples lie far apart
    if limit is None or (size is not None and size <= max(WHOLE_BYTES, SPREAD_BYTES * limit * length)):
        ids = np.concatenate([np.empty(0, np.int32), *_all_tokens(reading, tokens)])
        windows = torch.from_numpy(ids[: len(ids) // length * length].astype(np.int64)).view(-1, length)
        found = len(ids)
    else:
        step = reading.cursor.size / (limit + 1)  # as much as from one place to the next is left behind the last
        places = [int((i + start) * step) for i in range(limit)]
        rows, found = _windows_at(reading, tokens, length, places)
        if len(rows) < limit and any(places):  # most of the text is before the last places
            reading = source.read(tokenizer)
            rows, found = _windows_at(reading, tokens, length, [0] * limit)
        windows = torch.tensor(rows, dtype=torch.int64).view(-1, length)
    reading.say_what_was_passed_over()
    count = len(windows)
    if count == 0:
        raise BitsmoeError(f"{source.name}: holds {found} tokens, but one window takes {length}; give more text")
    if limit is not None and count < limit:
        console.print(f"{source.name}: holds {count} windows of {length} tokens, fewer than the {limit} asked for")
    if limit is not None and count > limit:
        windows = windows[((torch.arange(limit, dtype=torch.float64) + start) * count / limit).long()]
    return windows


def _all_tokens(reading: Reading, tokens: DocumentTokens) -> Iterator[NDArray[np.int32]]:
    """Token ids of all documents, slice by slice."""
    cursor = reading.cursor
    with bar("Tokenizing", cursor.size) as on_progress:
        done = 0
        for document in reading.documents():
            for ids in tokens.slices(document, lambda: SLICE):
                yield np.array(ids, np.int32)
                on_progress(cursor.position - done)
                done = cursor.position
        on_progress(cursor.size - done)


def _windows_at(
    reading: Reading, tokens: DocumentTokens, length: int, places: list[int]
) -> tuple[list[list[int]], int]:
    """A window from each place of a cursor on, as far as there is text, and the number of tokens found.

    Where a window ends beyond the next place, the next window begins at its end.
    """
    cursor = reading.cursor
    if isinstance(cursor, PlainText):
        cursor.piece_bytes = min(BLOCK_BYTES, max(_LEAST_PIECE, SPREAD_BYTES // 2 * length))
    windows: list[list[int]] = []
    left: list[int] = []
    documents = reading.documents()
    slices: Iterator[list[int]] = iter(())

    def size() -> int:
        return max(_LEAST_SLICE, _SLICE_CHARACTERS * (length - len(left)))

    with bar("Tokenizing", len(places)) as on_progress:
        for place in places:
            if place > cursor.position:
                cursor.start_at, slices = place, iter(())
                left.clear()
            while len(left) < length:
                if (ids := next(slices, None)) is not None:
                    left += ids
                elif (document := next(documents, None)) is not None:
                    slices = tokens.slices(document, size)
                else:
                    return windows, length * len(windows) + len(left)
            windows.append(left[:length])
            del left[:length]
            on_progress()
    return windows, length * len(windows) + len(left)


def reading_bytes(held: int, tokens: int) -> int:
    """Bytes of memory that reading text and tokenizing it take.

    Args:
        held: bytes that the source's own readers take.
        tokens: tokens of calibration text.
    """
    # 4 bytes for each token of a file that is read as a whole, and the windows.
    return held + SLICE_BYTES + SPREAD_BYTES * tokens
