"""ImageNet, whole or restricted, with depth, edges or low resolutions, and the names of 2021's module."""

# ruff: noqa: F401
from taming.data.base import ImagePaths
from taming.data.files.depth import rgba_to_depth
from taming.data.imagenet.datasets import (
    BaseWithDepth,
    DRINExamples,
    ImageNetEdges,
    ImageNetEdgesTrain,
    ImageNetEdgesValidation,
    ImageNetScale,
    ImageNetScaleTrain,
    ImageNetScaleValidation,
    ImageNetTrainWithDepth,
    ImageNetValidationWithDepth,
    RINTrainWithDepth,
    RINValidationWithDepth,
    get_preprocessor,
)
from taming.data.imagenet.images import (
    ImageNetBase,
    ImageNetTrain,
    ImageNetValidation,
    RINTrain,
    RINValidation,
)
from taming.data.imagenet.synsets import give_synsets_from_indices, str_to_indices
from taming.data.transforms.edges import canny
from taming.data.transforms.scale import imscale
from taming.util import download, retrieve
