"""Several models' evaluations side by side: scores with intervals, answer lengths, paired tests, one page."""

from fasttrain.evaluate.comparing.analysis import Comparison, compare
from fasttrain.evaluate.comparing.folders import read_evaluations
from fasttrain.evaluate.comparing.page import write_comparison
from fasttrain.evaluate.comparing.tables import markdown, terminal_lines

__all__ = ["Comparison", "compare", "markdown", "read_evaluations", "terminal_lines", "write_comparison"]
