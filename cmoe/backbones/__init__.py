"""Networks that turn inputs into features, with Mixture-of-Experts layers where their feed-forward networks are."""

from cmoe.backbones.base import Backbone, Features
from cmoe.backbones.byte_lm import ByteLM
from cmoe.backbones.convnet import ConvNet
from cmoe.backbones.experts import ExpertLayers, HeadLayers
from cmoe.backbones.mlp import MLP
from cmoe.backbones.text_encoder import TextEncoder
from cmoe.backbones.vit import ViT

__all__ = ["MLP", "Backbone", "ByteLM", "ConvNet", "ExpertLayers", "Features", "HeadLayers", "TextEncoder", "ViT"]
