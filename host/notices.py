"""What a person should know of a run that is no error: shown on a node, and in the log."""
from __future__ import annotations

import logging
import sys
from typing import Any

from comfy_execution.utils import get_executing_context

SIGN = "\u26a0 Mixology: "  # how web/notices.js knows them


def find_server() -> Any:
    """The host's server; None where nodes run without one."""
    module = sys.modules.get("server")  # where the host has none, importing it may fail
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def show_text(text: str, node: str | None = None) -> None:
    """Shows a few words on a node in the interface; where no server or no node runs, none.

    Args:
        node: its id in the prompt that runs; by default the node that runs now, whosever it is.
    """
    context = get_executing_context()
    place = node or (context and context.node_id)
    server = find_server() if place else None
    if server is not None:
        server.send_progress_text(text, place)


def show_notice(text: str, node: str | None = None) -> None:
    """Logs a sentence, and shows it on a node as `show_text` does."""
    logging.warning(text)
    show_text(SIGN + text, node)
