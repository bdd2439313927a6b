"""Text that can be read again and again, document by document, whatever its source."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from bitsmoe_kernels.errors import BitsmoeError, fault_list, one_line
from offline_quant.calibration.chat import UnusableError, kind_of_value, messages_of, shown_keys
from offline_quant.calibration.row_readers import Cursor, PlainText, Row
from offline_quant.calibration.text_file import ROW_BYTES
from offline_quant.runtime.progress import console

COLUMNS = ("text", "content", "messages", "conversations", "prompt")
"""Keys of a row that may hold its text; the first that is there is taken."""
_ANSWERS = ("completion", "response", "responses", "output", "answer", "solution", "chosen", "rejected")
_MORE_ROWS, _SHOWN_FAULTS = 2000, 12
_TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)
"""Errors of a chat template, which is a program. RecursionError is a RuntimeError."""
_HALF_SURROGATES = re.compile("[\ud800-\udfff]")


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
            except UnusableError as e:
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
            raise UnusableError(f"holds more than {ROW_BYTES >> 20} million characters; split it")
        text, repaired = _HALF_SURROGATES.subn("\ufffd", text)
        self._repaired += repaired > 0
        framed = isinstance(value, str)  # a chat template puts special tokens in itself
        return Document(iter([text]), framed, framed)

    def _rendered(self, value: list[Any]) -> str | None:
        from jinja2 import TemplateError

        if not value:
            return None
        messages = messages_of(value)
        self._source.check_tokenizer(self._tokenizer, chat=True)
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except (*_TEMPLATE_ERRORS, TemplateError) as e:
            raise UnusableError(f"the tokenizer's chat template refuses it ({one_line(e)[:300]})") from None

    def _refusal(self, row: Row, reason: str, more: Iterator[Row]) -> BitsmoeError:
        faults = [f"{row.where()}: {reason}"]
        for following in islice(more, _MORE_ROWS):
            try:
                self._document(following)
            except UnusableError as e:
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


class TextSource(ABC):
    """Text that can be read again and again.

    Attributes:
        name: for messages.
        recorded: the name that a checkpoint records, without directories.
        column: key of the text in rows that are objects; None: there are no such rows.
        chat: whether the first rows hold chats.
        option: the command line's option that named it; the options for its parts begin with the same word.
    """

    def __init__(self, name: str, recorded: str, option: str, column: str | None):
        self.name, self.recorded, self.column, self.chat = name, recorded, column, False
        self.option, self._named = option, column is not None

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Bytes of text; None: unknown, as of a dataset."""

    @property
    @abstractmethod
    def memory(self) -> int:
        """Bytes of memory that reading takes at most."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The source in a line, for people."""

    @property
    def column_shown(self) -> str:
        """The part of a description that names the column of its text; empty without rows."""
        return f", `{self.column}` of its rows{', chats' if self.chat else ''}" if self.column else ""

    @abstractmethod
    def cursor(self) -> Cursor:
        """A reader of its rows or text, from the beginning."""

    def read(self, tokenizer: Any = None) -> Reading:
        """Begin a pass. The tokenizer renders chats."""
        return Reading(self, self.cursor(), tokenizer)

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
                f"column of plain text with {self.option}-column, or put a chat_template.jinja beside the tokenizer"
            )

    def value_of(self, row: Row) -> str | list[Any] | None:
        """A row's text, or its messages.

        Raises:
            UnusableError: it has neither; says why.
        """
        if row.fault:
            raise UnusableError(row.fault)
        if isinstance(row.value, str) and not self._named:
            return row.value
        if not isinstance(row.value, dict):
            raise UnusableError(f"is {kind_of_value(row.value)}, not an object with text")
        if self.column is None:
            self.column = self._text_column(list(row.value))
        if self.column not in row.value:
            raise UnusableError(f"has no {self.column!r}; found {shown_keys(row.value)}")
        value = row.value[self.column]
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
            return value
        raise UnusableError(f"its {self.column!r} is {kind_of_value(value)}, not text")

    def _text_column(self, keys: list[str]) -> str:
        remedy = f"name the right one with {self.option}-column"
        for name in COLUMNS:
            if name in keys:
                if name == "prompt" and (answers := [k for k in _ANSWERS if k in keys]):
                    raise UnusableError(f"has a 'prompt' and {answers}, which are not joined; {remedy}")
                return name
        tokens = "; token ids are not read, only text" if "input_ids" in keys else ""
        raise UnusableError(
            f"has no text; expected one of the keys {list(COLUMNS)}, found {shown_keys(keys)}{tokens}; {remedy}"
        )

    def check_rows(self, count: int) -> None:
        """Read the first rows.

        Raises:
            BitsmoeError: names those that cannot be used.
        """
        cursor = self.cursor()
        if isinstance(cursor, PlainText):
            if self.column is not None:
                raise BitsmoeError(f"{self.name}: is plain text without columns; leave out {self.option}-column")
            return
        faults = []
        for row in islice(cursor.rows(), count):
            try:
                value = self.value_of(row)
                self.chat |= isinstance(value, list) and bool(value)
                if isinstance(value, list):
                    messages_of(value)
            except UnusableError as e:
                faults.append(f"{row.where()}: {e}")
        if len(faults) == 1:
            raise BitsmoeError(f"{self.name}, {faults[0]}")
        if faults:
            raise BitsmoeError(fault_list(f"{self.name}: rows that cannot be used", faults))
