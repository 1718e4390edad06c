"""The documentation site: `make docs` builds it into build/docs.

Pages are Markdown that reads well without the site, too. What comes from the code is made by autodoc and from_code.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import deep_ep

project = "deep_ep"
author = "the deep_ep authors"
version = release = deep_ep.__version__
html_title = "deep_ep"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_code"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

smartquotes_action = "D"  # dashes
# Single backticks of a docstring: a link if they name something of the API, else code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Arguments that share a line stay together.
napoleon_use_param = False

html_theme = "furo"
pygments_dark_style = "github-dark"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
