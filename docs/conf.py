"""How the documentation is built: ``sphinx-build -W --keep-going -n docs build/docs``.

Nothing is fetched, while building or while reading: formulas become MathML, fonts are those of the reader's system.
Notebooks are shown without outputs unless MARKOVSAFETY_DOCS_NOTEBOOKS says ``cache`` (run once, outputs kept beside
the build) or ``force``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extensions")]

import markovsafety  # noqa: E402

project = "markovsafety"
author = "The markovsafety developers"
version = release = markovsafety.__version__
project_copyright = author
language = "en"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
    "rooms",  # the reference, from the rooms of the package
    "gallery",  # every figure with the code that makes it
    "commands",  # the command line, from its own --help
    "mathml",  # formulas without a script
    "beside",  # pages of papers/ and notebooks/
    "reachable",  # by keyboard and by screen readers
]
exclude_patterns = [
    "papers/README.md",
    "papers/markovsafety/note",
    "papers/figures",
    "**/__pycache__",
    "**/.ipynb_checkpoints",
]
suppress_warnings = [
    "config.cache",
    "toc.empty_glob",  # pages that may be there
]

# Names in single backticks of docstrings are names of the package where it has them.
default_role = "py:obj"
nitpicky = True
autodoc_typehints = "none"  # types stand in the docstrings, with shapes and units
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence", "attrs_inline"]
myst_dmath_double_inline = True  # formulas between lines of a proof
myst_heading_anchors = 3
myst_links_external_new_tab = False

nb_execution_mode = os.environ.get("MARKOVSAFETY_DOCS_NOTEBOOKS", "off")
nb_execution_cache_path = str(ROOT / "build" / "notebooks")
nb_execution_timeout = 600
nb_execution_in_temp = True  # what a notebook writes does not stay beside it
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_ipywidgets_js = {}

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"markovsafety {release}"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
