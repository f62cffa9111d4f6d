"""Finds the rows of a model call that belong to a marked conditioning.

The host batches, splits and reorders conditionings as it likes, so a row is known by the host's own ids only: the index
in the guider's list of conditionings and the id that a guider gives each of them (`cond_or_uncond` and `uuids`).
"""
from __future__ import annotations

from typing import Any

Row = tuple[int, Any]  # index in the guider's list, id


def mark_conditioning(conditioning: list[Any], key: str, mark: Any) -> list[Any]:
    """A copy of a CONDITIONING whose entries carry `mark`."""
    return [[text, {**options, key: mark}] for text, options in conditioning]


def find_marks(conds: list[list[dict[str, Any]] | None], key: str) -> dict[Row, tuple[Any, int]]:
    """Marks and text lengths of the conditionings in a `calc_cond_batch` call, by row.

    A region hands a copy of itself, marks and id included, to the other lists, with their text in the model's input;
    and Conditioning Zero Out keeps marks. Neither holds the marked text, so neither counts.
    """
    found = {}
    for index, group in enumerate(conds):
        for cond in group or []:
            if key in cond:
                text = cond.get("cross_attn")
                read = cond["model_conds"].get("c_crossattn")
                if text is not None and read is not None and read.cond is text and bool(text.any()):
                    found[index, cond["uuid"]] = cond[key], text.shape[1]
    return found


def chunk_rows(transformer_options: dict[str, Any]) -> list[Row]:
    """The row of every chunk of the call that runs, in the order of the batch."""
    return list(zip(transformer_options["cond_or_uncond"], transformer_options["uuids"]))
