"""Train the demo checkpoint from nothing: pictures, autoencoder, text encoder, latents, denoiser.

    python demo/train.py --comfyui PATH --work FOLDER [--stage STAGE] [--steps N]

Every stage is seeded by its step number and resumes from the last file it saved, so an interrupted run
goes on where it stopped and ends in the same weights on the same machine. See demo/MODEL_CARD.md.
"""
from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from multiprocessing import Pool
from pathlib import Path

HERE = Path(__file__).resolve().parent
STAGES = ("pictures", "vae", "text", "latents", "unet", "export")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of a ComfyUI install")
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, latents and checkpoints")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument("--text-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=9000, help="denoiser steps")
    parser.add_argument("--cooldown", type=int, default=2000, help="last denoiser steps, with falling learning rate")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


ARGS = parse_arguments()
sys.path.insert(0, str(ARGS.comfyui))
sys.path.insert(1, str(HERE))
sys.argv = [sys.argv[0]] + (["--cpu"] if ARGS.device == "cpu" else [])

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import world  # noqa: E402
from comfy import ops, sd1_clip  # noqa: E402
from comfy.ldm.modules.attention import optimized_attention_for_device  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

CONFIG = json.loads((HERE / "config.json").read_text(encoding="utf-8"))
DEVICE = torch.device(ARGS.device)
COLOURS, BACKGROUNDS = tuple(world.COLOURS), tuple(world.COLOURS)
ATTRIBUTES = {"shape": world.SHAPES, "colour": COLOURS, "texture": world.TEXTURES, "background": BACKGROUNDS}
OPENINGS = ("", "", "", "a picture of ", "a photo of ", "a drawing of ")


def autocast() -> torch.autocast:
    return torch.autocast(DEVICE.type, torch.bfloat16)


def generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(numbers) & 0x7FFFFFFF)


def initialise(module: torch.nn.Module, seed: int) -> None:
    """The host's layers skip initialisation; draw PyTorch's own, seeded."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            if layer.bias is not None:
                bound = 1 / math.sqrt(layer.weight[0].numel())
                torch.nn.init.uniform_(layer.bias, -bound, bound)
        elif isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, torch.nn.Embedding):
            torch.nn.init.normal_(layer.weight, std=0.02)
    module.train().requires_grad_(True)


class Trainer:
    """One network with Adam, an average of its weights, and files to resume from."""

    def __init__(self, name: str, network: torch.nn.Module, rate: float, decay: float):
        self.path = ARGS.work / f"{name}.safetensors"
        self.network, self.rate, self.decay = network.to(DEVICE), rate, decay
        self.parameters = {key: value for key, value in network.named_parameters() if value.requires_grad}
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
        self.average = {key: value.detach().clone() for key, value in self.parameters.items()}
        self.step, self.started = 0, time.time()
        if self.path.exists():
            self.resume()

    def resume(self) -> None:
        state = load_file(self.path, device=str(DEVICE))
        self.step = int(state["step"])
        for key, parameter in self.parameters.items():
            parameter.data.copy_(state[f"weight.{key}"])
            self.average[key].copy_(state[f"average.{key}"])
            self.optimiser.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": state[f"first.{key}"],
                "exp_avg_sq": state[f"second.{key}"],
            }
        print(f"{self.path.stem}: resumes at step {self.step}", flush=True)

    def save(self) -> None:
        state = {"step": torch.tensor(self.step)}
        for key, parameter in self.parameters.items():
            moments = self.optimiser.state[parameter]
            state[f"weight.{key}"] = parameter.data
            state[f"average.{key}"] = self.average[key]
            state[f"first.{key}"], state[f"second.{key}"] = moments["exp_avg"], moments["exp_avg_sq"]
        part = self.path.with_suffix(".part")
        save_file({key: value.contiguous() for key, value in state.items()}, part)
        part.replace(self.path)

    def update(self, loss: torch.Tensor, factor: float) -> None:
        """One Adam step at `factor` times the rate, with warm-up."""
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * factor * min(1.0, (self.step + 1) / 200)
        self.optimiser.step()
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (20 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)

    def report(self, total: int, **values: float) -> None:
        if self.step % 50 == 0:
            text = " ".join(f"{key} {value:.4f}" for key, value in values.items())
            print(f"{self.path.stem} {self.step}/{total} {text} {time.time() - self.started:.0f}s", flush=True)
        if self.step % 500 == 0 or self.step == total:
            self.save()


# ------------------------------------------------------------------------------------------------ pictures

def random_scene(rng: random.Random) -> world.Scene:
    background = rng.choice(BACKGROUNDS)
    if rng.random() < 0.04:
        return world.Scene(background=background)
    colour = rng.choice([name for name in COLOURS if name != background])
    return world.Scene(rng.choice(world.SHAPES), colour, rng.choice(world.TEXTURES), background)


def scene_of(index: int) -> world.Scene:
    return random_scene(random.Random(f"scene {index}"))


def draw_picture(index: int) -> torch.Tensor:
    torch.set_num_threads(1)
    image, _ = world.draw_scene(scene_of(index), index)
    return (image * 255).round().byte()


def make_pictures() -> None:
    path = ARGS.work / "pictures.safetensors"
    if path.exists():
        return
    with Pool() as pool:
        pictures = [torch.from_numpy(p.numpy().copy()) for p in pool.imap(draw_picture, range(ARGS.pictures), 50)]
    save_file({"pictures": torch.stack(pictures)}, path)
    print(f"pictures: drew {len(pictures)}", flush=True)


# ----------------------------------------------------------------------------------------------------- vae

def train_vae() -> None:
    pictures = load_file(ARGS.work / "pictures.safetensors")["pictures"]
    network = TAESD()
    initialise(network, 1)
    network.vae_scale.data.fill_(0.18215)
    network.vae_shift.data.zero_()
    network.vae_scale.requires_grad_(False)
    network.vae_shift.requires_grad_(False)
    network = network.to(memory_format=torch.channels_last)
    trainer = Trainer("vae", network, 1e-3, 0.998)
    side, batch = 48, 12
    while trainer.step < ARGS.vae_steps:
        g = generator(1, trainer.step)
        rows = torch.randint(len(pictures), (batch,), generator=g)
        corners = torch.randint(0, 128 - side + 1, (batch, 2), generator=g)
        crops = torch.stack([
            pictures[row, y:y + side, x:x + side] for row, (y, x) in zip(rows.tolist(), corners.tolist())
        ])
        x = (crops.permute(0, 3, 1, 2).float() / 255).to(DEVICE).contiguous(memory_format=torch.channels_last)
        with autocast():
            z = network.taesd_encoder(x)
        z = z.float()
        # unit-variance, decorrelated latents suit the noise schedule; the noise makes the decoder forgive
        flat = z.permute(1, 0, 2, 3).flatten(1)
        mean = flat.mean(dim=1, keepdim=True)
        covariance = (flat - mean) @ (flat - mean).T / flat.shape[1]
        spread = (covariance - torch.eye(4, device=DEVICE)).square().mean() + mean.square().mean()
        level = torch.rand(batch, 1, 1, 1, generator=g).to(DEVICE) * 0.25
        noisy = z + level * torch.randn(z.shape, generator=g).to(DEVICE)
        with autocast():
            y = network.taesd_decoder(noisy)
        error = (y.float() - x).abs().mean() + 2 * (y.float() - x).square().mean()
        progress = trainer.step / ARGS.vae_steps
        trainer.update(error + 0.02 * spread, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        trainer.report(ARGS.vae_steps, error=error.item(), spread=spread.item())


def load_vae() -> TAESD:
    state = load_file(ARGS.work / "vae.safetensors")
    network = TAESD()
    network.load_state_dict({k[8:]: v for k, v in state.items() if k.startswith("average.")}, strict=False)
    network.vae_scale.data.fill_(0.18215)
    network.vae_shift.data.zero_()
    return network.to(DEVICE).train(False).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------- text

def known_words() -> list[str]:
    extra = ("left", "right", "top", "bottom", "no", "in", "to", "at", "one", "two", "style", "shape", "small", "big",
             "bad", "blurry", ",", ".")
    return sorted({*world.SHAPES, *world.TEXTURES, *world.COLOURS, *world.FILLERS, *extra})


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
    """Write demo/tokenizer and return the vocabulary's size."""
    folder = HERE / "tokenizer"
    folder.mkdir(exist_ok=True)
    merges = learn_merges(known_words())
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
            tokenizer_path=str(HERE / "tokenizer"), embedding_size=CONFIG["text"]["hidden_size"])
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


def junk_word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 7)))


def caption_of(scene: world.Scene, rng: random.Random, drop: float) -> tuple[str, world.Scene]:
    """A caption that leaves each part out with chance `drop`, and what it still says."""
    said = world.Scene(*(
        None if value is None or rng.random() < drop else value
        for value in (scene.shape, scene.colour, scene.texture, scene.background)))
    texture = "" if said.texture == "plain" and rng.random() < 0.5 else said.texture
    words = [word for word in (texture, said.colour, said.shape) if word]
    parts = ["a " + " ".join(words)] if words else []
    if said.background:
        parts.append(f"a {said.background} background")
    caption = rng.choice(OPENINGS) + rng.choice((" on ", " on ", " with ", ", ")).join(parts)
    if rng.random() < 0.06:
        caption += " " + junk_word(rng)
    return caption, said


def train_text() -> None:
    size = write_tokenizer()
    CONFIG["text"].update(vocab_size=size, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1)
    (HERE / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
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
                    elif name == "texture":
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


# ------------------------------------------------------------------------------------------------- latents

@torch.no_grad()
def make_latents() -> None:
    path = ARGS.work / "latents.safetensors"
    if path.exists():
        return
    pictures = load_file(ARGS.work / "pictures.safetensors")["pictures"]
    vae = load_vae().to(memory_format=torch.channels_last)
    latents = []
    for start in range(0, len(pictures), 50):
        x = (pictures[start:start + 50].permute(0, 3, 1, 2).float() / 255).to(DEVICE)
        with autocast():
            z = vae.taesd_encoder(x.contiguous(memory_format=torch.channels_last))
        latents.append(z.float().cpu().contiguous())
    z = torch.cat(latents)
    print(f"latents: mean {z.mean((0, 2, 3)).tolist()} std {z.std((0, 2, 3)).tolist()}", flush=True)
    save_file({"latents": z}, path)


# ---------------------------------------------------------------------------------------------------- unet

def alphas_cumprod() -> torch.Tensor:
    """The SD1.x schedule: scaled-linear betas, 0.00085 to 0.012 over 1000 steps."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def build_unet() -> UNetModel:
    unet = UNetModel(**CONFIG["unet"], dtype=torch.float32, operations=ops.disable_weight_init)
    initialise(unet, 4)
    # a denoiser learns faster when every residual branch and the output start at zero
    for name, parameter in unet.named_parameters():
        if any(part in name for part in (".out_layers.3.", ".proj_out.", "out.2.")):
            parameter.data.zero_()
    return unet


def train_unet() -> None:
    latents = load_file(ARGS.work / "latents.safetensors")["latents"].to(DEVICE)
    scenes = [scene_of(index) for index in range(len(latents))]
    text = load_text()
    nothing = text.states(text.tokenise([""]))
    alphas = alphas_cumprod().to(DEVICE)
    trainer = Trainer("unet", build_unet(), 5e-4, 0.9985)
    while trainer.step < ARGS.steps:
        g = generator(4, trainer.step)
        rng = random.Random(f"unet {trainer.step}")
        rows = torch.randint(len(latents), (ARGS.batch,), generator=g)
        x0 = latents[rows]
        captions = ["" if rng.random() < 0.1 else caption_of(scenes[row], rng, 0.08)[0] for row in rows.tolist()]
        tokens = text.tokenise(captions)
        with torch.no_grad(), autocast():
            context = text.states(tokens).float()
        # the states after the last word retell the caption; hide them mostly, so that each word counts by itself
        after = (tokens == text.end) & (torch.rand(len(tokens), 1, generator=g) < 0.85).to(DEVICE)
        context = torch.where(after[..., None], nothing, context)
        t = torch.randint(0, 1000, (len(x0),), generator=g).to(DEVICE)
        noise = torch.randn(x0.shape, generator=g).to(DEVICE)
        # the schedule stops short of pure noise: without an offset the background would follow the noise's mean
        noise = noise + 0.2 * torch.randn(*x0.shape[:2], 1, 1, generator=g).to(DEVICE)
        a = alphas[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * noise
        with autocast():
            prediction = trainer.network(x, t, context)
        snr = (a / (1 - a)).flatten()
        weight = snr.clamp(max=5.0) / snr
        loss = ((prediction.float() - noise).square().mean(dim=(1, 2, 3)) * weight).mean()
        factor = min(1.0, (ARGS.steps - trainer.step) / max(ARGS.cooldown, 1))
        trainer.update(loss, max(factor, 0.01))
        trainer.report(ARGS.steps, loss=loss.item())


# -------------------------------------------------------------------------------------------------- export

def export() -> None:
    """Write the fp16 files that the pack ships."""
    average = {key[8:]: value for key, value in load_file(ARGS.work / "unet.safetensors").items()
               if key.startswith("average.")}
    text = load_text().model.transformer.state_dict()
    parts = {
        "shapes": {f"model.diffusion_model.{key}": value for key, value in average.items()},
        "vae": {f"first_stage_model.{key}": value for key, value in load_vae().state_dict().items()},
        "text": {f"cond_stage_model.transformer.{key}": value for key, value in text.items()},
    }
    for name, state in parts.items():
        half = {key: value.half().contiguous().cpu() for key, value in state.items()}
        save_file(half, HERE / f"{name}.safetensors", metadata={"format": CONFIG["format"]})
        print(f"{name}: {sum(value.numel() for value in half.values()) / 1e6:.2f} M parameters", flush=True)


def main() -> None:
    ARGS.work.mkdir(parents=True, exist_ok=True)
    run = {"pictures": make_pictures, "vae": train_vae, "text": train_text, "latents": make_latents,
           "unet": train_unet, "export": export}
    for stage in STAGES if ARGS.stage == "all" else (ARGS.stage,):
        run[stage]()


if __name__ == "__main__":
    main()
