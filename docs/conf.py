"""Sphinx configuration."""

from celbo import __version__

project = "celbo"
copyright = "2026, the celbo authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
autodoc_typehints = "none"
napoleon_google_docstring = False
html_theme = "furo"
html_title = f"celbo {__version__}"
exclude_patterns = ["_build"]
