"""The documentation site: `make docs` builds it into out/docs, with warnings as errors."""

import inspect

import sokd

project = "sokd"
author = "The sokd authors"
release = version = sokd.__version__
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["conf.py", "results/*", "demo/*", "README.md"]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
# Links from a page to files of the repository are those of the forge; on the site they stay text.
suppress_warnings = ["myst.xref_missing"]

default_role = "code"
autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": False}
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_use_rtype = False
napoleon_use_param = False
nitpicky = True

html_theme = "furo"
html_title = "sokd"
html_copy_source = False
html_show_sphinx = False
templates_path = []


def _verbatim_module_docstring(app, what, name, obj, options, lines):
    """Modules and operators open with formulas in plain text: keep their line breaks."""
    if what == "module":
        text = inspect.getdoc(obj) or ""
        lines[:] = [text.splitlines()[0], "", "::", "", *("   " + x for x in text.splitlines()[1:]), ""]


def setup(app):
    app.connect("autodoc-process-docstring", _verbatim_module_docstring)
