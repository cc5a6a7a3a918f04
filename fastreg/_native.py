"""Loads the compiled extensions, and remembers in words why one is missing."""

import importlib
import json
from pathlib import Path

from . import _ops

_BUILD = Path(__file__).with_name("_build.json")
_OF_PLANS = (
    "recognise", "describe_into", "still_as", "still_with_gradients", "same_values", "fgm_attack", "fgm_restore",
)  # fmt: skip
_FUNCTIONS = {"cpu": _OF_PLANS, "cuda": ()}  # what _plan.py calls


def build_outcome() -> dict[str, str]:
    """What `setup.py` recorded about each extension: "built against …" or "not built: …"."""
    try:
        return json.loads(_BUILD.read_text())
    except FileNotFoundError:
        return {}


def _load(kind: str) -> str | None:
    """Imports `fastreg._C_<kind>`, which registers its operators. Returns the reason if that fails."""
    try:
        extension = importlib.import_module(f"fastreg._C_{kind}")
    except ModuleNotFoundError:
        outcome = build_outcome().get(kind, "not built: no build has been run in this checkout")
        return outcome if outcome.startswith("not built") else "built, but its file is gone: build again"
    except ImportError as error:  # A binary that cannot load must never break `import fastreg`.
        return f"built, but it cannot be loaded: {error}"
    if getattr(extension, "operators", None) != _ops.DIGEST or not all(hasattr(extension, f) for f in _FUNCTIONS[kind]):
        return "built from other sources, whose operators differ from those declared now: build again"
    return None


missing: dict[str, str | None] = {kind: _load(kind) for kind in ("cpu", "cuda")}
"""Per extension: None if it is loaded, else the reason why not."""
