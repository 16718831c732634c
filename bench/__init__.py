"""Benchmarks: each a program that prints a table and writes bench/results/NAME.json."""
