"""Evaluation: recall, rank and merge under two protocols, and files for the leaderboards.

``original`` gives the numbers of the published code, ``corrected`` the right ones;
docs/evaluation.md says what lies between them.
"""

from bagformer.evaluation.protocol import with_protocol
from bagformer.evaluation.report import Report, metric_names
from bagformer.evaluation.run import evaluate

__all__ = ["Report", "evaluate", "metric_names", "with_protocol"]
