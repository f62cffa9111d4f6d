"""The text encoder of the demo checkpoint: its tokenizer, its captions and its training."""
from __future__ import annotations

import json
import math
import random

import torch
import torch.nn.functional as F
from comfy import ops, sd1_clip
from comfy.ldm.modules.attention import optimized_attention_for_device
from safetensors.torch import load_file
from train_base import ARGS, ATTRIBUTES, CONFIG, DEVICE, FILES, WORLD, Trainer, caption_of, initialise, random_scene


def byte_alphabet() -> list[str]:
    """CLIP's printable stand-ins for the 256 byte values."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte pair encoding, merged until every word is one token."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while any(len(pieces) > 1 for pieces in spelled):
        counts: dict[tuple[str, str], int] = {}
        for pieces in spelled:
            for pair in zip(pieces, pieces[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(sorted(counts), key=lambda pair: counts[pair])
        merges.append(best)
        for row, pieces in enumerate(spelled):
            joined: list[str] = []
            for piece in pieces:
                if joined and (joined[-1], piece) == best:
                    joined[-1] += piece
                else:
                    joined.append(piece)
            spelled[row] = joined
    return merges


def write_tokenizer() -> int:
    """Write the tokenizer folder and return the vocabulary's size."""
    folder = FILES / "tokenizer"
    folder.mkdir(exist_ok=True)
    merges = learn_merges(WORLD.known_words())
    alphabet = byte_alphabet()
    tokens = alphabet + [letter + "</w>" for letter in alphabet]
    tokens += [first + second for first, second in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=True) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(special, indent=1) + "\n", encoding="utf-8")
    return len(vocabulary)


class Text:
    """The host's tokenizer and CLIP text model at demo size."""

    def __init__(self) -> None:
        end = CONFIG["text"]["eos_token_id"]
        special = {"start": CONFIG["text"]["bos_token_id"], "end": end, "pad": end}
        self.tokenizer = sd1_clip.SDTokenizer(
            tokenizer_path=str(FILES / "tokenizer"), embedding_size=CONFIG["text"]["hidden_size"])
        self.model = sd1_clip.SDClipModel(
            device=DEVICE, freeze=False, textmodel_json_config=dict(CONFIG["text"]), dtype=torch.float32,
            special_tokens=special, return_projected_pooled=False)
        # the host's text model has CLIP's 49408 words whatever its config says
        self.model.transformer.set_input_embeddings(
            ops.manual_cast.Embedding(CONFIG["text"]["vocab_size"], CONFIG["text"]["hidden_size"], device=DEVICE))
        self.end = end

    def tokenise(self, captions: list[str]) -> torch.Tensor:
        rows = [[token for token, _ in self.tokenizer.tokenize_with_weights(caption)[0]] for caption in captions]
        return torch.tensor(rows, device=DEVICE)

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Last hidden states after the final norm, [B, 77, C]; the host's forward adds in place, without gradient."""
        network = self.model.transformer.text_model
        x = network.embeddings(tokens, dtype=torch.float32)
        mask = torch.full((x.shape[1], x.shape[1]), -torch.finfo(x.dtype).max, device=x.device).triu_(1)
        attention = optimized_attention_for_device(x.device, mask=True, small_input=True)
        for layer in network.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), mask.to(x.dtype), attention)
            x = x + layer.mlp(layer.layer_norm2(x))
        return network.final_layer_norm(x)


def identity_projection(text: Text) -> None:
    """No projection is trained here: pictures and words share no space yet."""
    weight = text.model.transformer.text_projection.weight
    weight.data.copy_(torch.eye(len(weight)))
    weight.requires_grad_(False)


def train_text() -> None:
    size = write_tokenizer()
    CONFIG["text"].update(vocab_size=size, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1)
    (FILES / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    text = Text()
    initialise(text.model, 2)
    identity_projection(text)
    width = CONFIG["text"]["hidden_size"]
    torch.manual_seed(3)
    spans = {name: len(values) + 1 for name, values in ATTRIBUTES.items()}
    word_head = torch.nn.Linear(width, sum(len(values) for values in ATTRIBUTES.values()) + 1)
    end_head = torch.nn.Linear(width, sum(spans.values()))
    network = torch.nn.ModuleDict({"text": text.model.transformer, "word": word_head, "end": end_head})
    trainer = Trainer("text", network, 1e-3, 0.995)
    ids = {word: text.tokenise([word])[0, 1].item() for values in ATTRIBUTES.values() for word in values}
    while trainer.step < ARGS.text_steps:
        rng = random.Random(f"text {trainer.step}")
        captions, saids = zip(*(caption_of(random_scene(rng), rng, rng.choice((0.0, 0.3))) for _ in range(64)))
        tokens = text.tokenise(list(captions))
        states = text.states(tokens)
        # every word's state says its own value and role; the end state says the whole caption
        roles = torch.zeros(tokens.shape, dtype=torch.long, device=DEVICE)
        ends = torch.zeros(len(saids), len(ATTRIBUTES), dtype=torch.long, device=DEVICE)
        for row, said in enumerate(saids):
            offset = 1
            for column, (name, values) in enumerate(ATTRIBUTES.items()):
                value = getattr(said, name)
                if value is not None:
                    places = (tokens[row] == ids[value]).nonzero().flatten()
                    if len(places):
                        place = places[-1] if name == "background" else places[0]
                        roles[row, place] = offset + values.index(value)
                        ends[row, column] = 1 + values.index(value)
                    elif name in WORLD.SILENT:
                        ends[row, column] = 0
                offset += len(values)
        real = torch.arange(77, device=DEVICE) <= (tokens == text.end).float().argmax(dim=1, keepdim=True)
        loss = F.cross_entropy(word_head(states[real]), roles[real])
        last = states[torch.arange(len(tokens)), (tokens == text.end).float().argmax(dim=1)]
        for column, logits in enumerate(end_head(last).split(list(spans.values()), dim=1)):
            loss = loss + 0.5 * F.cross_entropy(logits, ends[:, column])
        trainer.update(loss, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * trainer.step / ARGS.text_steps)))
        trainer.report(ARGS.text_steps, loss=loss.item())


def load_text() -> Text:
    state = load_file(ARGS.work / "text.safetensors")
    text = Text()
    prefix = "average.text."
    weights = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
    text.model.transformer.load_state_dict(weights, strict=False)
    identity_projection(text)
    text.model.train(False).requires_grad_(False)
    return text
