"""Running an artifact: importing this registers the `duquant` quantizer with transformers."""

from duquant.inference.hf import DuQuantConfig, DuQuantHfQuantizer
from duquant.inference.loading import generate_text, load, save

__all__ = ["DuQuantConfig", "DuQuantHfQuantizer", "generate_text", "load", "save"]
