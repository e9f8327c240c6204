"""What messages say about installing fastdrop."""

import re

from fastdrop.core import installing
from fastdrop.core.installing import how_to_install

from ..cases import ROOT

# PyPI's "fastdrop" is another project, so that no message may tell a reader to install it.
ANOTHER_PROJECT = re.compile(r"""pip install (?:\S+ )*['"]?fastdrop\b(?!-kernels|'s)""")


def test_words(monkeypatch):
    assert how_to_install("torch,demo") == "pip install '.[torch,demo]' in fastdrop's source folder"
    monkeypatch.setattr(installing, "IS_PUBLISHED", True)
    assert how_to_install("torch,demo") == "pip install 'fastdrop-kernels[torch,demo]'"
    assert how_to_install() == "pip install 'fastdrop-kernels'"


def test_no_message_says_to_install_another_project():
    for wrong in ("pip install fastdrop", "pip install 'fastdrop[cuda]'", 'pip install -U "fastdrop"'):
        assert ANOTHER_PROJECT.search(wrong)
    paths = [path for folder in ("fastdrop", "bench", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 150
    assert not [path for path in paths if ANOTHER_PROJECT.search(path.read_text())]
