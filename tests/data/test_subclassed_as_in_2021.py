"""Data sets of downstream projects, written as they subclassed the classes of 2021, work unchanged."""

import os

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from taming.data import imagenet
from taming.data.annotated_objects_dataset import AnnotatedObjectsDataset
from taming.data.base import ImagePaths, NumpyPaths
from taming.data.custom import CustomBase, CustomTest
from taming.data.faceshq import FacesBase
from taming.data.helper_types import Annotation, Category
from taming.images import from_uint8


@pytest.fixture
def paths(tmp_path):
    files = []
    for shade in range(4):
        folder = tmp_path / f"n{shade // 2:08}"
        folder.mkdir(exist_ok=True)
        files.append(str(folder / f"{shade}.png"))
        Image.new("RGB", (12, 10), (60 * shade, 0, 0)).save(files[-1])
    return files


def test_image_paths(paths):
    class Own(ImagePaths):
        def __init__(self, size=None, random_crop=False, labels=None):
            super().__init__(paths, size, random_crop, labels)
            self.size = size  # was an attribute

        def preprocess_image(self, image_path):
            image = np.array(Image.open(image_path)).astype(np.uint8)
            image = self.preprocessor(image=image)["image"]
            return (image / 127.5 - 1.0).astype(np.float32) * 0.5

    data = Own(8, labels={"number": {i: f"no. {i}" for i in range(4)}})  # a mapping by index
    assert data.size == 8 and data[2]["number"] == "no. 2"
    assert data[3]["image"].shape == (8, 8, 3)
    assert data[3]["image"][0, 0, 0] == pytest.approx(from_uint8(np.array(180)) * 0.5)
    assert Own()[0]["image"].shape == (10, 12, 3)  # without a size nothing is resized

    class Indexed(ImagePaths):
        def __getitem__(self, i):
            example = {k: self.labels[k][i] for k in self.labels}
            example["image"] = self.preprocess_image(example["file_path_"])
            return example

    item = Indexed(paths=paths, size=8)[1]
    assert item["file_path_"] == paths[1] and item["image"].shape == (8, 8, 3)


def test_custom_base(paths):
    class Own(CustomBase):
        def __init__(self, size, listing):
            super().__init__()
            assert self.data is None
            with open(listing) as f:
                files = f.read().splitlines()
            self.data = ImagePaths(paths=files, size=size, random_crop=False)

    listing = os.path.join(os.path.dirname(paths[0]), "list.txt")
    with open(listing, "w") as f:
        f.write("\n".join(paths))
    data = Own(8, listing)
    assert len(data) == 4 and data[0]["file_path_"] == paths[0]
    assert isinstance(CustomTest(8, listing).data, ImagePaths)
    assert CustomBase(1, 2, three=4).data is None


def test_faces_base(paths):
    class Own(FacesBase):
        def __init__(self, size, keys=None):
            super().__init__()
            assert self.data is None and self.keys is None
            self.data = NumpyPaths(paths=paths, size=size, random_crop=False)
            self.keys = keys

    assert set(Own(8)[0]) == {"image", "file_path_"} and set(Own(8, ["image"])[3]) == {"image"}
    assert len(Own(8)) == 4


def test_imagenet_base(paths, tmp_path):
    class Own(imagenet.ImageNetBase):
        def __init__(self, process_images=True, **kwargs):
            self.process_images = process_images
            super().__init__(**kwargs)

        def _prepare(self):
            self.random_crop = imagenet.retrieve(self.config, "ImageNetTrain/random_crop", default=True)
            self.root = self.datadir = str(tmp_path)
            self.txt_filelist = os.path.join(self.root, "filelist.txt")
            self.expected_length = 3
            with open(self.txt_filelist, "w") as f:
                f.write("n00000001/2.png\nn00000000/0.png\nn00000000/1.png\n")

        def _filter_relpaths(self, relpaths):
            return [path for path in super()._filter_relpaths(relpaths) if not path.endswith("/1.png")]

        def _load(self):
            super()._load()
            if not self.process_images:
                self.data = self.abspaths

    data = Own(config=OmegaConf.create({"size": 8, "key_of_mine": 1}))
    assert type(data.config) is dict and data.config["key_of_mine"] == 1 and data.random_crop is True
    assert data.relpaths == ["n00000001/2.png", "n00000000/0.png"] and len(data) == 2
    assert data[0]["class_label"] == 1 and data[1]["image"].shape == (8, 8, 3)
    assert data.human_dict == f"{tmp_path}/synset_human.txt" and data.idx2syn.endswith("/index_synset.yaml")
    assert Own(process_images=False)[1] == paths[0]


def test_annotated_objects(paths, tmp_path):
    class Own(AnnotatedObjectsDataset):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            assert sorted(os.listdir(self.paths["files"])) == ["0.png", "1.png"]
            self.categories = {key: Category(key, None, name) for key, name in (("a", "ant"), ("b", "bee"))}
            self.filter_categories()
            self.setup_category_id_and_number()
            number, box = self.get_category_number("b"), (0.0, 0.0, 0.5, 0.5)
            found = {str(i): [Annotation(0.25, str(i), box, number, "b")] * i for i in range(2)}
            self.annotations = self.filter_object_number(
                found, self.min_object_area, self.min_objects_per_image, self.max_objects_per_image
            )
            self.image_ids = list(self.annotations.keys())
            self.clean_up_annotations_and_image_descriptions()

        def get_path_structure(self):
            return {"top_level": "", "files": "n00000000"}

        def get_image_path(self, image_id):
            return self.paths["files"].joinpath(f"{image_id}.png")

        def get_image_description(self, image_id):
            return {"file_name": f"{image_id}.png"}

    data = Own(
        data_path=tmp_path, split="train", keys=["image", "objects_bbox", "file_name", "annotations"],
        target_image_size=[8, 12], min_object_area=0.0, min_objects_per_image=1, max_objects_per_image=2,
        crop_method="random-1d", random_flip=False, no_tokens=400, use_group_parameter=False,
        encode_crop=False,
    )
    assert data.image_ids == ["1"] and data[0]["file_name"] == "1.png"
    assert data[0]["image"].shape == (8, 12, 3) and data[0]["objects_bbox"].shape == (6,)
    assert data.load_image_from_disk(paths[0]).size == (12, 10)
    batch = data.collate_fn([data[0], data[0]])
    assert [len(annotations) for annotations in batch["annotations"]] == [1, 1]


def test_preprocessor_of_imagenet():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    depth = image[..., 0].astype(np.float32)
    plain = imagenet.get_preprocessor()
    assert plain(image=image)["image"] is image
    out = imagenet.get_preprocessor(size=20, additional_targets={"depth": "image"})(image=image, depth=depth)
    assert np.array_equal(out["image"], image[:, 5:25]) and np.array_equal(out["depth"], depth[:, 5:25])
    crop = imagenet.get_preprocessor(crop_size=8, random_crop=True)
    seen = {crop(image=image, depth=depth)["depth"].tobytes() for _ in range(20)}
    assert len(seen) > 10
    for out in (crop(image=image, depth=depth) for _ in range(5)):
        assert np.array_equal(out["image"][..., 0], out["depth"])
    mirrored = imagenet.get_preprocessor(size=20, random_crop=True)
    lefts = {mirrored(image=image)["image"][0, 0].tobytes() for _ in range(60)}
    whole = {pixel.tobytes() for pixel in image[0]}
    assert lefts <= whole and len(lefts) > 11  # 11 places of a crop, and mirrored ones
    with pytest.raises(ValueError, match="all arrays must have one height and width"):
        mirrored(image=image, depth=depth[1:])
