"""The stages of a run: a recipe arrives, a run folder leaves; the only room that opens a recipe.

prepare → data/ · train → METHOD/ · evaluate → base/, METHOD/test/, instruct-model/ · report → report.html.
Stages meet on disk. Each writes a key of all that it depends on; a stage whose key stands there is not run again.
Whatever needs torch is imported inside the function that needs it, so that data work starts at once.
"""

from keeptune.stages.check import CheckOutcome, check
from keeptune.stages.data import Data, check_model, prepare
from keeptune.stages.delivery import export, report
from keeptune.stages.evaluation import evaluate
from keeptune.stages.run import Context, Run, naming_recipe, open_run
from keeptune.stages.training import check_methods, train

__all__ = [
    "CheckOutcome",
    "Context",
    "Data",
    "Run",
    "check",
    "check_methods",
    "check_model",
    "evaluate",
    "export",
    "naming_recipe",
    "open_run",
    "prepare",
    "report",
    "train",
]
