"""Other people's weights, as diffusers folders and adapters of ours."""

from shivelight.importers.elastic_dit import ElasticDiTImport
from shivelight.importers.streaming import Checkpoint

__all__ = ["Checkpoint", "ElasticDiTImport"]
