"""A few words on the node that runs, where the host shows those of its own Get Image Size."""
from __future__ import annotations

from comfy_execution.utils import get_executing_context


def show_text(text: str) -> None:
    """Shows a text on the node that runs now in the interface; without a server, none."""
    from server import PromptServer  # by then the host has loaded it

    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and server is not None:
        server.send_progress_text(text, context.node_id)
