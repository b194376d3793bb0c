"""Verifiable problems and their graders, one file each; the code sandbox; the Grader. Loads no torch."""
