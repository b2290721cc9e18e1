"""What needs the engine and the quantizers together: statistics of a text, rounding by them, mixes for a size."""

from phiquant.calibrate.budget import Menu, mix_entries, room_for
from phiquant.calibrate.candidates import READERS, reader_types
from phiquant.calibrate.collect import Calibration, Done, collect
from phiquant.calibrate.combine import check_same_model, combine
from phiquant.calibrate.feedback import Feedback
from phiquant.calibrate.feedback import entries as feedback_entries
from phiquant.calibrate.held_out import held_out
from phiquant.calibrate.limit import Limit
from phiquant.calibrate.mix import Mix, find_mix
from phiquant.calibrate.moments_file import MomentsFile, is_moments_file
from phiquant.calibrate.planfile import PlanFile
from phiquant.calibrate.probe import Probe
from phiquant.calibrate.search import Search
from phiquant.calibrate.sensitivity import Sensitivities, measure
from phiquant.calibrate.statistics import LayerFigures, TensorFigures, layer_figures, tensor_figures

__all__ = [
    "READERS",
    "Calibration",
    "Done",
    "Feedback",
    "LayerFigures",
    "Limit",
    "Menu",
    "Mix",
    "MomentsFile",
    "PlanFile",
    "Probe",
    "Search",
    "Sensitivities",
    "TensorFigures",
    "check_same_model",
    "collect",
    "combine",
    "feedback_entries",
    "find_mix",
    "held_out",
    "is_moments_file",
    "layer_figures",
    "measure",
    "mix_entries",
    "reader_types",
    "room_for",
    "tensor_figures",
]
