"""Calibration tokens: from text files, from a Hub dataset, or sampled from the model itself."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import HfHubHTTPError
from rich.text import Text
from torch import Tensor
from transformers import AutoTokenizer

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.progress import bar, console
from offline_quant.streaming import StreamedModel

DEFAULT_DATASET = "hf:allenai/c4"
NETWORK_ERRORS = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
"""What the Hub's client raises where it cannot be reached: the base error of its HTTP library, and OSError."""
_DATASET_ERRORS: tuple[type[Exception], ...] = (*NETWORK_ERRORS, ValueError, RuntimeError)
_GOLDEN = 0.6180339887498949
_TEXT_KEYS = ("text", "content", "prompt")
_DATASET_CONFIGS = {"allenai/c4": "en"}


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer.

    Raises:
        BitsmoeError: none can be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise BitsmoeError(f"{directory}: no tokenizer can be loaded ({e})") from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of no file at all
        raise BitsmoeError(f"{directory}: no tokenizer can be loaded (its files are missing)")
    return tokenizer


def window_length(config: dict[str, Any], wanted: int) -> int:
    """Tokens in a window: what was asked for, or the model's maximum if that is less."""
    return min(wanted, int(config.get("max_position_embeddings") or wanted))


def check_text_source(calib: str | None) -> None:
    """Refuse a calibration source that cannot be read, before any work.

    Raises:
        BitsmoeError: names the file or the form expected.
    """
    if calib is None or calib == "self" or calib.startswith("hf:"):
        return
    path = Path(calib)
    if not path.is_file():
        raise BitsmoeError(f"--calib {calib}: no such file; use `self`, a .txt or .jsonl file, or hf:DATASET")
    if path.stat().st_size == 0:
        raise BitsmoeError(f"--calib {calib}: the file is empty; give text, or use `--calib self`")


def documents(source: str) -> Iterator[str]:
    """Texts of a source: a text file as one, a file of JSON lines or a dataset as many.

    Raises:
        BitsmoeError: unreadable, or without text.
    """
    if source.startswith("hf:"):
        yield from _dataset_texts(source.removeprefix("hf:"))
        return
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BitsmoeError(f"{path}: cannot be read as UTF-8 text ({e})") from None
    if path.suffix != ".jsonl" and not _begins_with_row(text):
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        # Not splitlines, which also splits at characters that JSON strings may hold.
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as e:
            raise BitsmoeError(f"{path}, line {number}: not JSON ({e})") from None
        yield _row_text(row, f"{path}, line {number}")


def _begins_with_row(text: str) -> bool:
    """Whether the first line is a JSON object that holds text: a file of such lines is no text, whatever its name."""
    try:
        row = json.loads(text.lstrip().partition("\n")[0])
    except ValueError:
        return False
    return isinstance(row, dict) and any(isinstance(row.get(key), str) for key in _TEXT_KEYS)


def _row_text(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    for key in _TEXT_KEYS:
        if isinstance(row, dict) and isinstance(row.get(key), str):
            return row[key]
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise BitsmoeError(f"{where}: has no text; expected one of the keys {list(_TEXT_KEYS)}, found {found}")


def _dataset_texts(name: str) -> Iterator[str]:
    import datasets  # heavy, and needed for this source only

    try:
        rows: Iterable[Any] = datasets.load_dataset(name, _DATASET_CONFIGS.get(name), split="train", streaming=True)
        for number, row in enumerate(rows):
            yield _row_text(row, f"hf:{name}, row {number}")
    except _DATASET_ERRORS as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise BitsmoeError(f"--calib hf:{name}: the dataset cannot be reached or read ({reason})") from None


def text_windows(tokenizer: Any, source: str, length: int, limit: int | None = None, seed: int = 0) -> Tensor:
    """Non-overlapping windows of tokens, documents joined one after another.

    Args:
        tokenizer: of the model.
        source: see `documents`.
        length: tokens in a window.
        limit: at most this many windows; None: all. Spread evenly over a text file, the first ones of a dataset.
        seed: which of the evenly spread sets.

    Returns:
        int64 [windows, length].

    Raises:
        BitsmoeError: too little text for one window.
    """
    stream = source.startswith("hf:")
    ids: list[int] = []
    for text in documents(source):
        ids += tokenizer(text, verbose=False)["input_ids"]
        if stream and limit is not None and len(ids) >= limit * length:
            break
    count = len(ids) // length
    if count == 0:
        raise BitsmoeError(f"{source}: holds {len(ids)} tokens, but one window takes {length}; give more text")
    windows = torch.tensor(ids[: count * length]).view(count, length)
    if limit is not None and count < limit:
        console.print(f"{source}: holds {count} windows of {length} tokens, fewer than the {limit} asked for")
    if limit is not None and count > limit:
        start = seed * _GOLDEN % 1  # fractional parts of multiples lie far apart
        windows = windows[((torch.arange(limit, dtype=torch.float64) + start) * count / limit).long()]
    return windows


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
    with bar("Sampling text", length - 1) as tick:
        for _ in range(length - 1):
            result = whole(input_ids=out[-1], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            probability = result.logits[:, -1].float().softmax(-1)
            out.append(torch.multinomial(probability, 1, generator=generator))
            tick()
    return torch.cat(out, 1).cpu()


def write_sampled_text(model: StreamedModel, tokenizer: Any, path: Path, count: int, length: int, seed: int) -> None:
    """Write text sampled from the model: `count` windows of `length` tokens, see `sample_windows`."""
    windows = sample_windows(model, tokenizer, count, length, seed)
    path.write_text("".join(tokenizer.batch_decode(windows, skip_special_tokens=True)), encoding="utf-8")


def calibration_windows(
    model: StreamedModel,
    tokenizer: Any,
    calib: str | None,
    count: int,
    length: int,
    seed: int,
    before_sampling: Callable[[], None] = lambda: None,
) -> tuple[Tensor, str]:
    """Windows from the chosen source, and the name of the source used.

    With no source chosen, the default dataset is tried; where it cannot be reached, the model's own text is used and a
    warning says so; `before_sampling` is called then.
    """
    if calib is None:
        console.print(f"Reading calibration text from {DEFAULT_DATASET} (choose with --calib)")
        try:
            return text_windows(tokenizer, DEFAULT_DATASET, length, count, seed), DEFAULT_DATASET
        except BitsmoeError as e:
            console.print(
                Text("Warning:", "bold yellow"), f"{e}\nCalibrating on text sampled from the model itself instead."
            )
            before_sampling()
            calib = "self"
    if calib == "self":
        return sample_windows(model, tokenizer, count, length, seed), "self"
    return text_windows(tokenizer, calib, length, count, seed), calib
