"""Cross-attention merge on networks in which text and picture share one sequence of tokens."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from ..attention_patches.attention_merge import StyleTexts, expand_rows
from ..attention_patches.attention_merge_joint import JointMerge
from ..attention_patches.sequence import watch_blocks
from ..attention_patches.values import SCALED
from .families.joint import find_joint
from .families.together import Layout
from .networks import INJECTED, OVERRIDE, SEQUENCE, family_name, find_network


def can_share(model: Any) -> bool:
    """Whether the texts of several prompts can stand in one call of a BaseModel's network."""
    family = find_joint(model)
    return family is not None and family.together is not None


@contextmanager
def merged_sequence(model: Any, merges: Sequence[tuple[slice, StyleTexts]], rows: int) -> Iterator[None]:
    """Lets the network read the texts of all styles, each as if it stood there alone, for one call of the model.

    The texts come in where the network is called, after all wrappers of other nodes, which see the rows' own.

    Args:
        merges: rows of the call and what they read; rows: of the call.
    """
    texts = SharedTexts(model, merges, rows)
    hook = find_network(model).register_forward_pre_hook(texts.enter, with_kwargs=True)
    try:
        yield
        texts.check()
    finally:
        hook.remove()
        texts.stack.close()


class SharedTexts:
    """See `merged_sequence`."""

    def __init__(self, model: Any, merges: Sequence[tuple[slice, StyleTexts]], rows: int):
        self.model, self.merges = model, merges
        # rows of other conditionings carry the texts too, unread: one pass through the network for all
        self.texts = [expand_rows(text, own, rows) for own, styles in merges for text in styles.texts]
        self.stack, self.thread = ExitStack(), get_ident()
        self.merge: JointMerge | None = None

    def enter(self, network: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the network runs: what it is called with instead.

        Raises:
            ValueError: for a node that changes the batch, or that is to act around this and cannot.
        """
        if get_ident() != self.thread:
            return args, kwargs  # another run of the same network
        self.check()
        self.stack.close()
        family = find_joint(self.model)
        if family is None or family.together is None:
            raise ValueError("Cross-Attention Merge expected the network that its model had, got another one.")
        given = {"x": args[0], **kwargs} if args else kwargs
        context, options = given["context"], given["transformer_options"]
        if len(context) != len(self.texts[0]):
            raise ValueError(
                f"Cross-Attention Merge expected {len(self.texts[0])} rows of text inside the model, got "
                f"{len(context)}; remove the node that changes the model's batch.")
        if options.get(INJECTED):
            raise ValueError(
                f"Cross-Attention Merge expected no Feature Injection on {family_name(self.model)}, got both; use the "
                f"Epsilon Merge Guider beside it.")
        layout = Layout(family.sequence(network, given), [part.shape[1] for part in (context, *self.texts)],
                        family.list_blocks(network), options)
        stages = [(self.stack.enter_context(watch_blocks(stage.blocks)), stage.sequence)
                  for stage in family.together(self.model, layout, self.stack)]
        self.merge = JointMerge(self.merges, stages, layout.alone.grid, side=family.find_side(network),
                                inner=options.get(OVERRIDE), scaled=options.get(SCALED))
        joined = {OVERRIDE: self.merge.attend, SEQUENCE: stages[0][1].as_one(layout.alone)}
        more: dict[str, Any] = {
            "context": torch.cat([context, *self.texts], dim=1), "transformer_options": {**options, **joined}}
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and mask.shape[1] == context.shape[1]:
            more["attention_mask"] = show_more(mask, sum(layout.lengths[1:]))
        return args, {**kwargs, **more}

    def check(self) -> None:
        """Raises ValueError if the network ran without its attention being merged."""
        if self.merge is not None:
            self.merge.check_acted()


def show_more(mask: Tensor, tokens: int) -> Tensor:
    """A mask of text tokens [rows, tokens], of 0 and 1 or added to scores, for a text with more behind it."""
    seen = mask.new_zeros(()) if torch.is_floating_point(mask) else mask.new_ones(())
    return torch.cat([mask, seen.expand(len(mask), tokens)], dim=1)
