"""Rows -> report.json, a table in the terminal, one HTML page and a model card."""
