"""The HTML report of a recipe: what was found, the road, the curves, the tables, the answers and the bill."""
