"""Networks whose features metrics compare; `taming.eval.networks` loads their weights."""

from taming.modules.features.dinov2 import DINOv2
from taming.modules.features.efficientnet_lite import EfficientNetLite0
from taming.modules.features.inception import FIDInception
from taming.modules.features.shift_tolerant_lpips import ShiftTolerantLPIPS

__all__ = ["DINOv2", "EfficientNetLite0", "FIDInception", "ShiftTolerantLPIPS"]
