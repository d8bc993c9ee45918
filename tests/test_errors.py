"""Errors say where they happened, whatever kind they are of and however that kind is made."""

import pytest

from subjax.data.chat_template import TemplateRefusal
from subjax.data.numbers import Rejected
from subjax.errors import Preempted, SubjaxError, UsageError
from subjax.files import DiskFull

KINDS = [
    (SubjaxError("no row"), SubjaxError),
    (UsageError("no row"), UsageError),
    (Preempted("no row"), Preempted),
    (DiskFull("no row"), DiskFull),
    (Rejected("words", "no row"), SubjaxError),  # its message is made of a reason and a text
    (TemplateRefusal("no row", "system role"), UsageError),
]


@pytest.mark.parametrize(("error", "kind"), KINDS, ids=lambda value: type(value).__name__)
def test_within_keeps_the_message_and_the_exit_status(error, kind):
    found = error.within("student gpt/0")
    assert type(found) is kind
    assert str(found) == f"student gpt/0: {error}"
    assert found.exit_status == error.exit_status
