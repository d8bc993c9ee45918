"""Comparisons with the tools that researchers use today, side by side; `make bench` runs them all."""
