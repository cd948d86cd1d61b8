"""Normalizing flows over tokens: affine blocks, the shallow stack, the deep flows and the model they make."""
