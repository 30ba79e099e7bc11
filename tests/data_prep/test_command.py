"""How commands that build shards answer."""

from __future__ import annotations

import pytest

from data_prep.building.command import answer
from mmrep.errors import DataError


def test_what_a_terminal_would_obey_is_left_out_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> str:
        raise DataError("row 2 says \x1b]52;c;aGk=\x07'gone.png'")

    assert answer(work) == 2
    assert capsys.readouterr().err == "error: row 2 says ]52;c;aGk='gone.png'\n"
