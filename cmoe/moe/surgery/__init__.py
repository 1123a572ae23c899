"""Operations on the experts of a whole model: each is one call, which says what it did (`Surgery`).

done = surgery.upcycle(model, experts=4, router={"name": "topk", "k": 2})
migrate_optimizer(optimizer, done.change, added=model.parameters())
"""

from cmoe.moe.surgery.bare import Bare, Routings, routings
from cmoe.moe.surgery.collapse import collapse, distil
from cmoe.moe.surgery.dense import Dense
from cmoe.moe.surgery.edit import add_experts, assign, freeze, merge, prune, remove, reset_usage, thaw
from cmoe.moe.surgery.forms import Form, recognise
from cmoe.moe.surgery.observe import Seen, observe
from cmoe.moe.surgery.place import placed, put
from cmoe.moe.surgery.report import Event, Surgery, layers
from cmoe.moe.surgery.upcycle import dense_networks, layer_of, upcycle

__all__ = [
    "Bare",
    "Dense",
    "Event",
    "Form",
    "Routings",
    "Seen",
    "Surgery",
    "add_experts",
    "assign",
    "collapse",
    "dense_networks",
    "distil",
    "freeze",
    "layer_of",
    "layers",
    "merge",
    "observe",
    "placed",
    "prune",
    "put",
    "recognise",
    "remove",
    "reset_usage",
    "routings",
    "thaw",
    "upcycle",
]
