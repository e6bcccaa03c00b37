"""Configuration of the Sphinx site. ``make docs`` builds it, with warnings as errors."""

import importlib
import re
from importlib.metadata import version as installed_version

from sphinx.util import logging

project = "bilevel"
author = "The bilevel developers"
copyright = author
release = version = installed_version("bilevel")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
# No intersphinx: the build needs no network.

source_suffix = {".rst": "restructuredtext", ".md": "markdown"}
exclude_patterns = ["auto_examples/**/*.ipynb", "auto_examples/**/*.py"]
default_role = "code"

html_theme = "furo"
html_title = f"bilevel {release}"

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = True

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"[\\/]plot_",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
}

# Every name in __all__ of these modules has an entry on the API pages, or the build fails.
DOCUMENTED_MODULES = ["bilevel"]
API_PAGES = "api"  # api.rst, or anything in api/


def _check_api_pages(app, env):
    """Fail the build if a public name is missing from the API pages."""
    entries = {name for name, entry in env.get_domain("py").objects.items() if entry.docname.split("/")[0] == API_PAGES}
    missing = [
        f"{module}.{name}"
        for module in DOCUMENTED_MODULES
        for name in importlib.import_module(module).__all__
        if f"{module}.{name}" not in entries
    ]
    if missing:
        logging.getLogger(__name__).warning(
            "public names without an entry in docs/%s.rst: %s", API_PAGES, ", ".join(sorted(missing))
        )
        app.statuscode = 1  # also where warnings are not errors


def _to_rst(app, what, name, obj, options, lines):
    """Docstrings are written for readers of the source: bars are norms, code takes an ending (`solve`s)."""
    text = re.sub(r"(``.*?``|`[^`]*`)|\|", lambda m: m[1] or r"\|", "\n".join(lines), flags=re.S)
    text = re.sub(r"(``.*?``|`[^`]*`)(?=\w)", r"\1\\ ", text, flags=re.S)
    lines[:] = text.split("\n")


def setup(app):
    """Register what is above; Sphinx calls this."""
    app.connect("autodoc-process-docstring", _to_rst)
    app.connect("env-check-consistency", _check_api_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
