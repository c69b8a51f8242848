"""Objects as triples of tokens: which kind, and the upper left and lower right corner of its box."""

from PIL import ImageDraw, ImageFont
from torch import Tensor

from taming.data.conditional_builder.objects_center_points import (
    Color,
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

    def inverse_build(self, conditional: Tensor) -> tuple[list[tuple[int, BoundingBox]], BoundingBox | None]:
        """Turn M tokens into [(object token, box)] and the crop, if that is encoded."""
        descriptors, crop = self._split(conditional)
        return [(which, self.bbox_from_token_pair(*corners)) for which, *corners in descriptors], crop

    def _place(self, bbox: BoundingBox) -> tuple[int, ...]:
        return self.token_pair_from_bbox(bbox)

    def _draw_object(
        self, draw: ImageDraw.ImageDraw, where: BoundingBox, color: Color, label: str,
        font: ImageFont.ImageFont, line_width: int,
    ) -> None:
        draw_box(draw, where, color, line_width)
        x0, y0, x1, y1 = absolute_bbox(where, *draw.im.size)
        write_inside(draw, (min(x0, x1) + line_width + 1, min(y0, y1) + line_width), label, font)


BUILDERS = {  # by the key of items
    "objects_center_points": ObjectsCenterPointsConditionalBuilder,
    "objects_bbox": ObjectsBoundingBoxConditionalBuilder,
}
