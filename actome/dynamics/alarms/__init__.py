"""Alarms: what in a training run a person should know now, with its evidence, where it began and what to do.

- `Alarm`, `Reading`, `Detector` (`base`): what is raised, what is looked at, and who looks
"""

from .base import Alarm, Detector, Level, Reading

__all__ = ["Alarm", "Detector", "Level", "Reading"]
