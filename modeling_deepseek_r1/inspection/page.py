"""The page: one HTML file with everything in it, which loads nothing from anywhere."""

import html
import json
from importlib.resources import files

from .collect import Inspection

_ESCAPED = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Characters that could end the element that holds the data, whatever the text has in it."""


def render_page(inspection: Inspection) -> str:
    """The HTML of the page. The data are JSON in an element of their own, and reach the page as text only."""
    data = json.dumps(inspection.to_dict(), separators=(",", ":"), allow_nan=False).translate(_ESCAPED)
    folder = files(__package__)
    page = (folder / "page.html").read_text(encoding="utf-8")
    parts = {"title": html.escape(inspection.checkpoint or "model")}
    parts |= {"style": (folder / "page.css").read_text(encoding="utf-8"), "data": data}
    parts["script"] = (folder / "page.js").read_text(encoding="utf-8")
    before, *rest = page.split("{{")
    pieces = [before]
    for piece in rest:
        name, _, after = piece.partition("}}")
        pieces += [parts[name], after]
    return "".join(pieces)
