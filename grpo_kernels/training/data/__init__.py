"""Rows of a dataset: read from files and the Hub, and rendered as prompts."""
