"""Where text comes from: a file (see `text_file`), or a dataset of the Hugging Face Hub; its rows as documents."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from bitsmoe_kernels.errors import BitsmoeError, fault_list, one_line
from offline_quant.calibration.text_file import ROW_BYTES, Cursor, Kind, PlainText, Row, TextFile, identify, numbered
from offline_quant.config import HUB, recorded_name
from offline_quant.model.download import NETWORK_ERRORS
from offline_quant.runtime.progress import console

HUB_BYTES = 192 << 20
"""What a dataset's own readers take."""
COLUMNS = ("text", "content", "messages", "conversations", "prompt")
"""Where text is looked for in a row that is an object, in this order."""
_ANSWERS = ("completion", "response", "responses", "output", "answer", "solution", "chosen", "rejected")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_CHECKED_ROWS, _MORE_ROWS, _SHOWN_FAULTS, _SHOWN_KEYS = 16, 2000, 12, 20
_TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""What a chat template, which is a program, may end with. RecursionError is a RuntimeError."""
_HALF_SURROGATES = re.compile("[\ud800-\udfff]")


class _Parts(NamedTuple):
    """Configuration and split of a dataset that are taken where none is given."""

    config: str | None = None
    split: str | None = None


_DATASETS = {
    "allenai/c4": _Parts(config="en"),
    "wikitext": _Parts(config="wikitext-2-raw-v1"),
    "Salesforce/wikitext": _Parts(config="wikitext-2-raw-v1"),
    "mit-han-lab/pile-val-backup": _Parts(split="validation"),
    "HuggingFaceH4/ultrachat_200k": _Parts(split="train_sft"),
}
"""Datasets that are used for calibration, and what of them."""


@dataclass
class Document:
    """One text.

    Attributes:
        pieces: of it, in their order.
        opens, closes: whether the tokenizer's special tokens go before and after it.
    """

    pieces: Iterator[str]
    opens: bool = True
    closes: bool = True


class _UnusableError(Exception):
    """Why a row has no text."""


class Reading:
    """One pass over a source, forwards.

    Attributes:
        cursor: how far it is, and where it goes on.
    """

    def __init__(self, source: "TextSource", cursor: Cursor, tokenizer: Any):
        self._source, self.cursor, self._tokenizer = source, cursor, tokenizer
        self._empty = self._repaired = 0

    def documents(self) -> Iterator[Document]:
        """The texts.

        Raises:
            BitsmoeError: names every row among the next ones that cannot be used.
        """
        if isinstance(self.cursor, PlainText):
            for opens, pieces in self.cursor.stretches():
                yield Document(pieces, opens)
            return
        rows = self.cursor.rows()
        for row in rows:
            try:
                document = self._document(row)
            except _UnusableError as e:
                raise self._refusal(row, str(e), rows) from None
            if document:
                yield document

    def _document(self, row: Row) -> Document | None:
        value = self._source.value_of(row)
        text = self._rendered(value) if isinstance(value, list) else value
        if text is None or not text.strip():
            self._empty += 1
            return None
        if len(text) > ROW_BYTES:
            raise _UnusableError(f"holds more than {ROW_BYTES >> 20} million characters; split it")
        text, repaired = _HALF_SURROGATES.subn("\ufffd", text)
        self._repaired += repaired > 0
        framed = isinstance(value, str)  # a chat template puts special tokens in itself
        return Document(iter([text]), framed, framed)

    def _rendered(self, value: list[Any]) -> str | None:
        from jinja2 import TemplateError

        if not value:
            return None
        messages = _messages(value)
        self._source.check_tokenizer(self._tokenizer, chat=True)
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except (*_TEMPLATE_ERRORS, TemplateError) as e:
            raise _UnusableError(f"the tokenizer's chat template refuses it ({one_line(e)[:300]})") from None

    def _refusal(self, row: Row, reason: str, more: Iterator[Row]) -> BitsmoeError:
        faults = [f"{row.where()}: {reason}"]
        for following in islice(more, _MORE_ROWS):
            try:
                self._document(following)
            except _UnusableError as e:
                faults.append(f"{following.where()}: {e}")
                if len(faults) == _SHOWN_FAULTS:
                    faults.append("there may be more")
                    break
        if len(faults) == 1:
            return BitsmoeError(f"{self._source.name}, {faults[0]}")
        return BitsmoeError(fault_list(f"{self._source.name}: rows that cannot be used", faults, len(faults)))

    def say_what_was_passed_over(self) -> None:
        """Print how many rows had no text, and how many were repaired."""
        if self._empty:
            console.print(f"{self._source.name}: passed over {self._empty} row(s) without text (null, empty, blank)")
        if self._repaired:
            console.print(f"{self._source.name}: replaced half surrogates by U+FFFD in {self._repaired} row(s)")


class TextSource:
    """Text that can be read, again and again.

    Attributes:
        name: for messages.
        recorded: what a checkpoint records: without directories.
        column: where the text of rows that are objects is; None: there are none.
        chat: whether it holds chats, as far as its first rows tell.
        size: bytes; None: unknown, as of a dataset.
        memory: bytes that reading it takes at most.
    """

    def __init__(self, name: str, recorded: str, option: str, column: str | None):
        self.name, self.recorded, self.column, self.chat = name, recorded, column, False
        self._option, self._named = option, column is not None

    @property
    def size(self) -> int | None:
        """See above."""
        raise NotImplementedError

    @property
    def memory(self) -> int:
        """See above."""
        raise NotImplementedError

    @property
    def description(self) -> str:
        """What is read, in a line."""
        raise NotImplementedError

    @property
    def _column_shown(self) -> str:
        """Where the text of its rows is, for descriptions."""
        return f", `{self.column}` of its rows{', chats' if self.chat else ''}" if self.column else ""

    def _cursor(self) -> Cursor:
        raise NotImplementedError

    def read(self, tokenizer: Any = None) -> Reading:
        """Begin a pass. The tokenizer renders chats."""
        return Reading(self, self._cursor(), tokenizer)

    def check_tokenizer(self, tokenizer: Any, chat: bool | None = None) -> None:
        """Refuse chats for a tokenizer without a chat template.

        Args:
            tokenizer: of the model.
            chat: whether there are chats; None: as the first rows tell.

        Raises:
            BitsmoeError: names the remedies.
        """
        if (self.chat if chat is None else chat) and not getattr(tokenizer, "chat_template", None):
            raise BitsmoeError(
                f"{self.name}: holds chats (`{self.column}`), but the model's tokenizer has no chat template; name a "
                f"column of plain text with {self._option}-column, or put a chat_template.jinja beside the tokenizer"
            )

    def value_of(self, row: Row) -> str | list[Any] | None:
        """A row's text, or its messages.

        Raises:
            _UnusableError: it has neither; says why.
        """
        if row.fault:
            raise _UnusableError(row.fault)
        if isinstance(row.value, str) and not self._named:
            return row.value
        if not isinstance(row.value, dict):
            raise _UnusableError(f"is {_kind_of(row.value)}, not an object with text")
        if self.column is None:
            self.column = self._text_column(list(row.value))
        if self.column not in row.value:
            raise _UnusableError(f"has no {self.column!r}; found {_shown(row.value)}")
        value = row.value[self.column]
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
            return value
        raise _UnusableError(f"its {self.column!r} is {_kind_of(value)}, not text")

    def _text_column(self, keys: list[str]) -> str:
        remedy = f"name the right one with {self._option}-column"
        for name in COLUMNS:
            if name in keys:
                if name == "prompt" and (answers := [k for k in _ANSWERS if k in keys]):
                    raise _UnusableError(f"has a 'prompt' and {answers}, which are not joined; {remedy}")
                return name
        tokens = "; token ids are not read, only text" if "input_ids" in keys else ""
        raise _UnusableError(
            f"has no text; expected one of the keys {list(COLUMNS)}, found {_shown(keys)}{tokens}; {remedy}"
        )

    def _check_rows(self, count: int) -> None:
        """Read the first rows.

        Raises:
            BitsmoeError: names those that cannot be used.
        """
        cursor = self._cursor()
        if isinstance(cursor, PlainText):
            if self.column is not None:
                raise BitsmoeError(f"{self.name}: is plain text without columns; leave out {self._option}-column")
            return
        faults = []
        for row in islice(cursor.rows(), count):
            try:
                value = self.value_of(row)
                self.chat |= isinstance(value, list) and bool(value)
                if isinstance(value, list):
                    _messages(value)
            except _UnusableError as e:
                faults.append(f"{row.where()}: {e}")
        if len(faults) == 1:
            raise BitsmoeError(f"{self.name}, {faults[0]}")
        if faults:
            raise BitsmoeError(fault_list(f"{self.name}: rows that cannot be used", faults))


def _messages(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns of a chat as templates take them, from `role` and `content`, or from `from` and `value` (ShareGPT)."""
    messages = []
    for number, turn in enumerate(value, 1):
        if "role" in turn and "content" in turn:
            role, content = turn["role"], turn["content"]
        elif "from" in turn and "value" in turn:
            role, content = _ROLES.get(str(turn["from"])), turn["value"]
            if role is None:
                raise _UnusableError(
                    f"its turn {number} is from {str(turn['from'])[:40]!r}; known are {sorted(_ROLES)}"
                )
        else:
            raise _UnusableError(
                f"its turn {number} has neither role and content nor from and value; found {_shown(turn)}"
            )
        if isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
                raise _UnusableError(f"its turn {number} holds parts that are no text")
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str):
            raise _UnusableError(f"its turn {number} has a role that is {_kind_of(role)}")
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            raise _UnusableError(f"its turn {number} has content that is {_kind_of(content)}, not text")
        others = {k: v for k, v in turn.items() if v is not None and k not in ("role", "content", "from", "value")}
        messages.append({**others, "role": role, "content": content})
    return messages


def _kind_of(value: Any) -> str:
    """A JSON value's kind, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, list):
        return "a list of numbers" if value and all(isinstance(v, int) for v in value) else "a list"
    kinds = {dict: "an object", int: "a number", float: "a number", str: "text"}
    return kinds.get(type(value), f"of type {type(value).__name__}")


def _shown(keys: Any) -> list[str]:
    found = sorted(str(key)[:40] for key in keys)
    return found if len(found) <= _SHOWN_KEYS else [*found[:_SHOWN_KEYS], "..."]


class _FileText(TextSource):
    """Text of a file."""

    def __init__(self, file: TextFile, option: str, column: str | None):
        super().__init__(file.name, file.path.name, option, column)
        self._file = file
        if file.kind is Kind.PARQUET:
            try:
                self.column = column or self._text_column(file.columns)
            except _UnusableError as e:
                raise BitsmoeError(f"{self.name}: {e}") from None
            if self.column not in file.columns:
                raise BitsmoeError(f"{self.name}: has no column {self.column!r}; found {_shown(file.columns)}")
        self._check_rows(_CHECKED_ROWS)

    @property
    def size(self) -> int:
        return self._file.size

    @property
    def memory(self) -> int:
        if self._file.kind is Kind.TEXT:
            return 0
        return 3 * (ROW_BYTES if self._file.gzipped else min(ROW_BYTES, self._file.size))

    @property
    def description(self) -> str:
        return f"{self.recorded} ({self._file.description}{self._column_shown})"

    def _cursor(self) -> Cursor:
        return self._file.cursor(self.column)


class _HubRows(Cursor):
    """Rows of a streamed dataset. Positions are rows."""

    def __init__(self, source: "_HubText"):
        super().__init__(0)
        self._source = source

    def rows(self) -> Iterator[Row]:
        try:
            for number, row in enumerate(self._source.dataset, 1):
                self.position = number
                yield Row(row, numbered(number))
        except _dataset_errors() as e:
            raise self._source.unreadable(e) from None


class _HubText(TextSource):
    """Text of a dataset of the Hub or of a local directory, streamed."""

    def __init__(self, spec: str, option: str, config: str | None, split: str | None, column: str | None):
        super().__init__(f"{option} {spec}".strip(), recorded_name(spec), option, column)
        self._where = spec.removeprefix(HUB)
        known = _DATASETS.get(self._where, _Parts())
        self._config = config or known.config
        parts = self._load()
        self._split = split or next((s for s in (known.split, "train") if s in parts), None)
        if self._split is None and len(parts) == 1:
            (self._split,) = parts
            console.print(f"{self.name}: takes its only split, {self._split}")
        if self._split not in parts:
            raise BitsmoeError(
                f"{self.name}: {f'has no split {split!r}' if split else 'has no split train'}; choose one with "
                f"{option}-split: {', '.join(parts)}"
            )
        self.dataset = parts[self._split]
        self._check_rows(1)
        if self.column is not None:
            self.dataset = self.dataset.select_columns([self.column])

    def _load(self) -> Any:
        import datasets  # heavy, and needed for this source only
        from datasets import packaged_modules

        if (
            self._where in packaged_modules._PACKAGED_DATASETS_MODULES
        ):  # it would read all files below the current directory
            raise BitsmoeError(f"{self.name}: is a reader of the library, not a dataset; give hf:DATASET, or a file")
        try:
            return datasets.load_dataset(self._where, self._config, streaming=True)
        except _dataset_errors() as e:
            try:
                names = datasets.get_dataset_config_names(self._where)
            except _dataset_errors():
                names = []
            if len(names) > 1 and self._config not in names:
                what = f"has no configuration {self._config!r}" if self._config else "has several configurations"
                raise BitsmoeError(
                    f"{self.name}: {what}; choose one with {self._option}-config: {', '.join(names)}"
                ) from None
            raise self.unreadable(e) from None

    def unreadable(self, error: Exception) -> BitsmoeError:
        """What went wrong while it was read."""
        return BitsmoeError(f"{self.name}: the dataset cannot be reached or read ({one_line(error)})")

    @property
    def size(self) -> None:
        return None

    @property
    def memory(self) -> int:
        return HUB_BYTES

    @property
    def description(self) -> str:
        config = f"configuration {self._config}, " if self._config else ""
        return f"{self.recorded} ({config}split {self._split}{self._column_shown})"

    def _cursor(self) -> Cursor:
        return _HubRows(self)


def _dataset_errors() -> tuple[type[Exception], ...]:
    from zipfile import BadZipFile

    from datasets.exceptions import DatasetsError
    from yaml import YAMLError

    return (
        *NETWORK_ERRORS, DatasetsError, YAMLError, BadZipFile, zlib.error, EOFError, StopIteration, ValueError,
        RuntimeError, TypeError, KeyError, ImportError,
    )  # fmt: skip


def open_text(
    spec: str, option: str = "", config: str | None = None, split: str | None = None, column: str | None = None
) -> TextSource:
    """Open a source of text, and check what is cheap to check: what it is, and its first rows.

    Args:
        spec: a file, or `hf:` with a dataset's name or directory.
        option: of the command line, for messages; its name begins those of the options for the parts.
        config: configuration of a dataset.
        split: of a dataset; None: `train`, or the only one.
        column: where the text of a row is; None: the first of COLUMNS.

    Raises:
        BitsmoeError: names the fault and the remedy.
    """
    if spec == HUB:
        raise BitsmoeError(f"{option} {spec}: names no dataset; give hf:DATASET")
    if spec.startswith(HUB):
        return _HubText(spec, option, config, split, column)
    others = "; use `self`, a file of text, or hf:DATASET" if option == "--calib" else ""
    return _FileText(identify(Path(spec), f"{option} {spec}".strip(), others), option, column)
