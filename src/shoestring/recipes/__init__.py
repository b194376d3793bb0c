"""Recipes: one Python function a file that returns a road. The folder is the registry."""
