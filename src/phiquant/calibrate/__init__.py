"""What needs the engine and the quantizers together: what a model computes on a text, collected and rounded by."""

from phiquant.calibrate.collect import Calibration, Done, collect
from phiquant.calibrate.combine import check_same_model, combine
from phiquant.calibrate.feedback import Feedback
from phiquant.calibrate.feedback import entries as feedback_entries
from phiquant.calibrate.held_out import held_out
from phiquant.calibrate.moments_file import MomentsFile, is_moments_file
from phiquant.calibrate.statistics import LayerFigures, TensorFigures, layer_figures, tensor_figures

__all__ = [
    "Calibration",
    "Done",
    "Feedback",
    "LayerFigures",
    "MomentsFile",
    "TensorFigures",
    "check_same_model",
    "collect",
    "combine",
    "feedback_entries",
    "held_out",
    "is_moments_file",
    "layer_figures",
    "tensor_figures",
]
