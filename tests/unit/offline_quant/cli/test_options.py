"""Options are written once: the help, the table for the docs and the checks all say what the config's fields say."""

import re
import runpy

import pytest
from typer.testing import CliRunner

from bitsmoe_kernels.errors import BitsmoeError
from offline_quant.cli.commands import app
from offline_quant.cli.options import split_lists
from offline_quant.cli.options_table import options_table
from offline_quant.config import QuantizeConfig, RunOptions, named_options

FIRST = {
    "--bits", "--out", "--calib", "--calib-samples", "--dense-bits", "--tune", "--device", "--workers", "--resume",
    "--plan",
}  # fmt: skip
OTHERS = {
    "--target-kl", "--objective", "--budget", "--gamma", "--ranks", "--basis", "--basis-bits", "--block-size",
    "--feedback", "--no-feedback", "--refine", "--fit", "--tune-model", "--tune-codes", "--calib-config",
    "--calib-split", "--calib-column", "--calib-length", "--token-weights", "--seed", "--revision", "--max-memory",
}  # fmt: skip


@pytest.fixture(scope="module")
def panels() -> dict[str, str]:
    """The help of `bitsmoe quantize` on 80 columns: text by panel."""
    done = CliRunner().invoke(app, ["quantize", "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    found: dict[str, str] = {}
    for line in lines:
        if begin := re.match(r"╭─ (.+?) ─+╮", line):
            title = begin[1]
            found[title] = ""
        elif line.startswith("│"):
            found[title] += line.strip("│") + "\n"
    return found


def options_in(text: str) -> set[str]:
    """Options that begin a row of a panel."""
    rows = [line.split("<")[0] for line in text.splitlines() if re.match(r" (\*| )? *--", line)]
    return {word for row in rows for word in row.split() if word.startswith("--")}


def test_the_ten_options_people_use_first_are_on_top(panels: dict[str, str]) -> None:
    titles = list(panels)
    assert titles[:2] == ["Arguments", "Options"]
    assert options_in(panels["Options"]) == FIRST | {"--help"}
    assert {option for title in titles[2:] for option in options_in(panels[title])} == OTHERS


def test_help_and_table_say_what_the_fields_say(panels: dict[str, str]) -> None:
    table = {row.split("`")[1]: row for row in options_table().splitlines() if row.startswith("| `")}
    assert set(table) == (FIRST | OTHERS) - {"--no-feedback"}
    words = set(" ".join(panels.values()).split())
    shown = 0
    for name, field in RunOptions.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        if option in table:
            shown += 1
            assert field.description in table[option]
            assert set(field.description.split()) <= words
    assert shown == len(table) - 2  # --out and --workers are the command's own
    assert "| `16` | Bits of attention" in table["--dense-bits"]
    assert table["--dense-bits"].endswith("One of 4, 8, 16. |")
    assert table["--objective"].endswith("One of bitsmoe, alphaq, bt-moe, frequency, uniform. |")
    assert "| required |" in table["--out"]
    assert "| `0,8,16,32,64,128` |" in table["--ranks"]
    assert table["--feedback"].startswith("| `--feedback` `--no-feedback` | on |")
    assert "| off |" in table["--tune"]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("offline_quant.cli.options_table", run_name="__main__")
    assert capsys.readouterr().out == options_table() + "\n"


def test_lists_are_given_with_commas() -> None:
    options = split_lists({"bits": 2.0, "ranks": "0, 4,8", "calib": "a,b"}, RunOptions)
    assert options == {"bits": 2.0, "ranks": ("0", "4", "8"), "calib": "a,b"}
    assert RunOptions(**options).ranks == (0, 4, 8)


def test_options_of_a_run_are_no_part_of_the_record() -> None:
    run = RunOptions(bits=2, without=["trim"], seed=3, revision="dev", plan=True, max_memory="1GB")
    config = run.config()
    assert type(config) is QuantizeConfig
    assert list(RunOptions(target_kl=0.01).config().with_bits(2.5).record())[:3] == ["bits", "target_kl", "objective"]
    assert config == QuantizeConfig(bits=2, without=["trim"], seed=3)
    assert list(config.record()) == [
        "bits", "objective", "budget", "gamma", "ranks", "basis", "basis_bits", "block_size", "dense_bits", "widths",
        "feedback", "refine", "tune", "fit", "tune_model", "tune_codes", "without", "calib", "calib_samples",
        "calib_length", "token_weights", "seed",
    ]  # fmt: skip


def test_faults_name_the_option() -> None:
    with pytest.raises(BitsmoeError) as raised, named_options():
        RunOptions(bits=2, calib_samples=0, objective="best")
    assert str(raised.value).splitlines() == [
        "--objective 'best': Input should be 'bitsmoe', 'alphaq', 'bt-moe', 'frequency' or 'uniform'",
        "--calib-samples 0: Input should be greater than or equal to 1",
    ]
