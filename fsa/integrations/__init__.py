"""Feedback for code that people already run."""
