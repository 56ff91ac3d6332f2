"""Formats that are converted from, one file each; a new file here is a new format."""
