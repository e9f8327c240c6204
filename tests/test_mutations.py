"""The list of faults that the suite must find fits the source."""

from __future__ import annotations

import pytest

from .mutations import MUTATIONS, ROOT


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the list is of a checkout's files")
def test_each_line_to_be_changed_stands_once():
    counts = {mutation.name: (ROOT / mutation.file).read_text().count(mutation.old) for mutation in MUTATIONS}
    assert len(counts) == len(MUTATIONS) >= 60
    assert {name: count for name, count in counts.items() if count != 1} == {}
    assert all(mutation.old != mutation.new for mutation in MUTATIONS)
