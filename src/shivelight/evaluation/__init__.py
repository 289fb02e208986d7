"""Measuring: fidelity to the dense images, distance to the data, latency, and the front of quality against latency."""
