"""Latency tables: a backbone's blocks timed on this device, once for each setting, and kept on disk."""

from shivelight.calibration.measure import SECONDS, measure_table
from shivelight.calibration.tables import TableFile, Tables, cache_folder, setting_of, usual_load

__all__ = ["SECONDS", "TableFile", "Tables", "cache_folder", "measure_table", "setting_of", "usual_load"]
