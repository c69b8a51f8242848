"""The images of ImageNet and of RIN, its animals, with their labels. Their historic home is `imagenet.py`.

The images of a split are looked for in `data_root`, by default where they were kept in 2021:
`~/.cache/autoencoders/data/ILSVRC2012_train`, or `_validation` (or below XDG_CACHE_HOME). There is a folder
`data` of synset folders (or these themselves), and if you like `filelist.txt`, `synset_human.txt` and
`index_synset.yaml`, see `synsets.py`. Nothing is downloaded. H W pixels of the crop.
"""

import os
from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from taming.data.base import ImagePaths
from taming.data.files.lists import check_some_exist
from taming.data.imagenet.synsets import RIN, human_names, list_images, select

Root = str | os.PathLike | None


class ImageNetBase(Dataset):
    """A split of ImageNet: items "image", "class_label", "human_label", "synsets", "relpath", "file_path_".

    "image" is (H, W, 3) float32 in [-1, 1]. Classes are numbered in the sorted order of the synsets that are
    there; of all thousand, or of a subset that has all of its classes, that is the usual order.

    Args:
        config: any of `size`, pixels of the smallest side, of which a square is cropped, else pictures are as
            they are; `random_crop`, or `ImageNetTrain: {random_crop: ...}`; `sub_indices`, classes such as
            "30-32, 280", without the ends of ranges; `data_root`.
        data_root: folder of the split, see above.
        max_bad_fraction: share of unreadable images that is tolerated.

    Raises:
        FileNotFoundError: the images are not there; the message says where they should be.
        ValueError: `config` or one of the files beside the images is wrong.
    """

    NAME = ""  # of the split's folder
    RANDOM_CROP = False  # unless the configuration says otherwise

    def __init__(
        self,
        config: Mapping[str, Any] | None = None,
        *,
        data_root: Root = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.config = dict(config or {})
        names = [base.__name__ for base in type(self).__mro__ if issubclass(base, ImageNetBase)]
        known = {"size", "random_crop", "sub_indices", "data_root", "ImageNetTrain", "ImageNetValidation"}
        if unknown := set(self.config) - known - set(names):
            raise ValueError(
                f"config of {names[0]} has {', '.join(sorted(unknown))}; it may have size, random_crop, "
                f"sub_indices, data_root and {names[0]}: {{random_crop: ...}}"
            )
        random_crop = self.config.get("random_crop", self.RANDOM_CROP)
        for name in reversed(names):
            random_crop = (self.config.get(name) or {}).get("random_crop", random_crop)
        self.root, self.datadir = self._folders(data_root or self.config.get("data_root"))
        source, self.relpaths = list_images(self.root, self.datadir)
        if self.config.get("sub_indices") is not None:
            self.relpaths = select(self.relpaths, self.config["sub_indices"], self.root)
        self.abspaths = [os.path.join(self.datadir, name) for name in self.relpaths]
        check_some_exist(self.abspaths, source)
        self.synsets = [name.split("/")[0] for name in self.relpaths]
        classes = sorted(set(self.synsets))
        self.class_names = human_names(self.root, classes)
        numbers = {synset: number for number, synset in enumerate(classes)}
        self.class_labels = [numbers[synset] for synset in self.synsets]
        self.human_labels = [self.class_names[number] for number in self.class_labels]
        self.data = ImagePaths(
            self.abspaths, self.config.get("size"), random_crop,
            {
                "relpath": self.relpaths, "synsets": self.synsets, "class_label": self.class_labels,
                "human_label": self.human_labels,
            },
            max_bad_fraction=max_bad_fraction,
        )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data[index]

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
    """The training images, cropped anywhere by default; see ImageNetBase."""

    NAME = "ILSVRC2012_train"
    RANDOM_CROP = True


class ImageNetValidation(ImageNetBase):
    """The validation images, in folders of their synsets, cropped in the centre; see ImageNetBase."""

    NAME = "ILSVRC2012_validation"


class RINTrain(ImageNetTrain):
    """The training images of the restricted ImageNet, of animals; see ImageNetBase."""

    def __init__(self, config: Mapping[str, Any] | None = None, *, data_root: Root = None,
                 max_bad_fraction: float = 0.01) -> None:
        config = {"sub_indices": RIN, **(config or {})}
        super().__init__(config, data_root=data_root, max_bad_fraction=max_bad_fraction)


class RINValidation(ImageNetValidation):
    """The validation images of the restricted ImageNet, of animals; see ImageNetBase."""

    def __init__(self, config: Mapping[str, Any] | None = None, *, data_root: Root = None,
                 max_bad_fraction: float = 0.01) -> None:
        config = {"sub_indices": RIN, **(config or {})}
        super().__init__(config, data_root=data_root, max_bad_fraction=max_bad_fraction)
