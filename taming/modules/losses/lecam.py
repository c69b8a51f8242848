"""LeCam regularisation of a discriminator: its logits stay near the running means of the other kind of image.

Source: Tseng et al. 2021, "Regularizing generative adversarial networks under limited data", eq. 4 and 5.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.modules.distributed import all_reduce_mean
from taming.parameters import Probability


class LeCam(nn.Module):
    """Running means of the logits of real and generated images, over all processes, and the regularisation.

    Args:
        decay: share of the means that is kept in each batch.
    """

    real: Tensor  # (), running mean of the logits of real images
    fake: Tensor  # (), of generated ones

    def __init__(self, decay: Probability = 0.999):
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """Update the means by a batch of logits of any shape, and return the regularisation, ().

        A real logit is pulled down to the mean of generated images, a generated one up to that of real ones.
        """
        with torch.no_grad():
            means = all_reduce_mean(torch.stack([logits_real.mean(), logits_fake.mean()]).float())
            self.real.lerp_(means[0], 1.0 - self.decay)
            self.fake.lerp_(means[1], 1.0 - self.decay)
        real, fake = self.real.clone(), self.fake.clone()  # the buffers change before the backward pass
        return F.relu(logits_real - fake).square().mean() + F.relu(real - logits_fake).square().mean()
