"""A pipe in the place of an annotation file is one line, and never waits."""

import os

import pytest

from taming.data import annotated_objects_coco, annotated_objects_open_images, coco, deepfashion, imagenet
from taming.data.conditional_builder.utils import load_object_from_string


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
@pytest.mark.parametrize("read", [
    annotated_objects_coco.read_annotation_file, annotated_objects_open_images.load_categories,
    annotated_objects_open_images.load_image_ids, deepfashion.read_keypoints,
    lambda path: coco.CocoImagesAndCaptionsTrain(8, datajson=path),
    lambda path: imagenet.give_synsets_from_indices([0], path),
    lambda path: load_object_from_string(str(path)),
])
@pytest.mark.parametrize("extension", ["json", "csv"])
def test_a_pipe_is_refused_at_once(tmp_path, read, extension):
    pipe = tmp_path / f"x.{extension}"
    os.mkfifo(pipe)
    with pytest.raises((ValueError, FileNotFoundError), match=f"x.{extension}") as caught:
        read(pipe)
    assert "\n" not in str(caught.value)
