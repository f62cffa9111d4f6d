"""What several templates have in common."""
from __future__ import annotations

from graph import Graph, Link

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
Place = tuple[int, int]


def add_picture(graph: Graph, title: str, at: Place, checkpoint: int, encode_at: Place) -> int:
    """A picture of the user's, fitted to SD1.x and encoded: the encoder's node."""
    x, y = at
    picture = graph.add("LoadImage", title, at, (320, 320), image="example.png")
    fit = graph.add("ImageScaleToTotalPixels", "Fit size", (x, y + 370), (320, 110), image=(picture, 0),
                    upscale_method="area", megapixels=0.25, resolution_steps=8)
    return graph.add("VAEEncode", "VAE Encode", encode_at, (220, 50), pixels=(fit, 0), vae=(checkpoint, 2))


def add_sampling(graph: Graph, at: tuple[int, int], checkpoint: int, guider: int, latent: Link, prefix: str,
                 sampler: int | None = None, steps: int = 30, denoise: float = 1.0) -> int:
    """From a guider to the saved picture; ddim unless a sampler is given. Returns the sampling node."""
    x, y = at
    noise = graph.add("RandomNoise", "Noise", (x, y), (320, 90))
    if sampler is None:
        sampler = graph.add("KSamplerSelect", "Sampler", (x, y + 140), (320, 60), sampler_name="ddim")
    sigmas = graph.add("BasicScheduler", "Steps", (x, y + 250), (320, 110), model=(checkpoint, 0),
                       scheduler="ddim_uniform", steps=steps, denoise=denoise)
    sampled = graph.add("SamplerCustomAdvanced", "Sample", (x + 380, 0), (260, 120), noise=(noise, 0),
                        guider=(guider, 0), sampler=(sampler, 0), sigmas=(sigmas, 0), latent_image=latent)
    decode = graph.add("VAEDecode", "VAE Decode", (x + 380, 170), (220, 50), samples=(sampled, 0),
                       vae=(checkpoint, 2))
    graph.add("SaveImage", "Save Image", (x + 380, 280), (400, 420), images=(decode, 0), filename_prefix=prefix)
    return sampled
