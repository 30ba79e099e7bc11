"""Texts of data on a terminal."""

from __future__ import annotations

import pytest
from rich.table import Table
from rich.text import Text

from mmrep.cli import main
from mmrep.printing import print_table, printable


def test_control_characters_are_left_out_and_everything_else_stays() -> None:
    assert printable("a\x1b[2Jb\x07\x00\x7f\x9b c\r\n\td") == "a[2Jb c\n\td"
    for text in ("\u00e9\u4e2d \U0001f469\u200d\U0001f680", "two\nlines", "\u0627\u200f"):
        assert printable(text) == text
    printable("half \ud83d").encode()
    assert printable(ValueError("x\x1b")) == "x"


def test_a_table_is_drawn_as_if_they_were_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = []
    for title, cell in (("a title", "red [b] ball"), ("a \x1b[31mtitle", "red\x1b [b] \x9bball")):
        table = Table("key", title=Text(title.replace("[31m", "")))
        table.add_row(Text(cell))
        print_table(table)
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] and "red [b] ball" in drawn[0]


def test_an_error_that_quotes_data_is_printed_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", "no\x1b]52;c;cHduZWQ=\x07where"]) == 2
    error = capsys.readouterr().err
    assert "no]52;c;cHduZWQ=where" in error and "\x1b" not in error
