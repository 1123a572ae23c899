"""Nearest class mean."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from cmoe.strategies.feature_classifier import FeatureClassifier


class NCM(FeatureClassifier):
    """Nearest class mean: a sample is of the class whose mean feature is nearest (Mensink et al. 2013).

    https://doi.org/10.1109/TPAMI.2013.83, with the Euclidean distance.
    The network learns by gradient in the first experience and is frozen then; later experiences only add the means of
    their classes. After each experience the head has weights m and biases −½ ‖m‖², so that its logits are
    −½ ‖x − m‖² but for a number that all outputs share. Outputs of classes without samples are never chosen.

    Options:
        train: the network learns in the 'first' experience, or 'never' (random or pretrained features).
    """

    called: ClassVar[str] = "ncm"

    def __init__(self, train: Literal["first", "never"] = "first") -> None:
        super().__init__(train)

    def outputs(self) -> tuple[Tensor, Tensor]:
        return self.mean, -0.5 * self.mean.square().sum(1)
