"""What a model does with one text, token by token, as a page to read."""

from .collect import Inspection, inspect_text
from .page import render_page

__all__ = ["Inspection", "inspect_text", "render_page"]
