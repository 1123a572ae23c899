"""What is tracked of a run's experts, from one document a row: metrics, a table, pictures."""

from cmoe.tracking.diagnostics.document import Document, load, save
from cmoe.tracking.diagnostics.metrics import EXPERTS, ROUTER, SUMMED, WHAT, WHO, metrics, values
from cmoe.tracking.diagnostics.pictures import DRAWN, calibrations, dropped, similarities
from cmoe.tracking.diagnostics.table import COLUMNS, table

__all__ = [
    "COLUMNS",
    "DRAWN",
    "EXPERTS",
    "ROUTER",
    "SUMMED",
    "WHAT",
    "WHO",
    "Document",
    "calibrations",
    "dropped",
    "load",
    "metrics",
    "save",
    "similarities",
    "table",
    "values",
]
