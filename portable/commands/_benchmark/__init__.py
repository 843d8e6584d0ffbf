"""Timing of ops and models on the device at hand, behind `portable bench`."""
