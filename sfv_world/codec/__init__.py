"""Codecs: frames to tokens and back."""
