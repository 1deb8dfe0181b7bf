"""From a source model to a packed artifact: steps, their order, and the loop that runs them in one process."""

from duquant.pipeline.layer import QuantizedLayer, quantize_layer
from duquant.pipeline.model import Progress, QuantizeSummary, quantize_model
from duquant.pipeline.plan import Found, Step, StepId, plan
from duquant.pipeline.run import ModelRun, ShardOutcome

__all__ = [
    "Found",
    "ModelRun",
    "Progress",
    "QuantizeSummary",
    "QuantizedLayer",
    "ShardOutcome",
    "Step",
    "StepId",
    "plan",
    "quantize_layer",
    "quantize_model",
]
