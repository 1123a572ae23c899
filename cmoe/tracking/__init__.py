"""Tracking: a write-ahead log in the run's folder, delivered to MLflow; figures, comparison and report."""
