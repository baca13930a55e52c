"""Classifiers, their input and their weights."""
