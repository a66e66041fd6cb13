"""The labelled clean images that an operator uploads: found in whatever container they come in, checked, and decoded on demand.

Owns what a clean set may look like and how large it may be. Refuses with a CleanSetProblem whatever is damaged, hostile, or of no use for a
calibration. Nothing is ever extracted to disk and nothing in a file is executed or unpickled.
"""

from calibration.clean_set.limits import Limits
from calibration.clean_set.opening import open_clean_set
from calibration.clean_set.set import CleanSet, named

__all__ = ["CleanSet", "Limits", "named", "open_clean_set"]
