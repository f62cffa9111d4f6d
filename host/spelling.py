"""The letters that tokens stand for, as each kind of tokenizer writes them, and the prompt among them."""
from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from comfy import sd1_clip

UNKNOWN = "\ufffd"  # stands for letters that a tokenizer does not know
# Byte-level tokenizers write a byte as a letter: a visible one as itself, the others from 256 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
SPACE = "\u0120"
BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(256 + index): byte for index, byte in enumerate(HIDDEN)}
SPACE_MARK = "\u2581"  # of SentencePiece
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # of SentencePiece, for letters that it has no piece for
CHAT, TURN, TURN_END = "<|im_start|>", "<|im_start|>user", "<|im_end|>"  # of a prompt that brings its own template
QUOTED = re.compile(r'Text "(.*?)"\. ')  # how the host tells its glyph encoder what is in quotes

Spelled = list[tuple[str, frozenset[int]]]  # characters, and the tokens they come from


# --------------------------------------------------------------------------------------------------- tokens

def spell_prompt(tokenizer: Any, chunks: list[Any], embeddings: list[str]) -> Spelled:
    """A text in the tokenizer's own spelling, every character with the positions of its tokens.

    Start, end and padding tokens spell nothing, so that a word cut by the end of a chunk is joined again.

    Args:
        chunks: what the tokenizer returns with word ids: [[(token, weight, word id), ...], ...]; a token without one
            belongs to the text.
        embeddings: names of the embeddings in it, in order.
    """
    groups: dict[int, list[tuple[Any, int]]] = {}
    for token, word, place in list_tokens(tokenizer, chunks):
        if word:
            groups.setdefault(word, []).append((token, place))
    loaded = [word for word, group in groups.items() if torch.is_tensor(group[0][0])]
    names = dict(zip(loaded, embeddings if len(loaded) == len(embeddings) else [""] * len(loaded)))
    spelled: Spelled = []
    for word, group in groups.items():
        if word in names:
            owners = frozenset(place for _, place in group)
            spelled += [(letter, owners) for letter in f" embedding:{names[word]} "]
        else:
            spelled += spell_tokens(tokenizer, group)
    return spelled


def has_embedding(tokenizer: Any, name: str) -> bool:
    """Whether a mention of an embedding leaves tokens of it in the conditioning."""
    chunks = tokenizer.tokenize_with_weights(f"embedding:{name}", return_word_ids=True)
    return any(torch.is_tensor(token) for token, _, _ in list_tokens(tokenizer, chunks))


def list_tokens(tokenizer: Any, chunks: list[Any]) -> Iterator[tuple[Any, int, int]]:
    """Tokens, their word ids (0 for start, end and padding) and their positions in the encoder's output.

    The encoder leaves out embeddings of another width, and the rest of the chunk moves up.
    """
    first = 0
    for chunk in chunks:
        place = first
        for token, _, *word in chunk:
            if not torch.is_tensor(token) or token.shape[-1] == tokenizer.embedding_size:
                yield token, word[0] if word else 1, place
                place += 1
        first += len(chunk)


def spell_tokens(tokenizer: Any, group: list[tuple[int, int]]) -> Spelled:
    """Letters of a run of tokens. A letter of several tokens belongs to all of them.

    Raises:
        ValueError: for a tokenizer whose spelling is not known.
    """
    vocabulary = tokenizer.inv_vocab.values()
    pieces = [(tokenizer.inv_vocab[token], place) for token, place in group]
    if SPACE_MARK in vocabulary:  # SentencePiece: letters, with a mark for the space
        return spell_pieces(pieces)
    if "a</w>" in vocabulary:  # CLIP: byte-level, with a mark at the end of a word
        return spell_bytes((BYTES[letter], place) for piece, place in pieces
                           for letter in piece.replace("</w>", SPACE))
    if f"{SPACE}a" in vocabulary:  # GPT-2's kind: byte-level, with spaces
        return spell_bytes((BYTES[letter], place) for piece, place in pieces for letter in piece)
    if "\x00" in vocabulary and "\xff" in vocabulary:  # ByT5: a token for a byte
        return spell_bytes((ord(piece), place) for piece, place in pieces)
    raise ValueError(
        f"Token Attention Scale expected a CLIP, T5, Gemma, Llama, Mistral or Qwen tokenizer, got "
        f"{type(tokenizer).__name__}; use the text encoder that belongs to the model.")


def spell_pieces(pieces: Sequence[tuple[str, int]]) -> Spelled:
    """Letters of SentencePiece's pieces; runs of bytes make letters together."""
    spelled: Spelled = []
    held: list[tuple[int, int]] = []
    for piece, place in pieces:
        byte = BYTE_PIECE.fullmatch(piece)
        if byte:
            held.append((int(byte.group(1), 16), place))
            continue
        spelled += spell_bytes(held)
        held = []
        spelled += [(" " if letter == SPACE_MARK else letter, frozenset([place]))
                    for letter in piece.replace("<unk>", UNKNOWN)]
    return spelled + spell_bytes(held)


def spell_bytes(given: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> Spelled:
    """Letters of bytes and their places: a letter of several bytes may lie in several tokens.

    Bytes that make none spell UNKNOWN, and nothing of the letters behind them is theirs.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    spelled: Spelled = []
    owners = frozenset[int]()
    for byte, place in given:
        decoded = decoder.decode(byte.to_bytes(1, "big"))
        broken = decoded and owners and (len(decoded) > 1 or decoder.getstate()[0])
        if broken:
            spelled.append((UNKNOWN, owners))
            decoded, owners = decoded[1:], frozenset()
        owners |= {place}
        spelled += [(character, owners) for character in decoded]
        owners = frozenset() if decoded else owners
    return spelled + [(character, owners) for character in decoder.decode(b"", final=True)]


# --------------------------------------------------------------------------------------------------- the prompt

def cut_template(spelled: Spelled, front: str, end: str) -> Spelled | None:
    """The prompt alone, of a text that was spelled with what its tokenizer puts around it; None if that is not there.

    Spaces do not count: the host loses some behind an embedding, and a tokenizer may write none.
    """
    places = [place for place, (letter, _) in enumerate(spelled) if not letter.isspace()]
    text = "".join(spelled[place][0] for place in places)
    front, end = ("".join(part.split()) for part in (front, end))
    if len(text) < len(front) + len(end) or not text.startswith(front) or not text.endswith(end):
        return None
    first = places[len(front) - 1] + 1 if front else 0
    last = places[len(text) - len(end)] if end else len(spelled)
    return spelled[first:last]


def cut_chat(spelled: Spelled) -> Spelled | None:
    """The user's turn of a prompt that brings its own chat template; None for one that does not."""
    text = "".join(letter for letter, _ in spelled)
    if not text.startswith(CHAT) or TURN not in text:
        return None
    first = text.index(TURN) + len(TURN)
    last = text.find(TURN_END, first)
    return spelled[first:] if last < 0 else spelled[first:last]


def loses_first_turn(spelled: Spelled) -> bool:
    """Whether the user's turn comes first and another behind it, where encoders cut off what stands before that."""
    text = "".join(letter for letter, _ in spelled)
    return text.startswith(TURN) and CHAT in text[len(TURN):]


def cut_before(spelled: Spelled, marker: str) -> Spelled:
    """What stands behind a marker; all of it where there is none."""
    _, found, behind = "".join(letter for letter, _ in spelled).partition(marker)
    return spelled[len(spelled) - len(behind):] if found else spelled


def cut_quotes(spelled: Spelled) -> Spelled:
    """What the host's glyph encoder reads of a prompt: the texts in quotes."""
    text = "".join(letter for letter, _ in spelled)
    return [letter for match in QUOTED.finditer(text)
            for letter in [*spelled[slice(*match.span(1))], (" ", frozenset[int]())]]


def restore_spaces(spelled: Spelled, text: str) -> Spelled:
    """The prompt with the spaces of its text, for a tokenizer that writes none (Llama's, in some releases)."""
    if any(letter.isspace() for letter, _ in spelled):
        return spelled
    weighted = sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0)
    plain = sd1_clip.unescape_important("".join(segment for segment, _ in weighted))
    result: Spelled = []
    place = 0
    for letter, owners in spelled:
        found = plain.find(letter, place)
        if found >= 0:
            skipped, place = plain[place:found], found + 1
            result += [(" ", frozenset[int]())] if any(map(str.isspace, skipped)) else []
        result.append((letter, owners))
    return result
