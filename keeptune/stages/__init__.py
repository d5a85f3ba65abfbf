"""The stages of a run: a recipe arrives, a run folder leaves; the only room that opens a recipe.

prepare → data/ · write_harness → harness/ · write_texts → texts/ · train → METHOD/ · evaluate → base/, METHOD/test/,
METHOD/path/, forgetting.json, instruct-model/ · certify → certificate.json, instruct-model/ · report → report.html.
certify_artifact gives a single folder a certificate of its own, in certificates/.
search tries settings, each in a process of its own → search/, with the best recipe. curve trains on more and more
records likewise → curve/.
compare sets models of several runs, and models of none, side by side on one test set.
Stages meet on disk. Each writes a key of all that it depends on; a stage whose key stands there is not run again.
Whatever needs torch is imported inside the function that needs it, so that data work starts at once.
"""

from keeptune.stages.budgets import check_budgets, refuse_budgets
from keeptune.stages.certify import certify
from keeptune.stages.check import CheckOutcome, check
from keeptune.stages.compare import compare
from keeptune.stages.curve import curve
from keeptune.stages.data import Data, check_model, prepare
from keeptune.stages.delivery import export, report
from keeptune.stages.evaluation import evaluate
from keeptune.stages.harness import Harness, write_harness
from keeptune.stages.keep import KeepTexts
from keeptune.stages.methods import check_methods
from keeptune.stages.plan import PlanOutcome, plan
from keeptune.stages.recertify import ArtifactCertificate, certify_artifact
from keeptune.stages.run import Context, Run, naming_recipe, open_run
from keeptune.stages.search import search
from keeptune.stages.texts import Texts, keep_texts, write_texts
from keeptune.stages.training import train
from keeptune.stages.trial import run_trial

__all__ = [
    "ArtifactCertificate",
    "CheckOutcome",
    "Context",
    "Data",
    "Harness",
    "KeepTexts",
    "PlanOutcome",
    "Run",
    "Texts",
    "certify",
    "certify_artifact",
    "check",
    "check_budgets",
    "check_methods",
    "check_model",
    "compare",
    "curve",
    "evaluate",
    "export",
    "keep_texts",
    "naming_recipe",
    "open_run",
    "plan",
    "prepare",
    "refuse_budgets",
    "report",
    "run_trial",
    "search",
    "train",
    "write_harness",
    "write_texts",
]
