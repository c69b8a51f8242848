"""Classifiers of generated images, for rejection sampling. B batch, K classes, D features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from taming.eval.networks import FeatureNetwork
from taming.eval.parts import batches
from taming.eval.sources import DatasetImages, pixels_of


@dataclass(frozen=True)
class Classifier:
    """Gives the logits of K classes.

    Attributes:
        network: its features, or its own logits, are used.
        means: (K, D) of the features of each class, and their common standard deviation (D,): logits are then
            those of Gaussians of equal covariance, made from labelled images. None: the network's own
            classes.
        name: for results.
    """

    network: FeatureNetwork
    means: tuple[Tensor, Tensor] | None = None

    @property
    def name(self) -> str:
        """Which classifier it is."""
        return self.network.name if self.means is None else f"class means of {self.network.name}"

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (B, K) of images uint8 (B, 3, H, W)."""
        found = self.network(images)
        if self.means is None:
            assert found.logits is not None  # checked by `classifier_for`
            return found.logits
        means, deviation = (each.to(found.features) for each in self.means)
        return -0.5 * torch.cdist(found.features / deviation, means / deviation).square()


def classifier_for(
    network: FeatureNetwork, n_classes: int, data: DatasetImages | None = None, key: str = "class_label", *,
    batch_size: int = 32, device: torch.device | str = "cpu",
) -> Classifier:
    """Return the network's own classes if there are as many, else one by the means of labelled images.

    Args:
        network: the network.
        n_classes: K, of the generated images.
        data: labelled images, read once.
        key: the entry of its items that is the label.
        batch_size: images at once.
        device: of the network.

    Raises:
        ValueError: the network knows another number of classes, and there are no labelled images of each
            class.
    """
    if num_classes(network) == n_classes:
        return Classifier(network)
    if data is None:
        raise ValueError(
            f"{network.name} knows {num_classes(network) or 'no'} classes and the model {n_classes}: "
            "give data with class labels, whose means are used instead"
        )
    features, labels = [], []
    with torch.inference_mode():
        for numbers in batches(list(range(len(data))), batch_size):
            batch = data.batch(numbers)
            images = pixels_of(batch[data.key].permute(0, 3, 1, 2))
            features.append(network(images.to(device)).features.cpu())
            labels.append(torch.as_tensor(batch[key]))
    return classifier_of_means(network, torch.cat(features), torch.cat(labels), n_classes)


def num_classes(network: FeatureNetwork) -> int | None:
    """Return the number of classes that a network tells apart."""
    device = next(network.parameters()).device
    logits = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device)).logits
    return None if logits is None else logits.shape[1]


def classifier_of_means(
    network: FeatureNetwork, features: Tensor, labels: Tensor, n_classes: int
) -> Classifier:
    """Return the classifier of Gaussians around the means of features (N, D) with labels (N,).

    Raises:
        ValueError: a class has no image; it is named.
    """
    counts = labels.bincount(minlength=n_classes)
    missing = (counts[:n_classes] == 0).nonzero().flatten().tolist()
    if missing:
        raise ValueError(
            f"the labelled images need all of {n_classes} classes; there are none of {missing[:20]}"
        )
    means = torch.zeros(n_classes, features.shape[1]).index_add_(0, labels, features.float())
    means /= counts[:, None]
    deviation = (features - means[labels]).std(0).clamp_min(1e-6)
    return Classifier(network, (means, deviation))
