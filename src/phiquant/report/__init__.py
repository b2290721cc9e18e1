"""Quantized files of one model beside it: measured, and shown on a page.

figures.py  what is known of each file
weights.py  how far the weights are off
gather.py   runs the models and collects the figures
markup.py   HTML and SVG in which nothing is left unescaped
plots.py    the figures as SVG; scales.py: axes and their ticks
page.py     the page
png.py      the same plots through matplotlib
"""

from .figures import FileFigures, Report, TensorError
from .gather import Gathering, gather
from .page import page

__all__ = ["FileFigures", "Gathering", "Report", "TensorError", "gather", "page"]
