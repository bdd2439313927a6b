"""Calibration text: what a file holds, which rows can be used, and which tokens are taken of it.

The reference is the rule of small texts, said plainly: tokenize every document as a whole, join, cut into windows.
"""

import bisect
import copy
import gzip
import itertools
import json
import math
import os
import re
import shutil
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from bitsmoe_kernels.errors import BitsmoeError
from builders import REPO, TINY_MOE
from offline_quant.calibration import row_readers, text_file
from offline_quant.calibration import windows as calibration
from offline_quant.calibration.sources.registry import open_text
from offline_quant.calibration.text_source import Document
from offline_quant.calibration.tokens import SLICE, DocumentTokens
from offline_quant.calibration.windows import load_tokenizer, reading_bytes
from offline_quant.config import QuantizeConfig

TEXT = "She opened the door, and there stood her brother with the lamp in his hand. " * 60
ROWS = [f"{TEXT[: 40 + 31 * i]} Day {i}\u2028 was över." for i in range(30)]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_MOE)


@pytest.fixture(scope="module")
def chatty():
    """A tokenizer with a chat template, that opens every text with a special token."""
    found = load_tokenizer(TINY_MOE)
    found.chat_template = TEMPLATE
    begin = ("<|endoftext|>", 0)
    found.backend_tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[begin])
    assert found("a")["input_ids"][0] == 0
    return found


def text_windows(tokenizer, source, *args, **options):
    """Windows of a source, or of the text of a name."""
    source = open_text(source) if isinstance(source, str) else source
    return calibration.text_windows(tokenizer, source, *args, **options)


def joined(tokenizer, texts):
    return [i for text in texts for i in tokenizer(text, verbose=False)["input_ids"]]


def expected_windows(tokenizer, texts, length, limit=None, seed=0):
    ids = joined(tokenizer, texts)
    count = len(ids) // length
    windows = [ids[i * length : (i + 1) * length] for i in range(count)]
    if limit is not None and count > limit:
        start = math.modf(seed * (math.sqrt(5) - 1) / 2)[0]
        windows = [windows[math.floor((i + start) * count / limit)] for i in range(limit)]
    return windows


def lines(rows, end="\n"):
    return "".join(json.dumps({"id": i, "text": row}) + end for i, row in enumerate(rows)).encode()


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path.read_bytes()


CONTAINERS = {
    "lines.jsonl": lines,
    "lines.txt": lines,
    "no name": lines,
    "array.json": lambda rows: json.dumps([{"text": r} for r in rows]).encode(),
    "array.jsonl": lambda rows: json.dumps([{"text": r} for r in rows], indent=2, ensure_ascii=False).encode(),
    "marked array.json": lambda rows: b"\xef\xbb\xbf" + json.dumps([{"text": r} for r in rows]).encode(),
    "array of strings.json": lambda rows: json.dumps(rows).encode(),
    "lines of strings.txt": lambda rows: "".join(json.dumps(r) + "\n" for r in rows).encode(),
    "marked.jsonl": lambda rows: b"\xef\xbb\xbf" + lines(rows),
    "windows ends.json": lambda rows: lines(rows, "\r\n"),
    "old ends.jsonl": lambda rows: lines(rows, "\r"),
    "blank lines.jsonl": lambda rows: b"\n \n" + lines(rows, "\n\n  \r\n") + b"\n\n",
    "no last end.jsonl": lambda rows: lines(rows)[:-1],
    "lines": lambda rows: gzip.compress(lines(rows)),
    "two members.gz": lambda rows: gzip.compress(lines(rows[:9])) + gzip.compress(lines(rows[9:])),
    "gzip of an array.jsonl.gz": lambda rows: gzip.compress(json.dumps([{"text": r} for r in rows]).encode()),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_rows_are_the_same_whatever_holds_them(tmp_path, tokenizer, name):
    path = tmp_path / name
    path.write_bytes(CONTAINERS[name](ROWS))
    for length, limit, seed in ((64, None, 0), (32, 5, 0), (32, 5, 7)):
        got = text_windows(tokenizer, str(path), length, limit, seed)
        assert got.tolist() == expected_windows(tokenizer, ROWS, length, limit, seed)
        assert got.dtype == torch.int64


@pytest.mark.parametrize("name", ["rows.parquet", "rows.txt"])
def test_rows_of_parquet_are_those_of_json_lines(tmp_path, tokenizer, name):
    path = tmp_path / name
    parquet(path, id=list(range(30)), text=ROWS, label=[None] * 30)
    assert text_windows(tokenizer, str(path), 64).tolist() == expected_windows(tokenizer, ROWS, 64)


def test_one_object_is_one_row(tmp_path, tokenizer):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"title": "x", "text": TEXT}, indent=2))
    assert text_windows(tokenizer, str(path), 64).tolist() == expected_windows(tokenizer, [TEXT], 64)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"content": "a", "prompt": "b"}, "a"),
        ({"text": "a", "content": "b", "messages": []}, "a"),
        ({"prompt": "b", "prompt_id": 3}, "b"),
        ("plain", "plain"),
    ],
    ids=str,
)
def test_the_first_usual_column_is_read(tmp_path, tokenizer, row, text):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row) + "\n")
    length = len(tokenizer(text)["input_ids"])
    assert text_windows(tokenizer, str(path), length).tolist() == [tokenizer(text)["input_ids"]]


def test_a_column_can_be_named(tmp_path, tokenizer):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": "no", "story": row}) + "\n" for row in ROWS))
    table = tmp_path / "t.parquet"
    parquet(table, text=["no"] * 30, story=ROWS)
    for file in (path, table):
        source = open_text(str(file), "--calib", column="story")
        assert text_windows(tokenizer, source, 64).tolist() == expected_windows(tokenizer, ROWS, 64)
        assert "`story`" in source.description
        with pytest.raises(BitsmoeError, match=r"no (column )?'tale'; found \['story', 'text'\]"):
            open_text(str(file), "--calib", column="tale")
    (tmp_path / "t.txt").write_text(TEXT)
    with pytest.raises(BitsmoeError, match="plain text without columns; leave out --calib-column"):
        open_text(str(tmp_path / "t.txt"), "--calib", column="text")
    path.write_text('"a"\n"b"\n')
    with pytest.raises(BitsmoeError, match="is text, not an object"):
        open_text(str(path), "--calib", column="text")


TEXTS = {
    "[Chapter 1]\n\nIt was late.\n": "a heading",
    "[1] Smith, J. On rows. 1999.\n[2] Jones.\n": "citations",
    "[1, 2] is an interval, and so is [2, 3].\n": "mathematics",
    '["Hello"] he said, "you there".\n': "speech",
    "[]\nis empty\n": "brackets",
    "{\n": "a brace",
    "{% extends 'base.html' %}\n{{ body }}\n": "a template",
    "{int x = 4; return x;}\n": "code",
    '{"a": 1} is JSON,\nand this is not,\nnor is this.\n': "about JSON",
    "{" * 5000 + "\n": "braces",
    "[" * 200_000 + "\n": "brackets without end",
    '"four five"\n': "a quotation",
    "4\n\n": "a number",
    "1\n2\n3\n": "numbers",
    "# Title\n\n    {'text': 1}\n": "Markdown",
    "Text, and content.\nmore, and more\n": "a sentence with a comma",
}


@pytest.mark.parametrize("content", TEXTS, ids=TEXTS.values())
def test_text_that_is_no_json_is_text(tmp_path, tokenizer, content):
    path = tmp_path / "t.txt"
    path.write_text(content)
    source = open_text(str(path))
    assert "plain text" in source.description
    ids = tokenizer(content, verbose=False)["input_ids"]
    assert text_windows(tokenizer, source, len(ids)).tolist() == [ids]


def test_line_ends_and_a_mark_of_text_are_taken_away(tmp_path, tokenizer):
    path = tmp_path / "t"
    path.write_bytes(b"\xef\xbb\xbfOne\r\ntwo\rthree\n\r\nfour")
    ids = tokenizer("One\ntwo\nthree\n\nfour")["input_ids"]
    assert text_windows(tokenizer, str(path), len(ids)).tolist() == [ids]
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert text_windows(tokenizer, str(path), len(ids)).tolist() == [ids]


TABLE = "id,text\n" + "".join(f'{i},"{TEXT[:50]}"\n' for i in range(9))
WRONG = {
    "utf16.txt": (TEXT.encode("utf-16"), "UTF-16 text, which cannot be read as UTF-8"),
    "utf16be.jsonl": (b"\xfe\xff" + TEXT.encode("utf-16-be"), "UTF-16 text"),
    "utf32.txt": (TEXT.encode("utf-32"), "UTF-32 text"),
    "no mark.txt": (TEXT.encode("utf-16-le"), "byte 1 is zero"),
    "latin.txt": (b"caf\xe9 " * 9, "cannot be read as UTF-8 text: .* at byte 3;"),
    "later.txt": (b"x" * 300_001 + b"\xff" + b"y" * 9, "cannot be read as UTF-8 text: .* at byte 300001;"),
    "cut.txt": ("ab\u20ac".encode()[:-1], "at byte 2;"),
    "zero.txt": (b"x" * 300_001 + b"\0" + b"y" * 9, "holds a zero byte"),
    "image.txt": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "cannot be read as UTF-8|is zero"),
    "archive.txt": (b"PK\x03\x04\x14\0", "a zip archive"),
    "paper.txt": (b"%PDF-1.7\n", "a PDF"),
    "rows.jsonl.zst": (b"\x28\xb5\x2f\xfd\x04\0", "compressed with zstd; decompress it"),
    "rows.arrow": (b"ARROW1\0\0", "an Arrow file"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
    "empty.txt": (b"", "the file is empty"),
    "mark.txt": (b"\xef\xbb\xbf", "nothing but white space"),
    "blank.txt": (b" \r\n\t\n", "nothing but white space"),
    "empty.gz": (gzip.compress(b""), "the gzip file is empty"),
    "cut.gz": (gzip.compress(os.urandom(300_000).hex().encode())[:-20_000], "damaged or truncated gzip"),
    "cut2.gz": (gzip.compress(lines(ROWS))[:-9], "damaged or truncated gzip"),
    "sum.gz": (gzip.compress(lines(ROWS))[:-8] + b"\0" * 8, "damaged or truncated gzip"),
    "head.gz": (b"\x1f\x8b", "damaged or truncated gzip"),
    "twice.gz": (gzip.compress(gzip.compress(b"x")), "gzip or parquet; decompress it first"),
    "inside.gz": (gzip.compress(TEXT.encode("utf-16")), "holds gzip of UTF-16"),
    "not.gz": (b"plain words", "its name says gzip, but its content is not"),
    "not.parquet": (b"plain words", "its name says parquet, but its content is not"),
    "cut.parquet": (b"PAR1" + b"\x15\x04" * 50, "damaged or truncated parquet"),
    "table.csv": (TABLE.encode(), "its name says a table, which is not read; write it as JSON lines"),
    "table.csv.gz": (gzip.compress(TABLE.encode()), "its name says a table"),
    "table.tsv": (TABLE.replace(",", "\t").encode(), "its name says a table"),
    "table.txt": (TABLE.encode(), "begins like a table"),
    "table": (b'"label";"text"\n0;"abc"\n', "begins like a table"),
    "index.txt": (b",text\n" + b'0,"A day, and a night."\n' * 20, "begins like a table"),
    "words.txt": (b"Article ID,Text\n" + b'7,"A day."\n' * 20, "begins like a table"),
    "hyphen.txt": (b"text,label-id\n" + b'"A day.",1\n' * 20, "begins like a table"),
    "bars.txt": (b"id|text\n" + b"7|A day.\n" * 20, "begins like a table"),
    "bare.txt": (b'7,"A day, and a night."\n' * 20, "begins like a table"),
    "table.bin": (gzip.compress(b",text\n" + b'0,"A day."\n' * 20), "begins like a table"),
    "words.json": (b"plain words\nmore\n", r"line 1: not JSON \(Expecting value at column 1\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_text_is_refused(tmp_path, tokenizer, name):
    content, message = WRONG[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BitsmoeError, match=message) as e:
        text_windows(tokenizer, open_text(str(path), "--calib"), 64)
    assert str(e.value).startswith(f"--calib {path}")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "is a pipe or a device"),
        ("/dev/null", "is a pipe or a device"),
        (tmp_path, "is a directory; give a file; use `self`, a file of text, or hf:DATASET"),
        (tmp_path / "no.txt", "no such file; use `self`"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(BitsmoeError, match=message):
            open_text(str(path), "--calib")


WIDE = json.dumps({"text": "good", "other": "x" * 2000})
GOOD = json.dumps({"text": "good"})
BAD_ROWS = {
    "no key": ('{"body": "a"}\n', r"line 1: has no text; expected one of .* found \['body'\]; name .* --calib-column"),
    "not JSON": (f"{GOOD}\nnot json\n", r"line 2: not JSON \(Expecting value at column 1\)"),
    "cut": (f'{GOOD}\r\n\r\n{{"text": "a\r\n', "line 3: not JSON"),
    "old ends": (f"{GOOD}\r\r{GOOD}\rnot json\r", "line 4: not JSON"),
    "first is no JSON": (f"# comment\n{GOOD}\n{GOOD}\n", "line 1: not JSON"),
    "first differs": (f'{{"meta": 1}}\n{GOOD}\n', r"line 1: has no text; .* found \['meta'\]"),
    "mixed": (f'{GOOD}\n{{"body": "b"}}\n{GOOD}\n', r"line 2: has no 'text'; found \['body'\]"),
    "number": (f'{GOOD}\n{{"text": 5}}\n', "line 2: its 'text' is a number, not text"),
    "truth": (f'{GOOD}\n{{"text": true}}\n', "line 2: its 'text' is true or false"),
    "object": (f'{GOOD}\n{{"text": {{"a": 1}}}}\n', "line 2: its 'text' is an object"),
    "strings": (f'{GOOD}\n{{"text": ["a", "b"]}}\n', "line 2: its 'text' is a list"),
    "null row": (f"{GOOD}\nnull\n", "line 2: is null"),
    "lists": ("[1, 2]\n[3]\n", r"line 1: is a list of numbers[\s\S]*line 2: is a list"),
    "integers": ("[1, 2, 3]", r"row 1: is a number[\s\S]*row 3: is a number"),
    "tokens": ('{"input_ids": [1, 2]}\n', "token ids are not read, only text"),
    "completion": (
        '{"prompt": "a", "completion": "b"}\n',
        r"has a 'prompt' and \['completion'\], which are not joined",
    ),
    "alpaca": ('{"instruction": "a", "output": "b"}\n', r"found \['instruction', 'output'\]"),
    "not UTF-8": (f"{GOOD}\n".encode() * 9 + b'{"text": "\xff"}\n', "line 10: not UTF-8"),
    "far away": (f"{WIDE}\n" * 300 + "{}\n" + f"{WIDE}\n" * 300, "line 301: has no 'text'; found"),
    "deep": (f"{GOOD}\n{'[' * 100_000}\n", "line 2: its JSON is nested too deeply"),
    "digits": (f'{GOOD}\n{{"text": "a", "n": {"9" * 5000}}}\n', "line 2: its JSON cannot be read"),
    "columns": ('{"text": ["a", "b"]}', "line 1: its 'text' is a list"),
    "nested": (json.dumps({"data": [{"text": "a"}]}, indent=1), r"row 1: has no text; .* found \['data'\]"),
    "cut array": ('[{"text": "a"}, {"text": "b', "row 2: the file ends within it: it is cut short"),
    "open array": ('[{"text": "a"},\n {"text": "b"}\n', "row 2: the file ends after it: it is cut short"),
    "no comma": ('[{"text": "a"} {"text": "b"}]', r"row 1: not JSON \('\{' after it\)"),
    "last comma": ('[{"text": "a"},]', "row 2: not JSON"),
    "cut object": ('{\n "text": "a', "row 1: the file ends within it: it is cut short"),
    "cut first": ('[\n {"text": "a', "row 1: the file ends within it: it is cut short"),
    "commas": ('{"text": "a"},\n{"text": "b"},\n', r"line 1: not JSON \(Extra data[\s\S]*line 2: not JSON"),
    "spread commas": ('{\n"text": "a"},\n{"text":\n"b"}\n', "after its JSON value: there is more"),
    "Python": ("{'text': 'a'}\n{'text': 'b'}\n", "line 1: not JSON \\(Expecting property name enclosed in double"),
    "tabs": ('{"text": "a\tb"}\n', r"line 1: not JSON \(Invalid control character"),
    "two values": (json.dumps({"text": "a"}, indent=1) * 2, "after its JSON value: there is more"),
    "after the array": ('[{"text": "a"}]\nthe end', "after its JSON value: there is more"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("zipped", [False, True])
def test_rows_that_cannot_be_used_are_named(tmp_path, tokenizer, name, zipped):
    content, message = BAD_ROWS[name]
    content = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / "rows.txt"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(BitsmoeError, match=message) as e:
        text_windows(tokenizer, open_text(str(path), "--calib"), 8)
    assert str(e.value).startswith(f"--calib {path}")


def test_all_rows_that_cannot_be_used_are_told_at_once(tmp_path, tokenizer):
    rows = [{"text": "good"}] * 100
    for i in (20, 50, 51):
        rows[i] = {"text": i}
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BitsmoeError) as e:
        text_windows(tokenizer, str(path), 8)
    assert re.findall(r"line (\d+): its 'text' is a number", str(e.value)) == ["21", "51", "52"]
    path.write_text(json.dumps({"text": "good"}) + '\n{"text": 4}' * 900)
    with pytest.raises(BitsmoeError) as e:
        text_windows(tokenizer, str(path), 8)
    assert 10 < str(e.value).count("is a number") < 20
    table = tmp_path / "t.parquet"
    parquet(table, text=[["a"]] * 3)
    with pytest.raises(BitsmoeError, match=r"row 1: its 'text' is a list[\s\S]*row 3:"):
        open_text(str(table))


def test_rows_without_text_are_passed_over_and_half_surrogates_replaced(tmp_path, tokenizer, capsys):
    path = tmp_path / "t.jsonl"
    half = '{"text": "ab\\ud83d cd \\ude00 \\ud83d\\ude00"}\n'
    path.write_text('{"text": null}\n{"text": ""}\n{"text": " \\n"}\n' + half * 2 + '""\n{"text": "\\u0000x"}\n')
    repaired = "ab\ufffd cd \ufffd \U0001f600"
    expected = joined(tokenizer, [repaired, repaired, "\0x"])
    assert text_windows(tokenizer, str(path), len(expected)).tolist() == [expected]
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("passed over 4 row(s) without text") == 1
    assert said.count("replaced half surrogates by U+FFFD in 2 row(s)") == 1
    path.write_text('{"text": null}\n' * 3)
    with pytest.raises(BitsmoeError, match="holds 0 tokens, but one window takes 8; give more text"):
        text_windows(tokenizer, str(path), 8)


def test_rows_beyond_the_limit_are_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text_file, "ROW_BYTES", 400_000)
    monkeypatch.setattr(row_readers, "ROW_BYTES", 400_000)
    monkeypatch.setattr("offline_quant.calibration.text_source.ROW_BYTES", 400_000)
    fits, long = json.dumps({"text": "ab " * 130_000}), json.dumps({"text": "ab " * 140_000})
    for name, content, where in (
        ("t.jsonl", f"{fits}\n{long}\n{fits}\n", "line 2"),
        ("first.jsonl", f"{long}\n{fits}\n", "line 1"),
        ("t.json", f"[{fits}, {long}]", "row 2"),
        ("one.json", json.dumps(json.loads(long), indent=1), "row 1"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(BitsmoeError, match=f"{where}: longer than"):
            text_windows(tokenizer, str(tmp_path / name), 8)
    parquet(tmp_path / "t.parquet", text=["ab " * 130_000, "ab " * 140_000])
    with pytest.raises(BitsmoeError, match="row 2: holds more than"):
        text_windows(tokenizer, str(tmp_path / "t.parquet"), 8)


CHAT = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "Nobody."}]
SHARED = [{"from": "human", "value": "Who is there?"}, {"from": "gpt", "value": "Nobody."}]
PARTS = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}], "name": None} for m in CHAT]


@pytest.mark.parametrize(
    "row",
    [{"messages": CHAT, "prompt": "x"}, {"conversations": SHARED}, {"conversations": CHAT}, {"messages": PARTS}],
    ids=["messages", "ShareGPT", "conversations", "parts"],
)
@pytest.mark.parametrize("table", [False, True])
def test_chats_go_through_the_chat_template(tmp_path, chatty, row, table):
    path = tmp_path / "t.json"
    if table:
        parquet(path, **{k: [v] * 20 for k, v in row.items()})
    else:
        path.write_text((json.dumps(row) + "\n") * 20)
    text = "<|endoftext|>user: Who is there?\n<|endoftext|>assistant: Nobody.\n"
    ids = chatty(text, add_special_tokens=False)["input_ids"] * 20
    assert ids[0] == 0 != ids[1]  # special tokens once
    source = open_text(str(path))
    assert source.chat
    assert text_windows(chatty, source, len(ids)).tolist() == [ids]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "user"}], r"its turn 1 has neither .* found \['role'\]"),
        ([*SHARED, {"from": "bing", "value": "x"}], "its turn 3 is from 'bing'"),
        ([{"role": "user", "content": 4}], "its turn 1 has content that is a number"),
        ([{"role": "user", "content": None}], "its turn 1 has content that is null"),
        ([{"role": None, "content": "a"}], "its turn 1 has a role that is null"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "its turn 1 holds parts that are no text"),
        ([{"role": "tool", "content": "x"}], "chat template refuses it .*no tools"),
        (["who", "me"], "is a list, not text"),
    ],
    ids=lambda v: "" if isinstance(v, list) else v[:24],
)
def test_chats_that_cannot_be_used_are_named(tmp_path, chatty, turns, message):
    path = tmp_path / "t.jsonl"
    path.write_text((json.dumps({"messages": CHAT}) + "\n") * 2 + json.dumps({"messages": turns}) + "\n")
    with pytest.raises(BitsmoeError, match=f"line 3: .*{message}"):
        text_windows(chatty, str(path), 8)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 // 0 }}",
        "{{ messages[7].content }}",
        "{% for i in range(1000000) %}x{% endfor %}",
        "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
    ],
)
def test_a_chat_template_may_end_with_anything(tmp_path, chatty, template):
    odd = copy.deepcopy(chatty)
    odd.chat_template = template
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}))
    with pytest.raises(BitsmoeError, match="line 1: the tokenizer's chat template refuses it"):
        text_windows(odd, open_text(str(path), "--calib"), 8)


BAD_CARD = {"README.md": "---\nconfigs: [\n---\n", "train.jsonl": '{"text": "x"}'}


@pytest.mark.parametrize("files", [{"train.jsonl": ""}, BAD_CARD], ids=["empty", "yaml"])
def test_a_local_dataset_that_is_damaged(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BitsmoeError, match=re.escape(f"hf:{tmp_path}")):
        open_text(f"hf:{tmp_path}", "--calib")


def test_chats_need_a_chat_template(tmp_path, tokenizer, chatty):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    source = open_text(str(path), "--calib")
    source.check_tokenizer(chatty)
    with pytest.raises(BitsmoeError, match="has no chat template; name a column of plain text with --calib-column"):
        source.check_tokenizer(tokenizer)


SPACED = "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
"""How Qwen's tokenizers cut text into words."""


def trained(pre_tokenizer, normalizer=None, byte_level=True):
    """A BPE tokenizer of the README's words, that puts a special token before and after a text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizer
    if normalizer:
        inner.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(
        [(REPO / "README.md").read_text(encoding="utf-8")[:20_000], "a  b\n\nc \n d\t e"], trainer
    )
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def byte_level(regex=None):
    """With GPT-2's words, or others."""
    if regex is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


TOKENIZERS = {
    "GPT-2": lambda: trained(byte_level()),
    "Qwen": lambda: trained(byte_level(SPACED), normalizers.NFC()),
    "Metaspace": lambda: trained(pre_tokenizers.Metaspace(prepend_scheme="always"), byte_level=False),
    "Metaspace, first": lambda: trained(pre_tokenizers.Metaspace(prepend_scheme="first"), byte_level=False),
    "Llama 2": lambda: trained(
        pre_tokenizers.Metaspace(prepend_scheme="never"),
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),
        byte_level=False,
    ),
}
WORDS = ["the", "bits", "Expert", "a", "x1", "\u00fc"]
SEPARATORS = [" ", "\n", "\n\n", "  ", ", ", ".\n", " \n ", "\t", " 12", "\n  ", "'s ", " \u00e9", "\n\n\n", " - "]


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_of_slices_are_those_of_the_whole(kind):
    tokenizer = TOKENIZERS[kind]()
    tokens = DocumentTokens(tokenizer)

    @given(
        st.lists(
            st.tuples(st.sampled_from(SEPARATORS), st.sampled_from(["the", "bits", "Expert", "a", "x1", "\u00fc"]))
        ),
        st.integers(30, 90),
        st.integers(1, 50),
    )
    def check(words, size, piece):
        text = "".join(f"{separator}{word} of" for separator, word in words)  # a place to cut in every few characters
        pieces = (text[i : i + piece] for i in range(0, len(text), piece))
        slices = list(tokens.slices(Document(pieces), lambda: size))
        assert list(itertools.chain(*slices)) == tokenizer(text)["input_ids"]
        assert len(slices) >= len(text) / size

    check()


def test_special_tokens_go_around_a_document_once():
    tokenizer = TOKENIZERS["GPT-2"]()
    tokens, text = DocumentTokens(tokenizer), TEXT
    for opens, closes in itertools.product((False, True), repeat=2):
        ids = [i for part in tokens.slices(Document(iter([text]), opens, closes), lambda: 500) for i in part]
        assert ids == [0] * opens + tokenizer(text, add_special_tokens=False)["input_ids"] + [1] * closes


def test_text_without_a_place_to_cut_is_cut_all_the_same(tokenizer):
    text = "\u5929\u5730" * 500
    slices = list(DocumentTokens(tokenizer).slices(Document(iter([text])), lambda: 300))
    assert len(slices) == 4
    assert tokenizer.decode(list(itertools.chain(*slices))) == text


class Counting:
    """A tokenizer that notes how long the texts are that it is given."""

    def __init__(self, inner):
        self._inner, self.lengths = inner, []

    def __call__(self, text, **options):
        self.lengths.append(len(text))
        return self._inner(text, **options)


@pytest.mark.slow
def test_a_text_of_several_slices_gives_the_windows_of_the_whole(tmp_path, tokenizer):
    text = "\n\n".join(f.read_text(encoding="utf-8") for f in sorted((REPO / "docs").glob("*.md"))) * 5
    assert len(text) > 2 * SLICE
    path = tmp_path / "t.txt"
    path.write_text(text, encoding="utf-8")
    counting = Counting(tokenizer)
    for limit, seed in ((None, 0), (7, 3)):
        got = text_windows(counting, str(path), 512, limit, seed)
        assert got.tolist() == expected_windows(tokenizer, [text], 512, limit, seed)
    assert max(counting.lengths) <= SLICE


@pytest.fixture
def spread(monkeypatch):
    """Files are large from 2,000 bytes on, where a window of n tokens should have 8 n of them."""
    monkeypatch.setattr(calibration, "WHOLE_BYTES", 2000)
    monkeypatch.setattr(calibration, "SPREAD_BYTES", 8)


def places(size, limit, seed):
    start = math.modf(seed * (math.sqrt(5) - 1) / 2)[0]
    return [math.floor((i + start) * size / (limit + 1)) for i in range(limit)]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_windows_of_a_large_text_begin_at_evenly_spread_lines(tmp_path, tokenizer, spread, end, mark):
    data = mark + end.join(f"{i}. {TEXT[: 17 + 7 * (i % 40)]}\u00fc{'' if i % 9 else end}" for i in range(900)).encode()
    path, zipped = tmp_path / "t.txt", tmp_path / "zipped.txt"
    path.write_bytes(data)
    zipped.write_bytes(gzip.compress(data))
    begins = [len(mark), *(m.end() for m in re.finditer(rb"\r\n?|\n", data))]
    seen = set()
    for seed in range(4):
        counting = Counting(tokenizer)
        windows = text_windows(counting, str(path), 40, 12, seed)
        for place, window in zip(places(len(data), 12, seed), windows.tolist(), strict=True):
            begin = begins[bisect.bisect_left(begins, place)]
            text = data[begin : begin + 4000].decode(errors="ignore").replace("\r\n", "\n").replace("\r", "\n")
            assert window == tokenizer(text)["input_ids"][:40]
        seen.add(tuple(windows.flatten().tolist()))
        assert torch.equal(text_windows(tokenizer, str(zipped), 40, 12, seed), windows)
        assert sum(counting.lengths) < 4 * 12 * 40 * 8
    assert len(seen) == 4


def test_windows_of_a_text_of_one_line_begin_at_characters(tmp_path, tokenizer, spread):
    path = tmp_path / "t.txt"
    text = "".join(f"\u5929\u5730{i}" for i in range(30_000))
    path.write_text(text, encoding="utf-8")
    windows = text_windows(tokenizer, str(path), 40, 12, seed=1)
    assert len(windows) == 12
    found = [text.find(tokenizer.decode(w).strip("\ufffd")) for w in windows.tolist()]
    assert found == sorted(found)
    assert min(found) > 0
    assert min(b - a for a, b in itertools.pairwise(found)) > len(text) / 15


LARGE = [f"{i}: {TEXT[: 20 + 13 * (i % 60)]}" for i in range(400)]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_windows_of_many_rows_begin_at_evenly_spread_rows(tmp_path, tokenizer, spread, end):
    data = lines(LARGE, end)
    path, zipped = tmp_path / "t", tmp_path / "zipped"
    path.write_bytes(data)
    zipped.write_bytes(gzip.compress(data))
    begins = [0, *(m.end() for m in re.finditer(rb"\r\n?|\n", data))]
    counting = Counting(tokenizer)
    windows = text_windows(counting, str(path), 40, 12, seed=2)
    for place, window in zip(places(len(data), 12, 2), windows.tolist(), strict=True):
        first = bisect.bisect_left(begins, place)
        assert window == joined(tokenizer, LARGE[first : first + 60])[:40]
    assert torch.equal(text_windows(tokenizer, str(zipped), 40, 12, seed=2), windows)
    assert sum(counting.lengths) < sum(map(len, LARGE)) / 2


def test_windows_of_a_large_table_begin_at_evenly_spread_rows(tmp_path, tokenizer, spread):
    parquet(tmp_path / "t", text=LARGE)
    windows = text_windows(tokenizer, str(tmp_path / "t"), 40, 12, seed=2)
    for place, window in zip(places(400, 12, 2), windows.tolist(), strict=True):
        assert window == joined(tokenizer, LARGE[place : place + 60])[:40]


def test_windows_of_a_large_array_begin_at_rows(tmp_path, tokenizer, spread, monkeypatch):
    monkeypatch.setattr(row_readers, "BLOCK_BYTES", 500)
    path = tmp_path / "t"
    path.write_text(json.dumps([{"text": t} for t in LARGE]))
    windows = text_windows(tokenizer, str(path), 40, 12, seed=2)
    first = [int(tokenizer.decode(w).split(":")[0]) for w in windows.tolist()]
    assert windows.tolist() == [joined(tokenizer, LARGE[i : i + 60])[:40] for i in first]
    assert len(first) == 12
    assert max(abs(b - a - 400 / 13) for a, b in itertools.pairwise(first)) < 17  # rows differ in length


def test_a_row_that_holds_many_places_is_read_on(tmp_path, tokenizer, spread):
    path = tmp_path / "t"
    long = " ".join(map(str, range(9000)))
    path.write_bytes(lines(["short", long]))
    windows = text_windows(tokenizer, str(path), 40, 12).tolist()
    assert windows[0] == joined(tokenizer, ["short", long])[:40]
    ids = joined(tokenizer, [long])
    # The next place is within the long row: it is read on, from where it was.
    assert list(itertools.chain(*windows)) == joined(tokenizer, ["short", long])[: 12 * 40]
    assert len(ids) > 12 * 40


def test_faults_of_a_large_file_name_the_line(tmp_path, tokenizer, spread):
    path = tmp_path / "t"
    path.write_bytes(lines(LARGE, "\r\n") + b'{"text": 4}\r\n' * 9000)
    data = path.read_bytes()
    begins = [0, *(m.end() for m in re.finditer(b"\n", data))]
    first = next(n for p in places(len(data), 12, 0) if (n := bisect.bisect_left(begins, p)) >= len(LARGE))
    with pytest.raises(BitsmoeError, match=rf"line {first + 1}: its 'text' is a number.*\n  - line {first + 2}:"):
        text_windows(tokenizer, str(path), 40, 12)


def test_there_is_text_behind_the_last_place(tmp_path, tokenizer, spread, capsys):
    path = tmp_path / "t"
    path.write_text(" brother" * 600)
    for seed in range(20):
        assert len(text_windows(tokenizer, str(path), 150, 3, seed)) == 3
    assert "fewer" not in capsys.readouterr().err
    # Behind the place of this seed there are 350 tokens.
    ids = tokenizer(path.read_text())["input_ids"]
    assert text_windows(tokenizer, str(path), 550, 1, 3).tolist() == [ids[:550]]


@pytest.mark.parametrize("rows", [False, True])
def test_a_large_file_is_read_in_little_memory(tmp_path, tokenizer, rows):
    path = tmp_path / "t"
    block = lines([TEXT] * 50) if rows else (TEXT + "\n").encode() * 50
    with path.open("wb") as file:
        for _ in range(30_000_000 // len(block)):
            file.write(block)
    source = open_text(str(path))
    counting = Counting(tokenizer)
    tracemalloc.start()
    try:
        windows = text_windows(counting, source, 64, 16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(windows) == 16
    assert peak < 6_000_000
    assert sum(counting.lengths) < 16 * 64 * 20 + 16 * len(TEXT)
    assert reading_bytes(source.memory, 1024) < 200_000_000


def write_datasets(directory):
    """Local stand-ins for the usual sets, where their names lead."""
    wiki = directory / "Salesforce/wikitext"
    wiki.mkdir(parents=True)
    card = ["---", "configs:"]
    for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
        card += [f"- config_name: {name}", "  data_files:"]
        for split in ("test", "train"):
            (wiki / f"{name}-{split}.jsonl").write_bytes(lines([f"{name} {split}", "", TEXT] * 3))
            card += [f"  - split: {split}", f"    path: {name}-{split}.jsonl"]
    (wiki / "README.md").write_text("\n".join([*card, "---", ""]))
    shutil.copytree(wiki, directory / "wikitext")
    pile = directory / "mit-han-lab/pile-val-backup"
    pile.mkdir(parents=True)
    (pile / "validation.jsonl").write_bytes(lines(["pile", TEXT] * 3))
    chat = directory / "HuggingFaceH4/ultrachat_200k"
    chat.mkdir(parents=True)
    for split in ("train_sft", "test_sft", "train_gen"):
        parquet(chat / f"{split}.parquet", prompt=[split] * 9, prompt_id=["0"] * 9, messages=[CHAT] * 9)
    (chat / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {s}.parquet\n" for s in ("train_sft", "test_sft", "train_gen"))
        + "---\n"
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    write_datasets(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


WIKI, CHAT_TEXT = "wikitext-2-raw-v1", "<|endoftext|>user: Who is there?\n<|endoftext|>assistant: Nobody.\n"


@pytest.mark.parametrize(
    ("name", "parts", "texts"),
    [
        ("Salesforce/wikitext", {}, [f"{WIKI} train", TEXT] * 3),
        ("wikitext", {}, [f"{WIKI} train", TEXT] * 3),
        ("wikitext", {"split": "test"}, [f"{WIKI} test", TEXT] * 3),
        ("wikitext", {"config": "wikitext-103-raw-v1"}, ["wikitext-103-raw-v1 train", TEXT] * 3),
        ("mit-han-lab/pile-val-backup", {}, ["pile", TEXT] * 3),
        ("HuggingFaceH4/ultrachat_200k", {"column": "prompt"}, ["train_sft"] * 9),
        ("HuggingFaceH4/ultrachat_200k", {"column": "prompt", "split": "test_sft"}, ["test_sft"] * 9),
    ],
)
def test_the_usual_datasets_work(hub, tokenizer, name, parts, texts):
    source = open_text(f"hf:{name}", "--calib", **parts)
    ids = joined(tokenizer, texts)
    assert text_windows(tokenizer, source, len(ids)).tolist() == [ids]
    assert text_windows(tokenizer, source, 3, 2).tolist() == [ids[:3], ids[3:6]]  # the first ones
    assert source.recorded == f"hf:{name}"


def test_the_chats_of_a_dataset_are_rendered(hub, chatty):
    source = open_text("hf:HuggingFaceH4/ultrachat_200k", "--calib")
    ids = chatty(CHAT_TEXT, add_special_tokens=False)["input_ids"] * 9
    assert source.chat
    assert text_windows(chatty, source, len(ids)).tolist() == [ids]


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("./wikitext", {}, "several configurations; choose one with --calib-config: .*103-raw-v1, wikitext-2-raw-v1"),
        (
            "wikitext",
            {"config": "raw"},
            "no configuration 'raw'; choose one with --calib-config: wikitext-103-raw",
        ),
        ("wikitext", {"split": "dev"}, "no split 'dev'; choose one with --calib-split: test, train"),
        ("./HuggingFaceH4/ultrachat_200k", {}, "no split train; choose .* train_sft, test_sft, train_gen"),
        ("wikitext", {"column": "body"}, r"row 1: has no 'body'; found \['id', 'text'\]"),
        ("./nothing/here", {}, "cannot be reached or read"),
        ("./cache", {}, "cannot be reached or read"),
    ],
)
def test_parts_that_a_dataset_does_not_have_are_told_with_those_it_has(hub, monkeypatch, name, parts, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (hub / "cache").mkdir(exist_ok=True)
    with pytest.raises(BitsmoeError, match=message) as e:
        open_text(f"hf:{name}", "--calib", **parts)
    assert str(e.value).startswith(f"--calib hf:{name}")
    assert "\n" not in str(e.value)


def test_the_only_split_is_taken_and_that_is_said(hub, tokenizer, capsys):
    source = open_text("hf:./mit-han-lab/pile-val-backup", "--calib")
    assert "takes its only split, validation" in " ".join(capsys.readouterr().err.split())
    assert source.recorded == "hf:pile-val-backup"
    assert "split validation, `text` of its rows" in source.description
    ids = joined(tokenizer, ["pile", TEXT])
    assert text_windows(tokenizer, source, len(ids), 1).tolist() == [ids]


def test_rows_of_a_dataset_that_cannot_be_used_are_named(tmp_path, tokenizer):
    parquet(tmp_path / "train.parquet", text=[["a"]] * 3)
    with pytest.raises(BitsmoeError, match="row 1: its 'text' is a list"):
        open_text(f"hf:{tmp_path}")


def test_what_is_recorded_has_no_paths_and_no_keys_that_were_not_given(tmp_path):
    plain = QuantizeConfig(bits=2, calib=f"{tmp_path}/a.txt").record()
    assert plain["calib"] == "a.txt"
    assert not [k for k in plain if k.startswith("calib_") and k not in ("calib_samples", "calib_length")]
    parts = QuantizeConfig(bits=2, calib=f"hf:{tmp_path}/set", calib_config="c", calib_column="t").record()
    assert (parts["calib"], parts["calib_config"], parts["calib_column"]) == ("hf:set", "c", "t")
    assert "calib_split" not in parts
    assert QuantizeConfig(bits=2, calib="hf:a/b").record()["calib"] == "hf:a/b"
