"""Finds the rows of a model call that belong to a marked conditioning.

The host batches, splits and reorders conditionings as it likes, so a row is known by the host's own ids only: the index
in the guider's list of conditionings and the id that a guider gives each of them (`cond_or_uncond` and `uuids`).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.patcher_extension import WrappersMP

Row = tuple[int, Any]  # index in the guider's list, id
INDEX = "mixology_index"  # the list index of every chunk, where a guider of ours shows patches of others another one


def read_marks(model: Any, key: str, hand_out: Callable[..., Any], apply: Callable[..., Any]) -> Any:
    """A clone of the model whose calls heed the marks of conditionings; one that does so already stays as it is.

    Args:
        hand_out: around `calc_cond_batch`, where conditionings are seen, to note what rows they will be.
        apply: around one call of the model, where rows are, to patch attention for this call.
    """
    clone = model.clone()
    for kind, wrapper in ((WrappersMP.CALC_COND_BATCH, hand_out), (WrappersMP.APPLY_MODEL, apply)):
        clone.remove_wrappers_with_key(kind, key)
        clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


def mark_conditioning(conditioning: list[Any], key: str, mark: Any) -> list[Any]:
    """A copy of a CONDITIONING whose entries carry `mark`."""
    return [[text, {**options, key: mark}] for text, options in conditioning]


def find_marks(conds: list[list[dict[str, Any]] | None], key: str) -> dict[Row, tuple[Any, int]]:
    """Marks and text lengths of the conditionings in a `calc_cond_batch` call, by row.

    A region hands a copy of itself, marks and id included, to the other lists, where it reads the text of one of their
    conditionings; and Conditioning Zero Out keeps marks. A row counts if it reads the text that was marked in its list.
    """
    found = {}
    for index, group in enumerate(conds):
        owners = {}
        for cond in group or []:
            text, read = cond.get("cross_attn"), cond["model_conds"].get("c_crossattn")
            if key in cond and text is not None and read is not None and read.cond is text and bool(text.any()):
                owners[id(read)] = cond
        for cond in group or []:
            owner = owners.get(id(cond["model_conds"].get("c_crossattn")))
            if owner is not None:
                found[index, cond["uuid"]] = owner[key], owner["cross_attn"].shape[1]
    return found


def hand_rows(model_options: dict[str, Any], key: str, table: dict[Row, Any]) -> dict[str, Any]:
    """Options whose model calls find `table` under `key`; the caller's own if there is nothing to find."""
    if not table:
        return model_options
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), key: table}}


def chunk_rows(transformer_options: dict[str, Any]) -> list[Row]:
    """The row of every chunk of the call that runs, in the order of the batch."""
    indices = transformer_options.get(INDEX, transformer_options["cond_or_uncond"])
    return list(zip(indices, transformer_options["uuids"]))
