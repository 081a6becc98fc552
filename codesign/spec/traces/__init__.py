"""Traces of real traffic: one file per published format."""
