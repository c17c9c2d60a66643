"""Tests of single parts, in one process; nothing is launched but the command itself."""
