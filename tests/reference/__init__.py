"""Slow, plain reference models written only from design notes; tests compare the library against them."""
