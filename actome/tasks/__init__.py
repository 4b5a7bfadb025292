"""Subjects: data with known ground truth, tiny models, and the demo model."""
