"""What is found out about a pipeline by running it: latency tables, timed on this device and kept on disk; and what stands in for
blocks at rest, fitted on the user's prompts."""

from shivelight.calibration.measure import SECONDS, measure_table
from shivelight.calibration.stand_ins import FittedRests, fit_rests, fitted_computes
from shivelight.calibration.tables import TableFile, Tables, cache_folder, setting_of, usual_load

__all__ = [
    "SECONDS",
    "FittedRests",
    "TableFile",
    "Tables",
    "cache_folder",
    "fit_rests",
    "fitted_computes",
    "measure_table",
    "setting_of",
    "usual_load",
]
