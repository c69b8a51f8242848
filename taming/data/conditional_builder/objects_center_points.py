"""Objects as pairs of tokens: the category, and the position of the centre.

B batch, M tokens of a layout, V vocabulary. A box is (x0, y0, width, height) in fractions of the sides, 0..1.

The vocabulary has two uses. As an object, a token is `category_no + no_object_classes * flags`, where flags
are bits: 1 group, 2 occluded, 4 depiction, 8 inside. As a position it counts a grid of isqrt(V) x isqrt(V)
points that spans the image, corners included, row by row. The last token, V - 1, pads the sequence.
"""

import logging
import math
import random
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from taming.data.conditional_builder.utils import (
    BLACK,
    COLOR_PALETTE,
    FULL_CROP,
    GRAY_75,
    WHITE,
    absolute_bbox,
    additional_parameters_string,
    filter_annotations,
    get_circle_size,
    get_plot_font_size,
    horizontally_flip_bbox,
    pad_list,
    rescale_annotations,
)
from taming.data.helper_types import Annotation, BoundingBox
from taming.images import from_uint8

logger = logging.getLogger(__name__)

Color = tuple[int, int, int]  # 0..255
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


class ObjectsCenterPointsConditionalBuilder:
    """Turns the annotations of an image into M tokens, (object, centre) for each object, and back.

    Args:
        no_object_classes: categories, numbered from 0.
        no_max_objects: objects that the sequence has room for; it is padded to that.
        no_tokens: V, the vocabulary.
        encode_crop: describe the whole image, and append the part that the crop shows, as two tokens for its
            corners; otherwise describe the crop alone.
        use_group_parameter: distinguish groups of objects from single ones.
        use_additional_parameters: distinguish occluded, depicted and indoor objects from others.

    Raises:
        ValueError: a vocabulary that is too small for the categories and flags, or for a grid of positions.
    """

    kind = "boxes"  # what users give

    def __init__(
        self, no_object_classes: int, no_max_objects: int, no_tokens: int, encode_crop: bool,
        use_group_parameter: bool, use_additional_parameters: bool,
    ) -> None:
        self.no_object_classes, self.no_max_objects = no_object_classes, no_max_objects
        self.no_tokens, self.encode_crop = no_tokens, encode_crop
        self.use_group_parameter, self.use_additional_parameters = (
            use_group_parameter, use_additional_parameters
        )
        self.no_sections = math.isqrt(max(0, no_tokens))  # points of the grid along a side
        self._warned_of_too_many = False
        if no_object_classes < 1 or no_max_objects < 1:
            raise ValueError(
                "a layout needs at least one category and room for one object, got "
                f"no_object_classes={no_object_classes} and no_max_objects={no_max_objects}"
            )
        highest_flags = (14 if use_additional_parameters else 0) + (1 if use_group_parameter else 0)
        needed = max(no_object_classes * (highest_flags + 1) + 1, 4)
        if no_tokens < needed:
            raise ValueError(
                f"no_tokens={no_tokens} is too small for {no_object_classes} categories with "
                f"use_group_parameter={use_group_parameter} and "
                f"use_additional_parameters={use_additional_parameters}: set no_tokens (and the "
                f"transformer's vocab_size) to at least {needed}, or allow fewer categories"
            )

    @property
    def none(self) -> int:
        """The token that pads the sequence."""
        return self.no_tokens - 1

    @property
    def object_descriptor_length(self) -> int:
        """Tokens per object."""
        return 2

    @property
    def embedding_dim(self) -> int:
        """M, the number of tokens of every layout: its part of the transformer's block size."""
        return self.no_max_objects * self.object_descriptor_length + (2 if self.encode_crop else 0)

    # ---- positions and objects <-> tokens

    def tokenize_coordinates(self, x: float, y: float) -> int:
        """Return the token of the grid point nearest to (x, y), fractions of the sides in 0..1."""
        column, row = (int(round(part * (self.no_sections - 1))) for part in (x, y))
        return row * self.no_sections + column

    def coordinates_from_token(self, token: int) -> tuple[float, float]:
        """Return (x, y) of a token, fractions of the sides; tokens beyond the grid count as its last row."""
        row, column = divmod(token, self.no_sections)
        return column / (self.no_sections - 1), min(1.0, row / (self.no_sections - 1))

    def token_pair_from_bbox(self, bbox: BoundingBox) -> tuple[int, int]:
        """Return the tokens of a box's upper left and lower right corner."""
        x, y, width, height = bbox
        return self.tokenize_coordinates(x, y), self.tokenize_coordinates(x + width, y + height)

    def bbox_from_token_pair(self, token1: int, token2: int) -> BoundingBox:
        """Return the box between two corners; width and height are negative where they are swapped."""
        x0, y0 = self.coordinates_from_token(token1)
        x1, y1 = self.coordinates_from_token(token2)
        return x0, y0, x1 - x0, y1 - y0

    def object_representation(self, annotation: Annotation) -> int:
        """Return the token of an object's category and flags."""
        flags = 0
        if self.use_group_parameter:
            flags |= bool(annotation.is_group_of)
        if self.use_additional_parameters:
            flags |= bool(annotation.is_occluded) << 1
            flags |= bool(annotation.is_depiction) << 2
            flags |= bool(annotation.is_inside) << 3
        return annotation.category_no + self.no_object_classes * flags

    def representation_to_annotation(self, representation: int) -> Annotation:
        """Return the category and flags of an object's token, as an annotation without anything else."""
        flags, category_no = divmod(representation, self.no_object_classes)
        group, more = self.use_group_parameter, self.use_additional_parameters
        unknown: Any = None
        return Annotation(
            area=unknown, image_id=unknown, bbox=unknown, category_id=unknown, category_no=category_no,
            is_group_of=bool(flags & 1 and group), is_occluded=bool(flags & 2 and more),
            is_depiction=bool(flags & 4 and more), is_inside=bool(flags & 8 and more),
        )

    # ---- annotations <-> layouts

    def build(
        self, annotations: Sequence[Annotation], crop_coordinates: BoundingBox | None = None,
        horizontal_flip: bool = False,
    ) -> Tensor:
        """Turn an image's annotations into M tokens, int64 (M,).

        Objects outside the crop are left out. The others are in random order (python's global generator); of
        more than `no_max_objects`, the first ones in that order are kept, with one warning.

        Args:
            annotations: boxes in fractions of the whole image.
            crop_coordinates: the part of the image that is shown; all of it when None.
            horizontal_flip: whether the shown part is mirrored.

        Raises:
            ValueError: a category number or a flag that the vocabulary has no token for.
        """
        crop = crop_coordinates or FULL_CROP
        chosen = filter_annotations(annotations, crop)  # a new list: shuffling must not touch the caller's
        random.shuffle(chosen)
        chosen = self._limit(chosen)
        chosen = rescale_annotations(chosen, FULL_CROP if self.encode_crop else crop, bool(horizontal_flip))
        tuples = self._make_object_descriptors(chosen)
        tokens = [token for descriptor in tuples for token in descriptor]
        if self.encode_crop:
            tokens += self.token_pair_from_bbox(horizontally_flip_bbox(crop) if horizontal_flip else crop)
        assert len(tokens) == self.embedding_dim, (len(tokens), self.embedding_dim)
        return torch.tensor(tokens, dtype=torch.int64)  # (M,)

    def inverse_build(
        self, conditional: Tensor
    ) -> tuple[list[tuple[int, tuple[float, ...]]], BoundingBox | None]:
        """Turn M tokens into [(object token, (x, y) of its centre)] and the crop, if that is encoded."""
        descriptors, crop = self._split(conditional)
        return [(token, self.coordinates_from_token(where)) for token, where in descriptors], crop

    def _limit(self, annotations: list[Annotation]) -> list[Annotation]:
        if len(annotations) > self.no_max_objects and not self._warned_of_too_many:
            self._warned_of_too_many = True
            logger.warning(
                "an image shows %d objects, more than the %d that a layout has room for: some are left out; "
                "raise max_objects_per_image, and the block size, to keep them (said once)",
                len(annotations), self.no_max_objects,
            )
        return annotations[: self.no_max_objects]

    def _make_object_descriptors(self, annotations: list[Annotation]) -> list[tuple[int, ...]]:
        descriptors = [(self._object_token(a), *self._position(a.bbox)) for a in annotations]
        filler = (self.none,) * self.object_descriptor_length
        return pad_list(descriptors, filler, self.no_max_objects)

    def _object_token(self, annotation: Annotation) -> int:
        if not 0 <= annotation.category_no < self.no_object_classes:
            raise ValueError(
                f"category number {annotation.category_no} of annotation {annotation.id} (image "
                f"{annotation.image_id}) is outside 0..{self.no_object_classes - 1}: raise no_object_classes"
            )
        return self.object_representation(annotation)

    def _position(self, bbox: BoundingBox) -> tuple[int, ...]:
        x, y, width, height = bbox
        return (self.tokenize_coordinates(x + width / 2, y + height / 2),)

    def _split(self, conditional: Tensor) -> tuple[list[tuple[int, ...]], BoundingBox | None]:
        """Return the descriptors that are not padding, and the crop if it is encoded."""
        tokens = conditional.tolist()
        if len(tokens) != self.embedding_dim:
            raise ValueError(f"a layout has {self.embedding_dim} tokens here, got {len(tokens)}")
        crop = self.bbox_from_token_pair(*tokens[-2:]) if self.encode_crop else None
        length, end = self.object_descriptor_length, self.no_max_objects * self.object_descriptor_length
        descriptors = [tuple(tokens[i:i + length]) for i in range(0, end, length)]
        return [descriptor for descriptor in descriptors if descriptor[0] != self.none], crop

    # ---- layouts -> images

    def plot(
        self, conditional: Tensor, label_for_category_no: Callable[[int], str], figure_size: tuple[int, int],
        line_width: int = 3, font_size: int | None = None,
    ) -> Tensor:
        """Draw one layout (M,) as an image (3, height, width) in [-1, 1]; any tokens can be drawn.

        Args:
            label_for_category_no: returns the text beside an object.
            figure_size: (width, height) in pixels.
            line_width, font_size: pixels; labels are sized by the figure when None.
        """
        figure = Image.new("RGB", figure_size, WHITE)
        draw = ImageDraw.Draw(figure)
        font = ImageFont.load_default(get_plot_font_size(font_size, figure_size))
        objects, crop = self.inverse_build(conditional)
        for (token, where), color in zip(objects, cycle(COLOR_PALETTE), strict=False):
            annotation = self.representation_to_annotation(token)
            flags = additional_parameters_string(annotation)
            label = f"{label_for_category_no(annotation.category_no)} {flags}".rstrip()
            self._draw_object(draw, where, color, label, font, line_width)
        if crop is not None:
            draw_box(draw, crop, GRAY_75, line_width)
        return from_uint8(torch.from_numpy(np.array(figure))).permute(2, 0, 1)

    def plot_batch(
        self, conditionals: Tensor, label_for_category_no: Callable[[int], str], figure_size: tuple[int, int],
        line_width: int = 3, font_size: int | None = None,
    ) -> Tensor:
        """Draw layouts (B, M) as images (B, 3, height, width) in [-1, 1], on the CPU; see `plot`."""
        rows = conditionals.detach().cpu()
        return torch.stack([
            self.plot(row, label_for_category_no, figure_size, line_width, font_size) for row in rows
        ])

    def _draw_object(
        self, draw: ImageDraw.ImageDraw, where: tuple[float, ...], color: Color, label: str, font: Font,
        line_width: int,
    ) -> None:
        width, height = draw.im.size
        x, y, radius = where[0] * width, where[1] * height, get_circle_size((width, height))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        write_inside(draw, (x - draw.textlength(label, font) / 2, y - radius), label, font, above=True)


def draw_box(draw: ImageDraw.ImageDraw, bbox: BoundingBox, color: Color, line_width: int) -> None:
    """Draw the outline of a box, which may have its corners swapped."""
    width, height = draw.im.size
    x0, y0, x1, y1 = absolute_bbox(bbox, width, height)
    (x0, x1), (y0, y1) = sorted((x0, x1)), sorted((y0, y1))
    right, bottom = width - 1, height - 1  # the last pixels; the edge of the image lies behind them
    corners = min(x0, right), min(y0, bottom), min(x1, right), min(y1, bottom)
    draw.rectangle(corners, outline=color, width=line_width)


def write_inside(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], label: str, font: Font, above: bool = False
) -> None:
    """Write a label with its upper (`above`: lower) left corner at `corner`, moved to fit into the image."""
    left, top, right, bottom = draw.textbbox((0, 0), label, font)
    x, y = corner[0], corner[1] - bottom if above else corner[1]
    width, height = draw.im.size
    x, y = max(0, min(x, width - right)), max(0, min(y, height - bottom))
    draw.text((x, y), label, fill=BLACK, font=font)
