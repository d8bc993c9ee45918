"""Measurement: exact readings, and statistics over trained runs."""
