"""Timing in turns, intervals, and the machine that was timed: a leaf that anything which measures may ask."""
