"""Calibration tokens: windows of text, or sampled from the model itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from rich.text import Text
from torch import Tensor
from transformers import AutoTokenizer

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.calibration.sources import HUB_BYTES, Reading, TextSource, open_text
from offline_quant.calibration.text_file import BLOCK_BYTES, PlainText
from offline_quant.calibration.tokens import SLICE, SLICE_BYTES, DocumentTokens
from offline_quant.config import SELF
from offline_quant.model.streaming import StreamedModel
from offline_quant.runtime.progress import bar, console

DEFAULT_DATASET = "hf:allenai/c4"
WHOLE_BYTES, SPREAD_BYTES = 4 << 20, 16
"""Bytes of a file, and for every token asked for, up to which all of the file is tokenized."""
_LEAST_PIECE = 4096
"""Bytes read at once at least: a line should begin in them."""
_SLICE_CHARACTERS, _LEAST_SLICE = 6, 1024
"""Characters tokenized for every token that is still missing, and at least."""
_GOLDEN = 0.6180339887498949


class CalibrationText(NamedTuple):
    """Where calibration tokens came from: what a checkpoint's config.json records, and a line for people."""

    recorded: str
    description: str

    @classmethod
    def of(cls, source: TextSource) -> "CalibrationText":
        """What a source says of itself."""
        return cls(source.recorded, source.description)


WRITTEN_BY_MODEL = CalibrationText(SELF, "written by the model itself")


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer.

    Raises:
        BitsmoeError: none can be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
        tokenizer("a", verbose=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as e:
        raise BitsmoeError(f"{directory}: no tokenizer can be loaded ({e})") from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of no file at all
        raise BitsmoeError(f"{directory}: no tokenizer can be loaded (its files are missing)")
    return tokenizer


def window_length(config: dict[str, Any], wanted: int) -> int:
    """Tokens in a window: what was asked for, or the model's maximum if that is less."""
    return min(wanted, int(config.get("max_position_embeddings") or wanted))


def text_windows(
    tokenizer: Any, source: TextSource | str, length: int, limit: int | None = None, seed: int = 0
) -> Tensor:
    """Non-overlapping windows of tokens, documents joined one after another.

    All of a file is tokenized if it is small, or if much of it is asked for: up to WHOLE_BYTES, or SPREAD_BYTES for
    every token asked for. In a larger file windows begin at evenly spread places, each at the next beginning of a line
    or row, and no more is tokenized than they take. Where that gives too few, the first ones are taken.

    Args:
        tokenizer: of the model.
        source: of the text; a name is opened.
        length: tokens in a window.
        limit: at most this many windows; None: all. Spread evenly over a file, the first ones of a dataset.
        seed: which of the evenly spread sets.

    Returns:
        int64 [windows, length].

    Raises:
        BitsmoeError: rows that cannot be used, or too little text for one window.
    """
    if isinstance(source, str):
        source = open_text(source)
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
    """Of all documents, slice by slice."""
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

    Where one window has gone beyond the next place, the next window goes on there.
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


@torch.no_grad()
def sample_windows(model: StreamedModel, tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """Tokens sampled from the model itself at temperature 1, for models whose training text is not at hand.

    A window begins with the tokenizer's document-opening token, or with a random ordinary token where there is none;
    sampling goes on past end-of-text tokens, as in packed training text.

    Returns:
        int64 [count, length].
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    whole = model.materialize()
    start = tokenizer.bos_token_id
    model.check_ids(torch.tensor([start or 0]))
    if start is None:
        ids = torch.randint(
            0, min(tokenizer.vocab_size, model.vocabulary), (count, 1), generator=generator, device=model.device
        )
    else:
        ids = torch.full((count, 1), start, device=model.device)
    out, cache = [ids], None
    with bar("Sampling text", length - 1) as on_progress:
        for _ in range(length - 1):
            result = whole(input_ids=out[-1], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            probability = result.logits[:, -1].float().softmax(-1)
            out.append(torch.multinomial(probability, 1, generator=generator))
            on_progress()
    return torch.cat(out, 1).cpu()


def write_sampled_text(model: StreamedModel, tokenizer: Any, path: Path, count: int, length: int, seed: int) -> None:
    """Write text sampled from the model: `count` windows of `length` tokens, see `sample_windows`."""
    windows = sample_windows(model, tokenizer, count, length, seed)
    path.write_text("".join(tokenizer.batch_decode(windows, skip_special_tokens=True)), encoding="utf-8")


def reading_bytes(source: TextSource | None, tokens: int) -> int:
    """Bytes that reading a source and tokenizing it take, for so many tokens; None: the default dataset."""
    kept = SPREAD_BYTES * tokens  # 4 bytes for each token of a file that is read as a whole, and the windows
    return (HUB_BYTES if source is None else source.memory) + SLICE_BYTES + kept


def read_windows(
    tokenizer: Any, source: TextSource | None, calib: str | None, count: int, length: int, seed: int
) -> tuple[Tensor, CalibrationText] | None:
    """Windows of calibration text, and where they came from; None: the model is to write them.

    With no source chosen, the default dataset is tried; where it cannot be reached, a warning says so.

    Args:
        tokenizer: of the model.
        source: what was chosen, opened; None: nothing to read was.
        calib: the same, as it was chosen.
        count, length, seed: see `text_windows`.
    """
    if source is not None:
        console.print(f"Calibration text: {source.description}")
        return text_windows(tokenizer, source, length, count, seed), CalibrationText(
            source.recorded, source.description
        )
    if calib == SELF:
        return None
    console.print(f"Reading calibration text from {DEFAULT_DATASET} (choose with --calib)")
    try:
        source = open_text(DEFAULT_DATASET)
        return text_windows(tokenizer, source, length, count, seed), CalibrationText(
            source.recorded, source.description
        )
    except BitsmoeError as e:
        console.print(
            Text("Warning:", "bold yellow"), f"{e}\nCalibrating on text sampled from the model itself instead."
        )
        return None
