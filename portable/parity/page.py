"""The matrix as one HTML page that needs nothing else: filters, colours, and what is known of each cell."""

import importlib.resources
import json
from typing import Any

from portable.parity import report


def page(found: dict[str, Any]) -> str:
    """Returns the page of a results file."""
    template = (importlib.resources.files("portable.parity") / "data" / "page.html").read_text(encoding="utf-8")
    data = json.dumps(found | {"targets": report.columns(found["results"])}).replace("<", "\\u003c")
    return template.replace("/*DATA*/", data)
