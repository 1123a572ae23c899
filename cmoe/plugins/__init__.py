"""Components by name: where they are, what they are called, which options they take, all without importing them.

Built-in ones stand in a table (`cmoe.plugins.builtin`), tasks and users' plugins are files in folders, and installed
packages may announce more as entry points.
"""

from cmoe.plugins.builtin import BUILTIN, KINDS, PLURALS, builtin_folder
from cmoe.plugins.catalogue import Catalogue, Entry
from cmoe.plugins.schema import REQUIRED, Option
from cmoe.plugins.types import Type

__all__ = ["BUILTIN", "KINDS", "PLURALS", "REQUIRED", "Catalogue", "Entry", "Option", "Type", "builtin_folder"]
