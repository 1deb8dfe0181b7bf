"""From a source model to a packed artifact: steps, their order, and the loop that runs them in one process."""

from duquant.pipeline.layer import QuantizedLayer, quantize_layer
from duquant.pipeline.model import Progress, QuantizeSummary, quantize_model
from duquant.pipeline.outcome import ShardOutcome
from duquant.pipeline.plan import plan
from duquant.pipeline.run import ModelRun
from duquant.pipeline.steps import Found, Step, StepId

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
