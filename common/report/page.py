"""The page: one HTML file of the data as JSON, a style sheet, a script, and the Vega-Lite library that draws charts."""

import json
import math
import pathlib
import string
from typing import Any

from common.errors import UserError

ASSETS = pathlib.Path(__file__).parent / "assets"


def plotting_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script (0.9 MB).

    Raises:
      UserError: vl-convert-python is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise UserError("report: needs Vega-Lite to draw; pip install vl-convert-python") from error
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def render(data: dict[str, Any], library: str) -> str:
    """The HTML text; `data` is what assets/report.js shows."""
    template = string.Template((ASSETS / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        style=(ASSETS / "report.css").read_text(encoding="utf-8"),
        data=as_script(data),
        library=library.replace("</script", "<\\/script"),
        script=(ASSETS / "report.js").read_text(encoding="utf-8"),
    )


def as_script(data: Any) -> str:
    """JSON that may stand in a <script> element: ASCII without `<`; a number that is not finite becomes null."""
    return json.dumps(_finite(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
