"""Words by which people look for the nodes, by node id: the papers' names, and what one wants to do.

The front end searches each node's id, name and these words. A word counts the more the earlier it stands in its
phrase: so a technique's name stands alone with the node to begin with, and ends a phrase with the others.
"""
from __future__ import annotations

WORDS: dict[str, tuple[str, ...]] = {
    "MixologyLayoutMixKSampler": (
        "magicmix", "semantic mixing", "mix concepts", "keep composition", "keep layout", "same composition", "img2img",
        "image to image", "structure transfer"),
    "MixologyLayoutMixSampler": (
        "sampler for magicmix", "sampler for semantic mixing", "sampler to keep composition", "sampler for img2img"),
    "MixologyLayoutNoise": ("layout for magicmix", "layout for semantic mixing", "layout of a picture"),
    "MixologyLayoutFromPrompt": ("layout for magicmix", "layout for semantic mixing", "text to text", "prompt layout"),
    "MixologyTokenScale": (
        "negpip", "token weight", "word weight", "prompt weight", "negative weight", "remove object", "remove", "erase",
        "erase object", "concept removal", "delete", "attention reweight", "prompt to prompt", "words of magicmix"),
    "MixologyAttentionMerge": (
        "regional prompt", "attention couple", "two styles", "attention for dual style", "attention interpolation",
        "regions", "area prompt"),
    "MixologyEpsilonMergeGuider": (
        "dual style", "two styles", "mix two styles", "style blend", "blend styles", "mix styles", "regional prompt",
        "regional prompts", "latent couple", "regions"),
    "MixologyGradientMask": (
        "masks for dual style", "masks for two styles", "masks for regional prompt", "linear", "logistic",
        "split mask"),
    "MixologyCycleSampler": (
        "cycle diffusion", "dpm-encoder", "restyle", "style transfer", "restyle by img2img", "edit picture"),
    "MixologyBlendPrompts": (
        "prompt for ditail", "prompt for diffusion cocktail", "prompt interpolation", "mix prompts",
        "blend conditioning", "conditioning subtract"),
    "MixologyInvert": (
        "unsampler", "unsample", "invert image", "inversion", "noise from image", "inversion for ditail",
        "inversion for diffusion cocktail"),
    "MixologyFeatureInjection": (
        "plug and play", "pnp", "structure transfer", "keep structure", "model for style transfer",
        "injection for ditail", "injection for diffusion cocktail"),
    "MixologyTrajectoryStart": ("start for ditail", "start for diffusion cocktail", "start after unsampler"),
    "MixologyCocktailKSampler": (
        "ditail", "diffusion cocktail", "cocktail", "style transfer", "transfer style", "restyle", "structure transfer",
        "transfer structure", "keep structure", "lora style"),
    "MixologySaveTrajectory": ("save inversion", "file for ditail", "file for diffusion cocktail"),
    "MixologyLoadTrajectory": ("load inversion", "file for ditail", "file for diffusion cocktail"),
    "MixologyExpert": (
        "expert for magicfusion", "expert for model fusion", "expert for an ensemble", "model to mix models",
        "model to merge models", "model to blend models", "model to combine models"),
    "MixologySaliencyGuider": (
        "magicfusion", "model fusion", "ensemble", "ensemble of models", "merge models", "mix models", "blend models",
        "combine models", "fuse models", "two checkpoints", "saliency noise blending"),
    "MixologySaliencyMaps": ("maps of magicfusion", "maps of model fusion", "maps of an ensemble", "heatmap"),
    "MixologyMixerImage": (
        "image mixer", "ip-adapter", "ipadapter", "redux", "combine images", "mix images", "blend images",
        "merge images", "image prompt", "image variations", "clip image embedding"),
    "MixologyMixerText": ("words for image mixer", "text direction", "clip text embedding"),
    "MixologyMixerConditioning": (
        "prompt for image mixer", "prompt like ip-adapter", "prompt like redux", "prompt to combine images",
        "prompt to mix images", "image variations"),
    "MixologyImageMetrics": (
        "ssim", "psnr", "lpips", "l2", "compare images", "image similarity", "image difference", "image quality",
        "total variation", "measure images", "evaluate"),
    "MixologyClipMetrics": (
        "clip score", "clip similarity", "directional similarity", "text similarity", "prompt adherence",
        "measure a prompt", "evaluate by clip"),
    "MixologySweep": (
        "xy plot", "grid search", "parameter sweep", "list of values", "float list", "int list", "range", "loop"),
    "MixologyLabelledGrid": (
        "xy grid", "xyz plot", "image grid", "contact sheet", "montage", "side by side", "label images"),
    "MixologyDemoCheckpoint": ("tiny model", "example checkpoint", "test model", "shapes"),
    "MixologyDemoPicture": ("draw shape", "test image", "example image"),
}
CHINESE: dict[str, tuple[str, ...]] = {
    "MixologyLayoutMixKSampler": (
        "\u5e03\u5c40\u6df7\u5408", "\u4fdd\u6301\u6784\u56fe", "\u56fe\u751f\u56fe", "\u8bed\u4e49\u6df7\u5408",
        "\u6982\u5ff5\u6df7\u5408", "\u56fe\u50cf\u6df7\u5408", "K\u91c7\u6837\u5668"),
    "MixologyLayoutMixSampler": (
        "\u5e03\u5c40\u6df7\u5408", "\u91c7\u6837\u5668"),
    "MixologyLayoutNoise": (
        "\u5e03\u5c40", "\u6784\u56fe"),
    "MixologyLayoutFromPrompt": (
        "\u5e03\u5c40", "\u6784\u56fe", "\u63d0\u793a\u8bcd\u6df7\u5408"),
    "MixologyTokenScale": (
        "\u63d0\u793a\u8bcd\u6743\u91cd", "\u8bcd\u6743\u91cd", "\u8d1f\u6743\u91cd", "\u6ce8\u610f\u529b\u7f29\u653e",
        "\u79fb\u9664\u7269\u4f53", "\u53bb\u9664\u7269\u4f53", "\u6d88\u9664", "\u64e6\u9664",
        "\u6982\u5ff5\u79fb\u9664"),
    "MixologyAttentionMerge": (
        "\u5206\u533a\u63d0\u793a\u8bcd", "\u533a\u57df\u63d0\u793a\u8bcd", "\u53cc\u98ce\u683c",
        "\u98ce\u683c\u6df7\u5408", "\u6ce8\u610f\u529b\u5408\u5e76", "\u4ea4\u53c9\u6ce8\u610f\u529b"),
    "MixologyEpsilonMergeGuider": (
        "\u53cc\u98ce\u683c", "\u98ce\u683c\u6df7\u5408", "\u98ce\u683c\u878d\u5408", "\u5206\u533a\u63d0\u793a\u8bcd",
        "\u533a\u57df\u63d0\u793a\u8bcd", "\u5f15\u5bfc\u5668"),
    "MixologyGradientMask": (
        "\u6e10\u53d8\u906e\u7f69", "\u6e10\u53d8\u8499\u7248", "\u8499\u7248", "\u53cc\u98ce\u683c",
        "\u98ce\u683c\u8fc7\u6e21"),
    "MixologyCycleSampler": (
        "\u56fe\u50cf\u7f16\u8f91", "\u98ce\u683c\u8f6c\u6362", "\u98ce\u683c\u8fc1\u79fb",
        "\u56fe\u50cf\u7f16\u8f91\u56fe\u751f\u56fe", "\u8f6c\u7ed8", "\u6362\u98ce\u683c", "\u5faa\u73af\u6269\u6563"),
    "MixologyBlendPrompts": (
        "\u63d0\u793a\u8bcd\u6df7\u5408", "\u6df7\u5408\u63d0\u793a\u8bcd", "\u6761\u4ef6\u6df7\u5408",
        "\u6761\u4ef6\u76f8\u51cf", "\u63d0\u793a\u8bcd\u63d2\u503c"),
    "MixologyInvert": (
        "\u53cd\u6f14", "\u53cd\u63a8\u566a\u58f0", "\u53cd\u5411\u91c7\u6837", "\u56fe\u50cf\u8f6c\u566a\u58f0"),
    "MixologyFeatureInjection": (
        "\u7279\u5f81\u6ce8\u5165", "\u6ce8\u610f\u529b\u6ce8\u5165", "\u7ed3\u6784\u8fc1\u79fb",
        "\u4fdd\u6301\u7ed3\u6784"),
    "MixologyTrajectoryStart": (
        "\u8f68\u8ff9", "\u53cd\u6f14", "\u4ece\u8f68\u8ff9\u5f00\u59cb"),
    "MixologyCocktailKSampler": (
        "\u98ce\u683c\u8fc1\u79fb", "\u98ce\u683c\u8f6c\u6362", "\u8f6c\u7ed8", "\u7ed3\u6784\u8fc1\u79fb",
        "\u4fdd\u6301\u7ed3\u6784", "\u9e21\u5c3e\u9152", "K\u91c7\u6837\u5668"),
    "MixologySaveTrajectory": (
        "\u4fdd\u5b58\u8f68\u8ff9", "\u8f68\u8ff9", "\u53cd\u6f14"),
    "MixologyLoadTrajectory": (
        "\u52a0\u8f7d\u8f68\u8ff9", "\u8f68\u8ff9", "\u53cd\u6f14"),
    "MixologyExpert": (
        "\u6a21\u578b\u878d\u5408", "\u591a\u6a21\u578b", "\u4e13\u5bb6\u6a21\u578b", "\u878d\u5408\u4e13\u5bb6"),
    "MixologySaliencyGuider": (
        "\u6a21\u578b\u878d\u5408", "\u591a\u6a21\u578b\u878d\u5408", "\u6a21\u578b\u5408\u5e76",
        "\u6df7\u5408\u6a21\u578b", "\u663e\u8457\u6027", "\u5f15\u5bfc\u5668"),
    "MixologySaliencyMaps": (
        "\u663e\u8457\u6027\u56fe", "\u53ef\u89c6\u5316", "\u70ed\u529b\u56fe"),
    "MixologyMixerImage": (
        "\u56fe\u50cf\u6df7\u5408", "\u56fe\u7247\u6df7\u5408", "\u6df7\u56fe", "\u5408\u5e76\u56fe\u7247",
        "\u56fe\u50cf\u53d8\u4f53", "\u56fe\u50cf\u63d0\u793a"),
    "MixologyMixerText": (
        "\u6587\u672c\u6df7\u5408", "\u6587\u672c\u65b9\u5411", "\u56fe\u6587\u6df7\u5408"),
    "MixologyMixerConditioning": (
        "\u56fe\u50cf\u6df7\u5408", "\u56fe\u7247\u6df7\u5408", "\u6df7\u56fe", "\u56fe\u50cf\u53d8\u4f53",
        "\u6df7\u5408\u6761\u4ef6"),
    "MixologyImageMetrics": (
        "\u56fe\u50cf\u5bf9\u6bd4", "\u56fe\u7247\u5bf9\u6bd4", "\u56fe\u50cf\u76f8\u4f3c\u5ea6",
        "\u56fe\u50cf\u8d28\u91cf", "\u8bc4\u4f30", "\u6307\u6807", "\u7ed3\u6784\u76f8\u4f3c\u5ea6"),
    "MixologyClipMetrics": (
        "\u56fe\u6587\u76f8\u4f3c\u5ea6", "\u63d0\u793a\u8bcd\u5339\u914d", "\u8bc4\u4f30", "CLIP\u5206\u6570",
        "\u76f8\u4f3c\u5ea6", "\u65b9\u5411\u76f8\u4f3c\u5ea6"),
    "MixologySweep": (
        "\u626b\u63cf", "\u53c2\u6570\u626b\u63cf", "\u6570\u503c\u5217\u8868", "\u6279\u91cf\u6d4b\u8bd5"),
    "MixologyLabelledGrid": (
        "\u7f51\u683c", "\u56fe\u7247\u7f51\u683c", "\u62fc\u56fe", "\u6807\u7b7e", "\u5bf9\u6bd4\u56fe"),
    "MixologyDemoCheckpoint": (
        "\u6f14\u793a", "\u793a\u4f8b\u6a21\u578b", "\u6d4b\u8bd5\u6a21\u578b", "\u5c0f\u6a21\u578b",
        "\u68c0\u67e5\u70b9"),
    "MixologyDemoPicture": (
        "\u6f14\u793a", "\u793a\u4f8b\u56fe\u7247", "\u6d4b\u8bd5\u56fe\u7247", "\u7ed8\u5236\u56fe\u5f62"),
}


def search_words(node_id: str) -> list[str]:
    """A node's words in all languages."""
    return [*WORDS[node_id], *CHINESE[node_id]]
