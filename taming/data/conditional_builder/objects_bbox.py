"""Objects as triples of tokens: the category, and the upper left and lower right corner of the box."""

from typing import Any

from PIL import ImageDraw
from torch import Tensor

from taming.data.conditional_builder.objects_center_points import (
    Color,
    Font,
    ObjectsCenterPointsConditionalBuilder,
    draw_box,
    write_inside,
)
from taming.data.conditional_builder.utils import absolute_bbox
from taming.data.helper_types import BoundingBox


class ObjectsBoundingBoxConditionalBuilder(ObjectsCenterPointsConditionalBuilder):
    """Turns the annotations of an image into tokens (object, corner, corner) for each object, and back."""

    @property
    def object_descriptor_length(self) -> int:
        """Tokens per object."""
        return 3

    def inverse_build(
        self, conditional: Tensor
    ) -> tuple[list[tuple[int, tuple[float, ...]]], BoundingBox | None]:
        """Turn M tokens into [(object token, box)] and the crop, if that is encoded."""
        descriptors, crop = self._split(conditional)
        return [(token, self.bbox_from_token_pair(*corners)) for token, *corners in descriptors], crop

    def _position(self, bbox: BoundingBox) -> tuple[int, ...]:
        return self.token_pair_from_bbox(bbox)

    def _draw_object(
        self, draw: ImageDraw.ImageDraw, where: tuple[float, ...], color: Color, label: str, font: Font,
        line_width: int,
    ) -> None:
        box: Any = where
        draw_box(draw, box, color, line_width)
        x0, y0, x1, y1 = absolute_bbox(box, *draw.im.size)
        write_inside(draw, (min(x0, x1) + line_width + 1, min(y0, y1) + line_width), label, font)


BUILDERS = {  # by the key of items
    "objects_center_points": ObjectsCenterPointsConditionalBuilder,
    "objects_bbox": ObjectsBoundingBoxConditionalBuilder,
}
