"""The images of ImageNet and of RIN, its animals, with their labels.

The images of a split are looked for in `data_root`, by default where 2021 kept them:
`~/.cache/autoencoders/data/ILSVRC2012_train`, or `_validation` (or below XDG_CACHE_HOME). It holds a folder
`data` of synset folders (or these themselves), and optionally `filelist.txt`, `synset_human.txt` and
`index_synset.yaml`, see `synsets.py`. Nothing is downloaded. H W pixels of the crop.
"""

import os
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from taming.data.base import DelegatingDataset, ImagePaths
from taming.data.files.lists import check_some_exist
from taming.data.imagenet.synsets import RIN, human_names, list_images, without_ignored
from taming.data.imagenet.synsets import select as select_classes

Root = str | os.PathLike | None


class ImageNetBase(DelegatingDataset):
    """A split of ImageNet: items "image", "class_label", "human_label", "synsets", "relpath", "file_path_".

    "image" is (H, W, 3) float32 in [-1, 1]. Classes are numbered in the sorted order of the synsets that are
    present; for all thousand, or a subset that has all of its classes, that is the usual order.

    As in 2021, the constructor calls `_prepare`, `_prepare_synset_to_human`, `_prepare_idx_to_synset` and
    `_load`. A subclass may override `_prepare` and set there `root`, `datadir` (the folder of the synsets),
    `txt_filelist` and `random_crop`, and `_filter_relpaths`.

    Args:
        config: any of `size`, see FaultTolerantDataset; `random_crop`, or `ImageNetTrain: {random_crop:
            ...}`; `sub_indices`, classes such as "30-32, 280", without the ends of ranges; `data_root`.
        data_root: folder of the split, see above.
        options: see FaultTolerantDataset.

    Raises:
        FileNotFoundError: the images do not exist; the message says where they should be.
        ValueError: `config` or one of the files beside the images is wrong.
    """

    NAME = ""  # of the split's folder
    SUB_INDICES: str | None = None  # the default of `sub_indices`

    def __init__(
        self, config: Mapping[str, Any] | None = None, *, data_root: Root = None, **options: Any
    ) -> None:
        super().__init__()
        if isinstance(config, DictConfig):
            config = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        own = {"data_root": data_root, "sub_indices": self.SUB_INDICES}
        self.config: dict[str, Any] = {key: value for key, value in own.items() if value is not None}
        self.config |= config or {}
        self.options = options
        self._prepare()
        self._prepare_synset_to_human()
        self._prepare_idx_to_synset()
        self._load()

    def _prepare(self) -> None:
        """Check the config, and set `root`, `datadir`, `txt_filelist` and `random_crop`."""
        names = [base.__name__ for base in type(self).__mro__ if issubclass(base, ImageNetBase)]
        known = {"size", "random_crop", "sub_indices", "data_root", "ImageNetTrain", "ImageNetValidation"}
        if unknown := set(self.config) - known - set(names):
            raise ValueError(
                f"config of {names[0]} has {', '.join(sorted(unknown))}; it may have size, random_crop, "
                f"sub_indices, data_root and {names[0]}: {{random_crop: ...}}"
            )
        self.random_crop = self.config.get("random_crop", self.RANDOM_CROP)
        for name in reversed(names):
            self.random_crop = (self.config.get(name) or {}).get("random_crop", self.random_crop)
        self.root, self.datadir = self._folders(self.config.get("data_root"))
        self.txt_filelist = os.path.join(self.root, "filelist.txt")

    def _prepare_synset_to_human(self) -> None:
        self.human_dict = os.path.join(self.root, "synset_human.txt")

    def _prepare_idx_to_synset(self) -> None:
        self.idx2syn = os.path.join(self.root, "index_synset.yaml")

    def _filter_relpaths(self, relpaths: list[str]) -> list[str]:
        """Leave out images that 2021 ignored, and those of other classes than `sub_indices`."""
        relpaths = without_ignored(relpaths)
        wanted = self.config.get("sub_indices")
        return relpaths if wanted is None else select_classes(relpaths, wanted, self.idx2syn)

    def _load(self) -> None:
        """Set the lists of images and labels, and `data`."""
        source, names = list_images(self.txt_filelist, self.datadir)
        self.relpaths = self._filter_relpaths(names)
        self.abspaths = [os.path.join(self.datadir, name) for name in self.relpaths]
        check_some_exist(self.abspaths, source)
        self.synsets = [name.split("/")[0] for name in self.relpaths]
        classes = sorted(set(self.synsets))
        self.class_names = human_names(self.human_dict, classes)
        numbers = {synset: number for number, synset in enumerate(classes)}
        self.class_labels = [numbers[synset] for synset in self.synsets]
        self.human_labels = [self.class_names[number] for number in self.class_labels]
        labels = {
            "relpath": self.relpaths, "synsets": self.synsets, "class_label": self.class_labels,
            "human_label": self.human_labels,
        }
        self.data = ImagePaths(
            self.abspaths, self.config.get("size"), self.random_crop, labels, **self.options
        )
        self.data.class_names = self.class_names

    def _folders(self, root: Root) -> tuple[str, str]:
        """Return the split's folder and that of its synsets."""
        if root is None:
            if not self.NAME:
                raise ValueError(f"{type(self).__name__} has no usual folder: give data_root")
            cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
            root = os.path.join(cache, "autoencoders/data", self.NAME)
        root = os.fspath(root)
        data = os.path.join(root, "data")
        if not os.path.isdir(root):
            raise FileNotFoundError(
                f"the images of {type(self).__name__} are not here: put the folders of its synsets into "
                f"{data}, or give data_root"
            )
        return root, data if os.path.isdir(data) else root


class ImageNetTrain(ImageNetBase):
    """The training images, cropped at random by default; see ImageNetBase."""

    NAME = "ILSVRC2012_train"
    RANDOM_CROP = True


class ImageNetValidation(ImageNetBase):
    """The validation images, in folders of their synsets, cropped in the centre; see ImageNetBase."""

    NAME = "ILSVRC2012_validation"


class RINTrain(ImageNetTrain):
    """The training images of the restricted ImageNet, of animals; see ImageNetBase."""

    SUB_INDICES = RIN


class RINValidation(ImageNetValidation):
    """The validation images of the restricted ImageNet, of animals; see ImageNetBase."""

    SUB_INDICES = RIN
