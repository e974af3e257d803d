"""Fit the head model to a clip's landmarks: one identity and focal length, a pose and an expression for each frame.

`problem` states the objective, `solver` minimises it, `flow` holds the optical-flow term, `identity` fits identity and
focal length, `refit` finds expressions under given poses, `report` measures a finished track.
"""

from hicode.tracking.fit.flow import Flow, FlowConfig, track_flow
from hicode.tracking.fit.identity import Person, fit_person
from hicode.tracking.fit.problem import FitConfig, Observations
from hicode.tracking.fit.refit import refit_expressions
from hicode.tracking.fit.report import FitReport, fit_report
from hicode.tracking.fit.solver import fit_track

__all__ = [
    "FitConfig", "FitReport", "Flow", "FlowConfig", "Observations", "Person", "fit_person", "fit_report", "fit_track",
    "refit_expressions", "track_flow",
]  # fmt: skip
