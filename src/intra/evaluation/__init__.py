"""Verdicts and ground truth → figures, results.json and the report."""
