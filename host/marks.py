"""Marks on conditionings, and the rows of a model call that read a marked text.

A mark rides among what the host hands its model (`model_conds`), so that it goes wherever the text goes: the host
copies both to the regions that read it, and whoever exchanges the text's tensor leaves the mark. A patched model takes
the marks out before the host looks at them. The host batches, splits and reorders conditionings as it likes, so a row
is known by the host's own ids: the index in the guider's list of conditionings and the id that a guider gives each of
them (`cond_or_uncond` and `uuids`).
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy.conds import CONDRegular
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..attention_patches.rows import check_rows, make_region_watch
from .graph import is_unread
from .networks import run_uncompiled
from .notices import show_notice
from .protocols import Patcher

Row = tuple[int, Any]  # index in the guider's list, id
Conds = list[dict[str, Any]]  # one entry of that list, made ready for sampling
TEXT = "c_crossattn"  # the host's key for the text that a model reads
TEXTS, READ = ENDINGS = "_texts", "_read"  # of a node's key in a run's options: what was marked, what was read


class ShownIndices(list[int]):
    """`cond_or_uncond` as a guider of ours shows it to patches of others; `true` is the guider's own."""

    def __init__(self, shown: Iterable[int], true: Sequence[int]):
        super().__init__(shown)
        self.true = true


class Mark(CONDRegular):
    """What a conditioning carries for one of our nodes, under the node's own key.

    Args:
        cond: the node's own object, whose `node` is the node's name.
        made: what was computed for the run that reads the mark; None before a run.
    """

    def __init__(self, cond: Any, made: dict[Any, Any] | None = None):
        super().__init__(cond)
        self.made = made

    def process_cond(self, batch_size: int, **kwargs: Any) -> Any:
        """The host comes here only where no wrapper of ours took the mark out."""
        node = self.cond.node
        raise ValueError(
            f"{node} expected its prompt to be sampled with its MODEL output, got a model that does not read it; "
            f"connect the MODEL output of {node} to the sampler or guider.")


class MarkedConds(dict[str, Any]):
    """The `model_conds` of a marked conditioning, which the host copies and fills when a run begins.

    With the text each mark becomes the run's own, one for each conditioning; none is left where the text was zeroed
    out, which keeps all else of a conditioning, unless it is about other texts as well.
    """

    def copy(self) -> MarkedConds:
        return MarkedConds(self)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key == TEXT:
            fresh = {name: mark for name, mark in self.items() if isinstance(mark, Mark) and mark.made is None}
            shown = bool(fresh) and bool(value.cond.any())
            for name, mark in fresh.items():
                if shown or getattr(mark.cond, "others", None):  # a second text may say it all
                    super().__setitem__(name, Mark(mark.cond, {}))
                else:
                    del self[name]


@dataclass(frozen=True)
class Found:
    """A mark in the list of a `calc_cond_batch` call.

    Attributes:
        own: tokens of the conditioning's text, other text that was appended included; read: those that the model reads.
    """

    row: Row
    mark: Any
    made: dict[Any, Any]
    cond: dict[str, Any]
    own: int
    read: int


@dataclass
class Call:
    """What the model calls inside a `calc_cond_batch` call find: what each row has, and what came up so far."""

    found: Sequence[Found]
    rows: dict[Row, Any]
    images: int
    calls: int = 0
    seen: set[Row] = field(default_factory=set)

    def check(self, timestep: Tensor) -> None:
        """Raises ValueError for a mark whose text the model was to read and never did, though it was called."""
        for one in self.found if self.calls else ():
            if one.row not in self.seen and is_due(one.cond, timestep):
                raise ValueError(
                    f"{one.mark.node} expected the model to read its prompt at this step, got calls without it; remove "
                    f"the node that regroups or replaces prompts while sampling.")


def heed_marks(model: Patcher, key: str, run: Callable[..., Any], assign: Callable[..., Any],
               apply: Callable[..., Any]) -> Any:
    """A clone of the model whose calls heed the marks of conditionings; one that does so already stays as it is.

    Args:
        run: around a run, to report marks that nothing read.
        assign: around `calc_cond_batch`, where conditionings are seen, to note what rows they will be.
        apply: around one call of the model, where rows are, to patch attention for this call.
    """
    clone = model.clone()
    kinds = (WrappersMP.OUTER_SAMPLE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL)
    for kind, wrapper in zip(kinds, (run, assign, apply)):
        clone.remove_wrappers_with_key(kind, key)
        clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


def mark_conditioning(conditioning: list[Any], key: str, mark: Any) -> list[Any]:
    """A copy of a CONDITIONING whose entries carry `mark`."""
    return [[text, {**options, "model_conds": MarkedConds({**options.get("model_conds", {}), key: Mark(mark)})}]
            for text, options in conditioning]


def read_mark(options: dict[str, Any], key: str) -> Any:
    """The mark of an entry of a CONDITIONING, or None."""
    mark = options.get("model_conds", {}).get(key)
    return None if mark is None else mark.cond


def is_marked(options: dict[str, Any]) -> bool:
    """Whether an entry of a CONDITIONING carries a mark of any of our nodes."""
    return any(isinstance(value, Mark) for value in options.get("model_conds", {}).values())


def list_rows(conds: Sequence[Conds | None]) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Every conditioning of a `calc_cond_batch` call, with the row that it will be."""
    return (((index, cond["uuid"]), cond) for index, group in enumerate(conds) for cond in group or ())


def take_marks(conds: list[Conds | None], key: str) -> tuple[list[Any], list[Found]]:
    """The conditionings of a `calc_cond_batch` call without their marks, and the marks.

    The caller's own lists are left as they are, and handed on where there is nothing to take.
    """
    marked = [(row, cond) for row, cond in list_rows(conds) if key in cond["model_conds"]]
    if not marked:
        return conds, []
    found: list[Found] = []
    owners: dict[Any, dict[str, Any]] = {}  # a region that reads another's text comes after it, with the same mark
    for row, cond in marked:
        mark, text = cond["model_conds"][key], cond["model_conds"].get(TEXT)
        owner = owners.setdefault((row[0], id(mark)), cond)
        if was_zeroed(mark, owner):
            continue
        read = 0 if text is None else text.cond.shape[1]
        own = owner["cross_attn"].shape[1] if "cross_attn" in owner else read
        found.append(Found(
            row=row, mark=mark.cond, made={} if mark.made is None else mark.made, cond=cond, own=own, read=read))
    return [None if group is None else [without_mark(cond, key) for cond in group] for group in conds], found


def was_zeroed(mark: Mark, owner: dict[str, Any]) -> bool:
    """Whether a text was zeroed out before the model made another of it (Anima); looked at once a run."""
    if "cross_attn" not in owner or mark.made is None or getattr(mark.cond, "others", None):
        return False
    if "zeroed" not in mark.made:
        mark.made["zeroed"] = not bool(owner["cross_attn"].any())
    return mark.made["zeroed"]


def without_mark(cond: dict[str, Any], key: str) -> dict[str, Any]:
    """A conditioning as a model without our patch reads it; one without a mark as it is."""
    given = cond["model_conds"]
    if key not in given:
        return cond
    return {**cond, "model_conds": {name: value for name, value in given.items() if name != key}}


def is_due(cond: dict[str, Any], timestep: Tensor) -> bool:
    """Whether the host runs a conditioning at sigma `timestep` [B] whatever the others paint."""
    started = "timestep_start" not in cond or not bool(timestep[0] > cond["timestep_start"])
    ended = "timestep_end" in cond and bool(timestep[0] < cond["timestep_end"])
    return "default" not in cond and started and not ended


def call_with(executor: Callable[..., Any], model: Any, conds: list[Any], x: Tensor, *, timestep: Tensor,
              model_options: dict[str, Any], key: str, call: Call) -> Any:
    """Calls on with options whose model calls find `call` under `key`, and checks that each mark's row came up.

    Compiled networks run as they were written meanwhile. That is asked for here, in the thread that samples.
    """
    options = model_options.get("transformer_options", {})
    below = {**model_options, "transformer_options": {**options, key: call}}
    with run_uncompiled(model, options, call.found[0].mark.node):
        result = call_below(executor, model, conds, x, timestep=timestep, below=below, options=options)
    call.check(timestep)
    return result


def call_below(executor: Callable[..., Any], model: Any, conds: list[Any], x: Tensor, timestep: Tensor,
               below: dict[str, Any], options: dict[str, Any]) -> Any:
    """Calls on with options of its own; what other nodes note in them is handed back to the run's."""
    given = below["transformer_options"]
    before = dict(given)
    result = executor(model, conds, x, timestep, below)
    options.update({key: value for key, value in given.items() if value is not before.get(key)})
    return result


def chunk_rows(transformer_options: dict[str, Any]) -> list[Row]:
    """The row of every chunk of the call that runs, in the order of the batch; none where nothing tells."""
    indices = transformer_options.get("cond_or_uncond", ())
    return list(zip(getattr(indices, "true", indices), transformer_options.get("uuids", ())))


def find_rows(transformer_options: dict[str, Any], key: str, rows: int, node: str) -> list[Any]:
    """What every chunk of a model call has, None for a chunk without; empty where the call has nothing.

    Args:
        rows: batch size of the call.

    Raises:
        ValueError: if the rows are not as the host lays them out.
    """
    call: Call | None = transformer_options.get(key)
    if call is None:
        return []
    chunks = chunk_rows(transformer_options)
    call.calls += 1
    call.seen.update(chunks)
    found = [call.rows.get(row) for row in chunks]
    if all(one is None for one in found):
        return []
    check_rows(rows, len(chunks), call.images, node)
    return found


def leave_out(transformer_options: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The options without what is ours in them: a network that is compiled beside a key asks for it ever after."""
    ours = {f"{key}{ending}" for key in keys for ending in ("", *ENDINGS)}
    return {name: value for name, value in transformer_options.items() if name not in ours}


# --------------------------------------------------------------------------------------------------- unread marks

def report_unread(proceed: Callable[[], Any], guider: Any, key: str, node: str) -> Any:
    """Around a run of a patched model: says so where none of its prompts carried a mark, though some were made.

    What reads marks notes it in the run's options (`note_read`): a sampler may bring prompts of its own.

    Args:
        proceed: runs it; guider: the run's own.
    """
    conds, options = getattr(guider, "conds", {}), guider.model_options["transformer_options"]
    read: set[str] = set()  # the host copies lists and dicts for a run, and shares this
    options[f"{key}{READ}"] = read
    marked = any(key in cond.get("model_conds", ()) for group in conds.values() for cond in group or ())
    result = proceed()
    if options.get(f"{key}{TEXTS}") and not (marked or key in read or getattr(guider, "shares_model", False)):
        show_notice(
            f"{node} did nothing in this run: the model is its MODEL output, but no prompt is its CONDITIONING output; "
            f"connect that to the sampler or guider (Conditioning Concat and Average keep it as conditioning_to only), "
            f"or take the model from before {node}.")
    return result


def warn_of_unwired(node: str) -> None:
    """Shows a notice on the node that runs where its MODEL output is connected to nothing."""
    if is_unread(output=0):
        show_notice(
            f"The MODEL output of {node} is connected to nothing, so that its prompt cannot act; connect it to the "
            f"sampler or guider that reads the prompt.")


def note_read(model_options: dict[str, Any], key: str) -> None:
    """Notes in a run's options that a mark was read."""
    model_options.get("transformer_options", {}).get(f"{key}{READ}", set()).add(key)


# --------------------------------------------------------------------------------------------------- batches

def find_images(x: Tensor, model_options: dict[str, Any]) -> tuple[int, list[int]]:
    """Images of the whole batch, and which of them `x` holds: the host may show the model a window of them."""
    return find_shown(x, model_options, 0) if len(x) > 1 else (1, [0])


def find_shown(x: Tensor, model_options: dict[str, Any], dim: int) -> tuple[int, list[int]]:
    """As `find_images`, of what an axis of the latent counts: images, or a video's frames."""
    window = model_options.get("transformer_options", {}).get("context_window")
    if window is None or getattr(window, "dim", None) != dim:
        return x.shape[dim], list(range(x.shape[dim]))
    before = getattr(window, "causal_anchor_index", None)
    shown = [*([] if before is None or before < 0 else [before]), *window.index_list]
    for kept in getattr(model_options.get("context_handler"), "latent_retain_index_list", ()):
        shown[kept] = kept
    return window.total_frames, shown


# --------------------------------------------------------------------------------------------------- regions

def keep_text(model: Patcher, key: str, mark: Any, text: Tensor) -> None:
    """Lets a patched model know the text of a mark, to tell where it is read without its mark."""
    options = model.model_options["transformer_options"]
    options[f"{key}{TEXTS}"] = [*options.get(f"{key}{TEXTS}", ()), (mark, text)]


def watch_regions(options: dict[str, Any], key: str, rows: int, node: str) -> dict[str, Any]:
    """`transformer_options` that refuse a node which reads a marked text as a region of its own, without the mark."""
    patches = options.get("patches", {})
    call: Call | None = options.get(key)
    marked = {id(one.mark) for one in call.found} if call else set()
    texts = [text for mark, text in options.get(f"{key}{TEXTS}", ()) if id(mark) not in marked]
    if not texts or not patches.get("attn2_patch"):
        return options
    listed = [*patches["attn2_patch"], make_region_watch(texts, rows, node)]
    return {**options, "patches": {**patches, "attn2_patch": listed}}
