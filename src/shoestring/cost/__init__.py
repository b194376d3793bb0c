"""What a run costs: shapes, chips, export rules, step time, stages, the whole bill. Pure arithmetic, no torch."""

from shoestring.cost.chips import Chip, Cluster, find_chip, parse_cluster
from shoestring.cost.export import export_status
from shoestring.cost.models import resolve_shape
from shoestring.cost.plan import Plan, plan
from shoestring.cost.shape import ModelShape, ParamCount

__all__ = ["Chip", "Cluster", "ModelShape", "ParamCount", "Plan", "export_status", "find_chip", "parse_cluster", "plan",
           "resolve_shape"]  # fmt: skip
