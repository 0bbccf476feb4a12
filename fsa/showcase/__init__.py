"""Figures that show what feedback does: one picture compared, and the demo."""
