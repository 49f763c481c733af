"""Synthetic worlds with planted truth: generators with a seed, written for this project."""
