"""docs/errors.md: each bad input ends in one short message, and the page lists the current ones."""

import re
from pathlib import Path

import errors
import pytest
import transformers

from mm_hf.methods import METHODS
from tests.helpers.bad_inputs import CASES

ALL = [(subject, case) for subject, cases in CASES.items() for case in cases]
PINNED = re.search(r"^transformers==(.*)$", (errors.ROOT / "constraints.txt").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in [name for name, method in METHODS.items() if not method.__module__.startswith("mm_hf.")]:
            patch.delitem(METHODS, name)  # methods that other tests have registered
        return errors.run_cases(tmp_path_factory.mktemp("bad") / "inputs")


@pytest.mark.parametrize(("subject", "case"), ALL)
def test_bad_input_ends_in_one_short_message(messages, subject, case):
    message = messages[subject][case]
    assert message and "\n" not in message and "Traceback" not in message
    assert len(message) < 500 and message[-1] in ".?)"


def test_page_lists_at_least_eighty_kinds_of_bad_input():
    assert len(set(ALL)) == len(ALL) >= 80


@pytest.mark.skipif(
    PINNED is None or PINNED[1] != transformers.__version__, reason="messages of Transformers depend on its version"
)
def test_page_is_current(messages):
    assert Path(errors.PAGE).read_text(encoding="utf-8") == errors.page(messages), "run: make errors"


def test_planted_code_does_not_run(messages, tmp_path_factory):
    assert not list((tmp_path_factory.getbasetemp()).rglob("ran"))
