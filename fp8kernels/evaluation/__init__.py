"""Score models on lm-evaluation-harness, exams and text, always in pairs: the same documents, answer by answer."""

from ..runs.curve import LossCurve, loss_curve
from .compare import Comparison, Score, compare
from .evaluate import Evaluation, Questions, evaluate, reference_of
from .local import write_items_task, write_text_task
from .subject import Subject, open_subject

__all__ = [
    "Comparison",
    "Evaluation",
    "LossCurve",
    "Questions",
    "Score",
    "Subject",
    "compare",
    "evaluate",
    "loss_curve",
    "open_subject",
    "reference_of",
    "write_items_task",
    "write_text_task",
]
