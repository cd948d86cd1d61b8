"""Decoding: noise to frames, by fixed-point iteration, one frame at a time."""
