"""What a run costs: shapes, chips, export rules, step time, stages, the whole bill. Pure arithmetic, no torch."""

from shoestring.cost.shape import ModelShape, ParamCount

__all__ = ["ModelShape", "ParamCount"]
