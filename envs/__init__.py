"""Gymnasium environments: real ones as images, and learned ones behind the same contract."""
