"""Routers: one file each."""

from cmoe.moe.routers.table import TaskTable
from cmoe.moe.routers.topk import TopK

ROUTERS = {"topk": TopK, "task_table": TaskTable}

__all__ = ["ROUTERS", "TaskTable", "TopK"]
