"""The Lightning modules that host a model, and the step that every paradigm shares."""

from cmoe.learners.batch import Batch
from cmoe.learners.head import Head
from cmoe.learners.hooks import StepHooks
from cmoe.learners.learner import Learner
from cmoe.learners.model import Model, Output

__all__ = ["Batch", "Head", "Learner", "Model", "Output", "StepHooks"]
