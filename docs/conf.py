"""The documentation site: `make docs` builds it into out/docs, with warnings as errors."""

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
exclude_patterns = ["results/*", "demo/*"]
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
nitpick_ignore = [
    ("py:class", "torch.nn.modules.module.Module"),
    ("py:class", "sokd.kd.policy.policy.WideModule"),  # a base class without a page
]

html_theme = "furo"
html_title = "sokd"
html_copy_source = False
html_show_sphinx = False
templates_path = []


def _code_blocks(app, what, name, obj, options, lines):
    """Indented blocks after a paragraph are code: examples and formulas in plain text."""
    for index in reversed(range(1, len(lines))):
        starts = lines[index].startswith("    ") and not lines[index - 1].strip()
        before = next((line for line in reversed(lines[:index]) if line.strip()), " ")
        if starts and not before.startswith(" "):
            lines[index:index] = [".. code-block:: python", ""]


def setup(app):
    app.connect("autodoc-process-docstring", _code_blocks, priority=400)  # before napoleon
