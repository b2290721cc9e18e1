"""What needs the engine and the quantizers together: the importance matrix, collected by running a model on a text."""

from phiquant.calibrate.collect import Calibration, Done, collect
from phiquant.calibrate.combine import check_same_model, combine
from phiquant.calibrate.held_out import held_out
from phiquant.calibrate.statistics import LayerFigures, TensorFigures, layer_figures, tensor_figures

__all__ = [
    "Calibration",
    "Done",
    "LayerFigures",
    "TensorFigures",
    "check_same_model",
    "collect",
    "combine",
    "held_out",
    "layer_figures",
    "tensor_figures",
]
