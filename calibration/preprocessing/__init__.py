"""Find the preprocessing that a suspect was trained with, from labelled clean images."""

from calibration.preprocessing.search import Candidate, Finding, find_preprocessing

__all__ = ["Candidate", "Finding", "find_preprocessing"]
