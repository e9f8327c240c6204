"""The documentation site, which `make docs` builds.

The repository's root is the source folder, so that links between pages, reports, examples and source files are the same
here and on a code host. `include_patterns` says which files are pages.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import api_pages
import docstrings

import fastdrop

project = "fastdrop"
author = "the fastdrop authors"
copyright = author
version = release = fastdrop.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/api/*.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "bench/results/*.md",
    "bench/results/*/*.md",
    "examples/tour.ipynb",
]
exclude_patterns = [".*", "build", "dist", "csrc", "fastdrop", "tests", "*.egg-info"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
]

html_theme = "furo"
html_title = f"fastdrop {version}"
html_favicon = html_logo = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]
html_copy_source = False
html_show_sourcelink = False

nitpicky = True
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]
nb_execution_mode = "off"

autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autosummary_generate = False
default_role = "literal"


def setup(app: Any) -> None:
    app.connect("builder-inited", api_pages.write)
    app.connect("autodoc-process-docstring", docstrings.process)
